"""Scripts refuse wrong arguments in one line, before a model is loaded."""

import socket
import sys
from importlib import import_module

import pytest

import fastlora

WRONG = [
    ("serve", "demo --port 70000", "--port: got '70000', expected a whole number in [0, 65,536)"),
    ("serve", "demo --port -1", "--port: got '-1'"),
    ("serve", "demo --slots 0", "--slots: got '0', expected a whole number >= 1"),
    ("serve", "demo --slots -3", "--slots: got '-3'"),
    ("watch", "run --port 80000", "--port: got '80000'"),
    ("watch", "run --every nan", "--every: got 'nan', expected a number in (0, 86400]"),
    ("chat", "demo --max-new-tokens 0", "--max-new-tokens: got '0'"),
    ("chat", "demo --seed -1", "--seed: got '-1', expected a whole number in [0, 2**64)"),
    ("chat", "demo --temperature nan", "--temperature: got 'nan'"),
    ("generate", "hello --top-p 2", "--top-p: got '2'"),
    ("generate", "hello --model ./none", "error: model_name='./none'"),
    ("show_batch", "--seed -1", "--seed: got '-1'"),
    ("show_batch", "--sequences 0", "--sequences: got '0'"),
    ("show_batch", "none.jsonl", "error: data: none.jsonl: no such file"),
    ("grpo", "--warmup-steps -1", "--warmup-steps: got '-1'"),
    ("merge", "./none merged", "error: model_name='./none'"),
    ("export", "./none out --format peft", "error: model_name='./none'"),
]


def run(script, arguments, monkeypatch, capsys):
    """What the script prints before it exits with an error."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        import_module(script).main()
    assert caught.value.code not in (0, None)
    return f"{caught.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG)
def test_a_wrong_argument_is_named(script, arguments, message, monkeypatch, capsys):
    if "none" not in arguments:
        monkeypatch.setattr(fastlora, "load", None)
    assert message in run(script, arguments, monkeypatch, capsys)


def test_a_port_in_use_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("watch.page", lambda *_: ("", False))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        printed = run("watch", f"{tmp_path} --port {port}", monkeypatch, capsys)
    assert f"error: cannot listen on port {port}: Address already in use" in printed
