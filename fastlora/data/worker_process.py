"""The process that `workers.py` starts: reads chunks of rows from stdin, writes examples to stdout.

Messages in both directions are 8 bytes of length, then a pickle. The pipes connect two processes of
one program; nothing that comes from a file or a network is unpickled.
"""

import os
import pickle
import sys
from typing import Any, BinaryIO

from fastlora.data.row_chunks import encode_chunk

READY = "ready"


def send(pipe: BinaryIO, message: Any) -> None:
    """Write one message.

    Raises:
        OSError: the other process has ended.
    """
    send_pickle(pipe, pickle.dumps(message))


def send_pickle(pipe: BinaryIO, data: bytes) -> None:
    """Write one message that is pickled already."""
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    """The next message.

    Raises:
        EOFError: the other process has ended.
    """
    length = int.from_bytes(_exactly(pipe, 8), "little")
    return pickle.loads(_exactly(pipe, length))


def _exactly(pipe: BinaryIO, length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError("the other process has ended")
    return data


def main() -> None:
    """Encode chunks until stdin ends. A chunk that fails is answered with the error's text."""
    chunks = sys.stdin.buffer
    # What other code prints goes to stderr, not between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    context, columns, encodes_special_tokens = receive(chunks)
    context.tokenizer.backend.encode_special_tokens = encodes_special_tokens  # pickle drops it
    send(answers, READY)
    while True:
        try:
            answer = encode_chunk(receive(chunks), context, columns)
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001  the other process encodes the chunk, and raises
            answer = str(error)
        send(answers, answer)
