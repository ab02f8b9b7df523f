"""scripts/export.py: the demo in every format, up to a running llama.cpp server."""

import re
import subprocess
import sys
from pathlib import Path

import export
import generate
import grpo
import merge
import pytest
import show_batch
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.formats.gguf.verify import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A folder with a random adapter of the demo."""
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    model = fastlora.lora(model, r=4)
    noise = torch.Generator().manual_seed(0)
    random = lambda x: 0.2 * torch.randn(x.shape, generator=noise)
    folder = tmp_path_factory.mktemp("adapter")
    model.with_adapter(tree_map(random, model.adapter)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export.main()
    return capsys.readouterr().out


GGUF = ("--format", "gguf", "--pre", "gpt-2", "--dtype", "f32", "--load-dtype", "float32")


def test_the_demo_answers_in_a_llama_cpp_server(adapter, tmp_path, monkeypatch, capsys):
    """A chat's reply is fastlora's, with and without the adapter file."""
    out = run(monkeypatch, capsys, "demo", tmp_path / "base.gguf", *GGUF, "--verify")
    assert "72 of 72 greedy ids equal" in out and "3 of 3 texts tokenised alike" in out
    file = tmp_path / "adapter.gguf"
    out = run(
        monkeypatch, capsys, adapter, file, "--format", "gguf-adapter", "--load-dtype", "float32"
    )
    assert f"wrote {file}" in out
    chat = [{"role": "user", "content": "What does len([1, 2, 3]) return?"}]
    replies = {}
    for name, lora in (("demo", None), (str(adapter), file)):
        model, tokenizer = fastlora.load(name, dtype="float32", device="cpu")
        expected = model.generate_text(tokenizer, chat, max_new_tokens=20)
        with Engine(tmp_path / "base.gguf", lora) as server:
            assert server.address.startswith("http://127.0.0.1:")
            body = {"messages": chat, "max_tokens": 20, "temperature": 0}
            reply = server.post("/v1/chat/completions", body)
        replies[name] = reply["choices"][0]["message"]["content"]
        assert replies[name].strip() == expected.strip()
    assert len(set(replies.values())) == 2


FILES = {
    "peft": {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"},
    "merged": {"config.json", "model.safetensors", "tokenizer.json"},
    "merged-4bit": {"config.json", "model.safetensors", "tokenizer.json"},
    "ollama": {"Modelfile", "model.gguf", "adapter.gguf"},
    "mlx": {"adapter_config.json", "adapters.safetensors"},
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_writes_its_files(name, adapter, tmp_path, monkeypatch, capsys):
    pre = ("--pre", "gpt-2") if name == "ollama" else ()
    out = run(monkeypatch, capsys, adapter, tmp_path / "out", "--format", name, *pre)
    assert f"({name})" in out
    assert FILES[name] <= {p.name for p in (tmp_path / "out").iterdir()}


def test_a_k_quant_prints_the_next_command(tmp_path, monkeypatch, capsys):
    words = ("--format", "gguf", "--pre", "gpt-2", "--dtype", "q4_k_m")
    out = run(monkeypatch, capsys, "demo", tmp_path / "m.gguf", *words)
    assert f"next: llama-quantize {tmp_path / 'm-bf16.gguf'} {tmp_path / 'm.gguf'} Q4_K_M" in out


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("merged", ("--dtype", "q8_0")),
        ("ollama", ("--verify",)),
        ("mlx", ("--pre", "gpt-2")),
        ("gguf", ("--base", "original")),
    ],
)
def test_an_option_of_another_format_is_an_error(name, option, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "demo", tmp_path / "out", "--format", name, *option)
    assert f"{option[0]} has no effect with --format {name}" in capsys.readouterr().err


def test_a_pre_tokenizer_without_a_name_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, "demo", tmp_path / "m.gguf", "--format", "gguf")
    assert "no name for this pre-tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (export, ("./adaptor", "out", "--format", "peft")),
        (merge, ("./adaptor", "out")),
        (generate, ("a", "--model", "./adaptor")),
        (grpo, ("--model", "./adaptor")),
        (show_batch, ("--model", "./adaptor")),
    ],
)
def test_a_missing_folder_ends_every_script_without_a_traceback(
    script, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert re.match("error: .*no such folder", capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


def test_it_runs_as_a_script():
    command = [sys.executable, "scripts/export.py", "--help"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and "gguf-adapter" in found.stdout
