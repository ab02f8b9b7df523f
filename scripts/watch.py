"""Watch a run in a browser: one HTML file, which holds the figures and renews itself.

    python scripts/watch.py runs/first                  # writes runs/first/watch.html; open it
    python scripts/watch.py runs/first --port 8080      # or serves it at http://127.0.0.1:8080

RUN is the output_dir of fastlora.train(..., log="jsonl"); runs that have ended are shown too. The
file is written again every few seconds until the run has ended, or Ctrl-C. From another machine:
`ssh -L 8080:127.0.0.1:8080 HOST`, then --port 8080 there.
"""

import argparse
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from finetuning.ending import user_errors
from watching.page import page

from fastlora.arguments import PORT, number, option
from fastlora.checkpoints.tensors import write_text

PAGE_FILE = "watch.html"


@user_errors()
def main() -> None:
    args = parse_arguments()
    write(args) if args.port is None else serve(args.run, args.port, args.every)


def write(args: argparse.Namespace) -> None:
    """Write the page to a file, again and again until the run has ended, or Ctrl-C."""
    path = args.output or args.run / PAGE_FILE
    html, ended = page(args.run, args.every)
    write_text(path, html)
    print(f"open {path.resolve().as_uri()}", flush=True)
    with suppress(KeyboardInterrupt):
        while not ended and not args.once:
            time.sleep(args.every)
            html, ended = page(args.run, args.every)
            write_text(path, html)


def serve(run: Path, port: int, every: float) -> None:
    """Serve the page to this machine, made anew for each request, until Ctrl-C.

    Raises:
        OSError: the port is in use, or reserved for other users.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            body = page(run, every)[0].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not printed."""

    page(run, every)  # a folder that is not a run's is reported now
    try:
        listening = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(f"cannot listen on port {port}: {error.strerror}") from error
    with listening as server:
        print(f"open http://127.0.0.1:{server.server_port}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output_dir of train")
    add("--output", type=Path, help=f"the file; default: RUN/{PAGE_FILE}")
    every = option(float, number(above=0, high=86400))  # time.sleep overflows on 1e10 seconds
    add("--every", type=every, default=5.0, help="seconds between two renewals")
    add("--once", action="store_true", help="write the file once, and do not wait for more steps")
    port = option(int, PORT)
    add("--port", type=port, help="serve the page instead of writing it; 0: a free port")
    return parser.parse_args()


if __name__ == "__main__":
    main()
