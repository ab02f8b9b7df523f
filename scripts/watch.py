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

from fastlora.checkpoints.tensors import write_text

PAGE_FILE = "watch.html"


@user_errors()
def main() -> None:
    args = parse_arguments()
    if args.port is not None:
        serve(args.run, args.port, args.every)
        return
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
    """Serve the page to this machine, made anew for each request, until Ctrl-C."""

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
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
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
    add("--every", type=float, default=5.0, help="seconds between two renewals")
    add("--once", action="store_true", help="write the file once, and do not wait for more steps")
    add("--port", type=int, help="serve the page instead of writing it; 0: a free port")
    return parser.parse_args()


if __name__ == "__main__":
    main()
