"""SIGTERM lets running replies end, refuses new ones, and ends the process in time."""

import signal
import time

import openai
import pytest

from oracles.serving_process import serve

CHAT = [{"role": "user", "content": "def f(x):"}]


def begin(client, tokens: int):
    """A stream whose first chunk has come."""
    # A stop id that ends the reply early would end the test's stream; sampling at 2 avoids it.
    stream = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=tokens, n=2, temperature=2, seed=3, stream=True
    )
    next(iter(stream))
    return stream


def test_running_streams_end_and_new_ones_get_503(tmp_path):
    limit = ("--max-drain-seconds", "100")  # a machine under load needs more than the default 20
    with serve(tmp_path / "log", "demo", *limit) as server, server.client() as client:
        stream = begin(client, 150)
        server.process.send_signal(signal.SIGTERM)
        with server.http() as http:
            end = time.monotonic() + 10
            while http.get("/health").status_code != 503 and time.monotonic() < end:
                time.sleep(0.02)
            assert http.get("/health").json() == {"status": "stopping"}
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="demo", prompt="x")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        reasons = [c.finish_reason for chunk in stream for c in chunk.choices if c.finish_reason]
        assert len(reasons) == 2
        assert server.process.wait(100) == 0
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text


def test_streams_are_cut_at_the_deadline(tmp_path):
    limit = ("--max-drain-seconds", "0.2")
    with serve(tmp_path / "log", "demo", *limit) as server, server.client() as client:
        stream = begin(client, 480)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server has stopped"):
            list(stream)
        assert server.process.wait(20) == 0
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_second_signal_cuts_the_streams_at_once(tmp_path, pause):
    limit = ("--max-drain-seconds", "100")
    with serve(tmp_path / "log", "demo", *limit) as server, server.client() as client:
        stream = begin(client, 480)
        server.process.send_signal(signal.SIGINT)
        time.sleep(pause)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server has stopped"):
            list(stream)
        assert server.process.wait(20) == 0
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text


def test_a_third_signal_ends_the_process(tmp_path):
    with serve(tmp_path / "log", "demo") as server, server.client() as client:
        begin(client, 480)
        for _ in range(3):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        server.process.wait(10)
