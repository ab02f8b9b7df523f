"""Serve a model and its adapters over OpenAI's API, with a page to try them in a browser.

    python scripts/serve.py demo
    python scripts/serve.py meta-llama/Llama-3.2-1B-Instruct --adapter sql=runs/sql
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sql", "messages": [{"role": "user", "content": "All users of 2024?"}]}'

`model` of a request is the base's name or an adapter's. Needs `pip install -e '.[serve]'`.
"""

import argparse
import logging
import os
from dataclasses import fields

from serving.app import make_app
from serving.guard import LOOPBACK
from serving.limits import Limits
from serving.models import add_model_arguments, load_served
from serving.server import Server, bind
from serving.service import Service

from fastlora.arguments import PORT, option, whole_number

KEY_VARIABLE = "FASTLORA_API_KEY"  # other users of the machine can read command lines


def main() -> None:
    given = arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    key = given.api_key or os.environ.get(KEY_VARIABLE) or None
    is_local = given.host in LOOPBACK
    if not is_local and key is None and not given.no_key:
        raise SystemExit(
            f"--host {given.host} lets other machines connect. Set a key in the environment"
            f" variable {KEY_VARIABLE} or with --api-key, or serve everybody with --no-key."
        )
    hosts = (*LOOPBACK, *given.allow_host) if is_local or given.allow_host else None
    try:
        limits = Limits(**{name: getattr(given, name) for name in Limits.names()}).check()
        listener = bind(given.host, given.port)  # first: loading a model may take minutes
        served = load_served(
            given.model,
            given.adapter,
            name=given.name,
            load_in_4bit=given.load_in_4bit,
            max_seq_length=given.max_seq_length,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"serve.py: {error}") from error
    service = Service(served, limits, slots=given.slots)
    app = make_app(service, key=key, hosts=hosts)
    Server(app, service).run(sockets=[listener])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(add)
    add("--name", help="name of the model in requests; default: the last part of MODEL")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=option(int, PORT), default=8000, help="0 takes a free one")
    add("--api-key", help=f"bearer key; better set in the environment variable {KEY_VARIABLE}")
    add("--no-key", action="store_true", help="allow a --host that others reach without a key")
    add("--allow-host", action="append", default=[], help="one more name in the Host header")
    count = option(int, whole_number(1))
    add("--max-seq-length", type=count, help="longest prompt and reply together, in tokens")
    add("--slots", type=count, help="replies that run at once; default: what the memory holds")
    limits = parser.add_argument_group("limits")
    texts = {
        "streams": "replies open at once; one more is refused with 429",
        "choices": "n times prompts of one request",
        "new_tokens": "tokens of one reply",
        "body_bytes": "size of a request",
        "body_seconds": "until a request's body is complete",
        "request_seconds": "until a reply is complete",
        "buffer_tokens": "tokens of a stream that a slow reader may leave unread",
        "drain_seconds": "for running replies when the server stops",
    }
    for f in fields(Limits):
        name = f.name.replace("_", "-")
        limits.add_argument(
            f"--max-{name}", dest=f.name, type=type(f.default), default=f.default,
            help=f"{texts[f.name]} ({f.default})",
        )  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    main()
