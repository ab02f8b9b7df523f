"""Downloads from a small Hub server that each test starts on 127.0.0.1."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import snapshot_download

import fastlora
from fastlora.checkpoints import tensors
from fastlora.checkpoints.hub import fetch_folder
from fastlora.checkpoints.reading import read_base
from oracles.checkpoints import make_checkpoint

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """As much of the Hub's HTTP as huggingface_hub 2.4 asks for: info, tree, and resolve."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.refusal: dict[str, tuple[int, str]] = {}  # repo -> status, X-Error-Code
        self.cut: set[str] = set()  # files whose next GET breaks off in the middle
        self.down: set[str] = set()  # files answered with 500
        self.down_after_cut = False
        self.log: list[tuple[str, str]] = []  # method, path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Files whose bytes or headers were asked for."""
        return {path.split(f"/resolve/{COMMIT}/")[1] for _, path in self.log if "/resolve/" in path}

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format, *args) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.log.append((self.command, path))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.server.refusal or repo not in self.server.repos:
            status, code = self.server.refusal.get(repo, (404, "RepoNotFound"))
            return self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})
        files = self.server.repos[repo]
        if path.startswith("/api/models"):
            return self._send_json(
                self._info(repo, files) if rest[0] == "revision" else _tree(files)
            )
        return self._send_file("/".join(rest[2:]), files)

    def _info(self, repo: str, files: dict[str, bytes]) -> dict:
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def _send_file(self, name: str, files: dict[str, bytes]) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if name in self.server.down and self.command == "GET":
            return self._send(500, b"", {})
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        cut = None
        if name in self.server.cut and self.command == "GET":
            self.server.cut.remove(name)
            cut = len(data) // 2
            if self.server.down_after_cut:
                self.server.down.add(name)
        return self._send(200, data, headers, cut)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _tree(files: dict[str, bytes]) -> list[dict]:
    return [
        {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
        for n, d in files.items()
    ]


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # huggingface_hub reads HF_ENDPOINT once, at import; its functions also take it as an argument.
    download = partial(snapshot_download, endpoint=server.url)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A typical repository: weights in safetensors and in pickles, and other files."""
    folder = tmp_path_factory.mktemp("repo")
    make_checkpoint("llama2", folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files["tokenizer_config.json"] = b"{}"
    unwanted = ("pytorch_model.bin", "optimizer.pt", "original/consolidated.safetensors", "a.gguf")
    return files | {name: pickle.dumps("boom") for name in unwanted} | {"README.md": b"# tiny"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sharded")
    make_checkpoint("llama2", folder, max_shard_size="20kB")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_only_the_files_needed_are_fetched(hub, files, tmp_path):
    hub.repos["someone/tiny"] = files
    folder = fetch_folder("someone/tiny", cache_dir=tmp_path)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert hub.fetched() == wanted
    assert {p.name for p in folder.iterdir()} == wanted
    assert read_base(folder)[0].hidden_size == 32


def test_every_shard_of_a_repository_is_fetched(hub, files, sharded, tmp_path):
    shards = {n for n in sharded if n.endswith(".safetensors")}
    assert len(shards) > 2
    hub.repos["someone/sharded"] = sharded | {"model-99999-of-99999.safetensors": b"stray"}
    _, base = read_base(fetch_folder("someone/sharded", cache_dir=tmp_path))
    assert {n for n in hub.fetched() if n.startswith("model-")} == shards
    hub.repos["someone/tiny"] = files
    _, single = read_base(fetch_folder("someone/tiny", cache_dir=tmp_path))
    assert torch.equal(base["embed_tokens"], single["embed_tokens"])


def test_a_broken_connection_is_tried_again(hub, files, tmp_path):
    hub.repos["someone/tiny"] = files
    hub.cut.add("model.safetensors")
    read_base(fetch_folder("someone/tiny", cache_dir=tmp_path))
    gets = [path for method, path in hub.log if method == "GET" and path.endswith(".safetensors")]
    assert len(gets) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json"])
def test_an_interrupted_download_is_not_a_folder(hub, files, tmp_path, file):
    hub.repos["someone/tiny"] = files
    hub.cut.add(file)
    hub.down_after_cut = True
    with pytest.raises(ConnectionError, match="someone/tiny"):
        fetch_folder("someone/tiny", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="someone/tiny"):
        fetch_folder("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert not list(tmp_path.rglob("config.json")), (
        "config.json marks a whole folder: it comes last"
    )
    hub.down.clear()
    read_base(fetch_folder("someone/tiny", cache_dir=tmp_path))
    read_base(fetch_folder("someone/tiny", cache_dir=tmp_path, local_files_only=True))


def test_with_a_missing_shard_no_config_json_is_stored(hub, sharded, tmp_path):
    gone = max(n for n in sharded if n.startswith("model-"))
    hub.repos["someone/sharded"] = sharded
    hub.cut.add(gone)
    hub.down_after_cut = True
    with pytest.raises(ConnectionError, match="someone/sharded"):
        fetch_folder("someone/sharded", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("config.json"))


def test_a_missing_repository_is_named(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*no repository.*token"):
        fetch_folder("nobody/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize("status", [401, 403])
def test_the_error_of_a_gated_repository_says_how_to_get_access(hub, files, tmp_path, status):
    hub.repos["meta/gated"] = files
    hub.refusal["meta/gated"] = (status, "GatedRepo")
    with pytest.raises(PermissionError, match=r"meta/gated.*huggingface.co/meta/gated.*token"):
        fetch_folder("meta/gated", cache_dir=tmp_path)


def test_a_repository_without_a_config_is_refused(hub, files, tmp_path):
    hub.repos["someone/gguf"] = {"a.gguf": b"", "model.safetensors": files["model.safetensors"]}
    with pytest.raises(FileNotFoundError, match=r"someone/gguf.*config.json"):
        fetch_folder("someone/gguf", cache_dir=tmp_path)


def test_an_index_that_leads_out_of_the_folder_fetches_nothing(hub, files, tmp_path):
    index = json.dumps({"weight_map": {"a": "../../evil.safetensors"}}).encode()
    wanted = {"config.json": files["config.json"], tensors.INDEX: index}
    hub.repos["someone/evil"] = wanted
    with pytest.raises(tensors.CheckpointError, match="evil"):
        fetch_folder("someone/evil", cache_dir=tmp_path)


def test_the_cache_serves_without_a_network(hub, files, tmp_path):
    hub.repos["someone/tiny"] = files
    online = fetch_folder("someone/tiny", cache_dir=tmp_path)
    hub.log.clear()
    assert fetch_folder("someone/tiny", cache_dir=tmp_path, local_files_only=True) == online
    assert not hub.log
    read_base(online)


def test_an_empty_cache_without_a_network_is_reported(hub, tmp_path):
    missing = r"there is no folder 'someone/tiny' here .*Hub id: it is not complete in the cache"
    with pytest.raises(FileNotFoundError, match=missing):
        fetch_folder("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert not hub.log


def test_an_unreachable_hub_is_reported(hub, tmp_path, monkeypatch):
    download = partial(
        snapshot_download, endpoint="http://127.0.0.1:9"
    )  # no server listens on port 9 (discard)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"someone/tiny.*not reached"):
        fetch_folder("someone/tiny", cache_dir=tmp_path)


def test_load_downloads_a_hub_id_from_hf_endpoint(hub, files, tmp_path):
    hub.repos["someone/tiny"] = files
    code = (
        "from fastlora.loading import load; model, tokenizer = load('someone/tiny', device='cpu');"
        "assert tokenizer is None and model.spec.name_or_path == 'someone/tiny', model.spec"
    )
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = keep | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    env["PYTHONPATH"] = str(Path(tensors.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pytorch_model.bin" not in hub.fetched()


@pytest.mark.parametrize("name", ["./x", "/nowhere/x", "a/b/c", "~/x", "..", "a\\b"])
def test_a_missing_path_is_not_taken_for_a_hub_id(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "..":
        assert fetch_folder(name) == Path(name)
    else:
        with pytest.raises(FileNotFoundError, match="no such folder"):
            fetch_folder(name)
    assert not hub.log


def test_a_path_object_is_always_a_folder(hub, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "someone/tiny"):
        with pytest.raises(FileNotFoundError, match=f"no such folder: './{name}'"):
            fastlora.load(Path(name), device="cpu")
    assert not hub.log
    (tmp_path / "demo").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "demo" / name).write_bytes(files[name])
    model, _ = fastlora.load(Path("./demo"), device="cpu")
    assert model.spec.name_or_path == "./demo"
    assert model.spec.config.hidden_size != fastlora.load("demo")[0].spec.config.hidden_size


@pytest.mark.parametrize("name", ["a--b", "bad name", "a/..b"])
def test_an_invalid_name_is_refused(hub, name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder|no such folder|is a file"):
        fetch_folder(name, cache_dir=tmp_path)
