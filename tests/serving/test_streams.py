"""Many streams at once, clients that leave or read slowly, and leaks after many requests."""

import asyncio
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from oracles.serving_process import ServerProcess, serve
from oracles.streams import hold_streams

STREAMS = 64
CHAT = [{"role": "user", "content": "def f(x):"}]
MEGABYTE = 2**20


def stream_of(client, **settings):
    settings = {"model": "demo", "max_tokens": 400, "temperature": 1, **settings}
    return client.chat.completions.create(messages=CHAT, stream=True, **settings)


def test_64_streams_of_all_models_have_no_error(server, full):
    models, seconds = ["demo", "one", "two"], 60 if full else 1
    most_open = 0.0

    async def main() -> Counter[str]:
        nonlocal most_open
        load = asyncio.create_task(
            hold_streams(server.url, models, streams=STREAMS, seconds=seconds)
        )
        while not load.done():
            most_open = max(most_open, await asyncio.to_thread(server.metric, "open_streams"))
            await asyncio.sleep(0.1)
        return await load

    counts = asyncio.run(main())
    print(f"{STREAMS} streams for {seconds} s: {dict(counts)}, {most_open:g} open at once")
    assert counts["errors"] == 0, counts
    assert most_open == STREAMS
    assert counts["replies"] >= STREAMS
    server.wait_idle()


def test_the_65th_stream_is_refused_and_clients_that_vanish_free_their_slots(server):
    with ExitStack() as held:
        client = held.enter_context(server.client())
        streams = [stream_of(client, n=16, seed=1) for _ in range(STREAMS // 16)]
        for stream in streams:
            next(iter(stream))  # the opening chunk
        assert server.metric("open_streams") == STREAMS
        with pytest.raises(openai.RateLimitError) as caught:
            stream_of(client)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["code"] == "too_many_streams"
        before = server.metric("new_tokens_total")
        for stream in streams:
            stream.close()  # closes the connection in the middle of the reply
    server.wait_idle(10)
    # They have not run to the end.
    assert server.metric("new_tokens_total") - before < STREAMS * 300
    with server.client() as client:
        assert client.models.list().data


def test_a_client_that_leaves_before_its_complete_reply_frees_its_slot(server):
    before = server.metric("new_tokens_total")
    with server.client(timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="one", prompt="def f", max_tokens=500, n=16, seed=1)
    server.wait_idle(10)
    assert server.metric("new_tokens_total") - before < 16 * 400


@pytest.fixture(scope="module")
def impatient(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that cuts clients with 32 tokens unread, and requests of more than 20 seconds."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    limits = ("--max-buffer-tokens", "32", "--max-request-seconds", "20", "--slots", "20")
    with serve(log, "demo", *limits) as running:
        yield running


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def test_a_slow_reader_is_cut_and_holds_up_nobody(impatient):
    host, port = impatient.url.removeprefix("http://").split(":")
    body = {"model": "demo", "prompt": "def f", "n": 16, "max_tokens": 400, "logprobs": 0}
    text = json.dumps(body | {"stream": True, "temperature": 2, "seed": 1})
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(text)}"
        slow.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{text}".encode())
        with impatient.client() as client:  # others are served meanwhile
            assert client.completions.create(model="demo", prompt="def f").choices[0].text
        impatient.wait_idle(30)
        with impatient.http() as http:
            assert 'replies_total{end="too slow"} 16' in http.get("/metrics").text
        data = read_all(slow)
    assert data.startswith(b"HTTP/1.1 200") and b"[DONE]" not in data


def test_rows_without_a_slot_wait_and_are_served(impatient):
    with impatient.client() as client:
        run = lambda i: client.completions.create(
            model="demo", prompt=f"def f{i}", max_tokens=4, n=10, seed=i
        )
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(run, range(6)))
    assert all(len(reply.choices) == 10 for reply in replies)


def file_descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def threads(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def one_request(server: ServerProcess, number: int, client) -> None:
    """Complete replies, streams, streams that the client leaves, and refusals, in turn."""
    model = ("demo", "one", "two")[number % 3]
    kind = number % 5
    settings = {"model": model, "prompt": f"def f{number}(", "max_tokens": 2, "seed": number}
    if kind == 0:
        client.completions.create(**settings | {"stop": "(", "logprobs": 0})
    elif kind == 1:
        list(client.completions.create(**settings, stream=True))
    elif kind == 2:
        client.completions.create(**settings | {"max_tokens": 200}, stream=True).close()
    elif kind == 3:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**settings | {"top_p": 7})
    else:
        client.chat.completions.create(model=model, messages=CHAT, max_tokens=2)


def test_memory_slots_and_connections_come_back_after_many_requests(server, full):
    def run(numbers: range) -> None:
        local = threading.local()
        clients = []

        def one(number: int) -> None:
            if not hasattr(local, "client"):
                local.client = server.client()
                clients.append(local.client)
            one_request(server, number, local.client)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, numbers))
        for client in clients:
            client.close()
        server.wait_idle()

    count = 1000 if full else 250
    run(range(100))  # fills caches: compiled templates, the allocator's pools, thread pools
    memory, files, before = server.memory(), file_descriptors(server), threads(server)
    run(range(100, 100 + count))
    after = server.memory()
    print(f"{count} requests: {memory / MEGABYTE:.1f} MiB before, {after / MEGABYTE:.1f} after")
    assert after - memory < 24 * MEGABYTE
    end = time.monotonic() + 10
    while file_descriptors(server) > files and time.monotonic() < end:
        time.sleep(0.1)  # closed connections are noticed a little later
    assert file_descriptors(server) <= files
    assert threads(server) <= before + 8
    rows = {name: server.metric(name) for name in ("open_streams", "running_rows", "waiting_rows")}
    opened = f"{file_descriptors(server)} files (before: {files}), {threads(server)} threads"
    print(f"{opened} (before: {before}), {rows}")
    assert not any(rows.values())
    log = Path(server.log).read_text()
    assert "Traceback" not in log, log
