"""Keys, hosts, origins, bodies, and wrong arguments of serve.py."""

import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import serve as serve_script

import fastlora
from oracles.serving_process import ServerProcess, save_adapter, serve

BODY = {"model": "demo", "prompt": "def f", "max_tokens": 2}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server with a key and a short time for bodies."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    limits = ("--max-body-seconds", "2", "--max-streams", "4")
    with serve(log, "demo", *limits, key="sesame") as running:
        yield running


@pytest.mark.parametrize("key", ["wrong", "sesame2", "Sesame", "sesam", "ключ"])
def test_a_wrong_key_is_401(guarded, key):
    with guarded.http() as http:
        header = {"Authorization": f"Bearer {key}".encode()}
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            response = http.get(path, headers=header)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/completions", json=BODY, headers=header).status_code == 401
    if key.isascii():
        with pytest.raises(openai.AuthenticationError, match="wrong or missing key"):
            guarded.client().with_options(api_key=key).models.list()


def test_no_key_is_401_except_for_page_and_health(guarded):
    with guarded.http() as http:
        http.headers.pop("Authorization")
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Basic sesame"}).status_code == 401
        assert http.get("/health").status_code == http.get("/").status_code == 200


def test_the_right_key_is_served(guarded):
    with guarded.client() as client:
        assert client.completions.create(**BODY).choices[0].text


@pytest.mark.parametrize("more", [{"n": 5}, {"prompt": ["a", "b", "c"], "n": 2}])
def test_more_replies_than_streams_are_400_and_not_to_be_tried_again(guarded, more):
    with guarded.client() as client:
        with pytest.raises(openai.BadRequestError, match="replies, expected at most 4") as caught:
            client.completions.create(**BODY | more)
        assert caught.value.body["param"] == "n"
        assert len(client.completions.create(**BODY, n=4).choices) == 4


def test_a_host_of_dns_rebinding_is_refused(guarded):
    with guarded.http() as http:
        port = guarded.url.split(":")[-1]
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "",
            "[",
            "@",
        ):
            for path in ("/", "/health", "/v1/models"):
                response = http.get(path, headers={"Host": host})
                assert response.status_code in (400, 403), (host, path)
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_pages_of_other_origins_are_refused(guarded):
    with guarded.http() as http:
        for origin in ("http://evil.example", "null", "http://localhost:1", "https://127.0.0.1"):
            response = http.post("/v1/completions", json=BODY, headers={"Origin": origin})
            assert response.status_code == 403, origin
            assert "access-control-allow-origin" not in response.headers
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert http.options("/v1/completions", headers=preflight).status_code == 403
        own = http.post("/v1/completions", json=BODY, headers={"Origin": guarded.url})
        assert own.status_code == 200


def reset_peak(server: ServerProcess) -> int:
    """Resident bytes now, from which the kernel measures the peak again."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    return peak(server)


def peak(server: ServerProcess) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("key", ["sesame", "wrong"])
@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_a_body_of_100_mb_is_refused_and_not_read_into_memory(guarded, form, key):
    before = reset_peak(guarded)
    content = (b"x" * MEGABYTE for _ in range(100))
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    if form == "declared":
        headers["Content-Length"] = str(100 * MEGABYTE)
    with guarded.http() as http:
        response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == (413 if key == "sesame" else 401)
    assert response.json()["error"]["type"]
    assert peak(guarded) - before < 12 * MEGABYTE
    with guarded.client() as client:
        assert client.completions.create(**BODY).choices


def test_a_body_just_within_the_limit_is_read(guarded):
    with guarded.http() as http:
        response = http.post("/v1/completions", json=BODY | {"user": "x" * (4 * MEGABYTE - 200)})
        assert response.status_code == 200
        response = http.post("/v1/completions", json=BODY | {"user": "x" * 4 * MEGABYTE})
        assert response.status_code == 413


def raw_request(server: ServerProcess, *more: str) -> bytes:
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {server.key}",
    ]
    return "\r\n".join([*head, *more, "", ""]).encode()


def connect(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_body_that_does_not_come_is_408(guarded):
    with connect(guarded) as connection:
        connection.sendall(raw_request(guarded, "Content-Length: 100") + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_within_the_body_harms_nobody(guarded):
    for _ in range(20):
        with connect(guarded) as connection:
            connection.sendall(raw_request(guarded, "Content-Length: 100") + b"{")
    with connect(guarded) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    with guarded.client() as client:
        assert client.completions.create(**BODY).choices


REFUSED = {
    "--host 0.0.0.0": "--host 0.0.0.0 lets other machines connect",
    "--max-streams 0": "streams=0: expected a whole number >= 1",
    "--adapter x": "expected NAME=FOLDER",
    "--adapter demo=runs/none": "the name 'demo' is used twice",
    "--adapter x=runs/one --adapter x=runs/two": "the name 'x' is used twice",
    "--adapter x=runs/none": "runs/none",
    "--host 203.0.113.7 --no-key": "203.0.113.7",
}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(arguments): what serve.py prints before it exits."""
    monkeypatch.delenv(serve_script.KEY_VARIABLE, raising=False)

    def of(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["serve.py", *arguments, "--port", "0"])
        with pytest.raises(SystemExit) as caught:
            serve_script.main()
        assert caught.value.code != 0
        return f"{caught.value} {capsys.readouterr().err}"

    return of


@pytest.mark.parametrize("arguments", REFUSED)
def test_serve_refuses_wrong_arguments(arguments, refusal):
    assert REFUSED[arguments] in refusal("demo", *arguments.split())


def test_serve_names_adapters_that_cannot_share_a_batch(tmp_path, refusal):
    head = save_adapter(tmp_path / "head", 1, modules_to_save=["lm_head"])
    dora = save_adapter(tmp_path / "dora", 1, use_dora=True)
    bias = save_adapter(tmp_path / "bias", 1, lora_bias=True)
    named = {"h": head, "d": dora, "b": bias}
    text = refusal("demo", *(f"--adapter={name}={folder}" for name, folder in named.items()))
    assert "'h': it trains copies of whole matrices (lm_head.weight)" in text
    assert "scripts/merge.py" in text and "'d'" not in text
    assert "one adapter has DoRA magnitudes, and another one lora_bias" in text


def test_serving_needs_a_tokenizer(tmp_path, refusal):
    base, _ = fastlora.load("demo")
    fastlora.lora(base, r=2).save_pretrained_merged(tmp_path / "merged", None)
    assert "has no tokenizer.json" in refusal(str(tmp_path / "merged"))
