"""scripts/chat.py in a pseudo-terminal."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pexpect
import pytest
from chat import printable

import fastlora
from oracles.chat_terminal import run_fork, run_script

PROMPT = "def walk(top):"
CTRL_C, TAB = "\x03", "\t"
NOTE = r"\d+ tokens, [\d.]+ a second"


@pytest.fixture
def start(adapter_folders) -> Iterator[Callable[..., Any]]:
    """start(arguments, run=run_fork): a chat that waits for input."""
    adapters = [f"--adapter={name}={folder}" for name, folder in adapter_folders.items()]
    with ExitStack() as running:

        def of(*arguments: str, run: Callable[..., Any] = run_fork) -> Any:
            child = running.enter_context(run("demo", *adapters, *arguments))
            child.expect("demo>")
            return child

        yield of


def plain(text: str) -> str:
    """Without escape sequences and with one kind of white space."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", text)
    return " ".join(text.split())


def say(child: Any, line: str, expected: str) -> str:
    """Send a line; the text up to what is expected."""
    child.send(line + "\r")
    child.expect(expected)
    return plain(child.before)


def paste(text: str) -> str:
    """A long text as terminals send it when it is pasted: drawn once, not after every key."""
    return f"\x1b[200~{text}\x1b[201~"


def expected_reply(folder: Path | None, messages: list[dict[str, str]], tokens: int) -> str:
    base, tokenizer = fastlora.load("demo", dtype="float32")
    model = base if folder is None else fastlora.load_adapter(base, folder)
    return model.generate_text(tokenizer, messages, max_new_tokens=tokens)


def test_base_and_adapter_reply_and_the_chat_remembers(start, adapter_folders):
    child = start("--temperature", "0", "--max-new-tokens", "12", run=run_script)
    messages = [{"role": "user", "content": PROMPT}]
    first = expected_reply(None, messages, 12)
    assert plain(first) in say(child, PROMPT, NOTE)
    child.expect("demo>")
    say(child, "/adapter one", "one writes from here on")
    child.expect("one>")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = expected_reply(adapter_folders["one"], messages, 12)
    assert plain(second) in say(child, "Why?", NOTE)
    say(child, "/base", "demo writes from here on")
    say(child, "/clear", "the chat is empty")
    child.expect("demo>")
    assert plain(first) in say(child, PROMPT, NOTE)
    child.expect("demo>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_ctrl_c_stops_a_reply_and_the_chat_goes_on(start):
    child = start("--temperature", "2", "--seed", "3", "--max-new-tokens", "450")
    child.send(PROMPT + "\r")
    child.expect(r"(?s)top\):.{500}")  # more than the echo of the input
    child.send(CTRL_C)
    child.expect("stopped", timeout=10)
    child.expect("demo>")
    child.send(f"not sent{CTRL_C}")  # at the prompt it clears the line
    say(child, "/seed", "random seeds")


def test_commands_and_their_errors(start):
    child = start("--system", "Be brief.", "--max-new-tokens", "16")
    say(child, "/help", "the same samples every time")
    say(child, "/adapter", r"\* demo \(base\)")
    say(child, "/adapter three", "there is no 'three'; loaded: demo, one, two")
    say(child, "/seed x", "expected a whole number")
    say(child, "/temperature -1", "got '-1', expected a number >= 0")
    say(child, "/temperature hot", "got 'hot', expected a number >= 0")
    say(child, "/nothing", "there is no command /nothing")
    say(child, "/system Answer in French.", "system message: Answer in French.")
    say(child, "/seed 5", "seed 5")
    first = say(child, PROMPT, NOTE)
    say(child, "/clear", "the chat is empty")
    assert say(child, PROMPT, NOTE)[-20:] == first[-20:]  # the same seed, the same sample
    say(child, paste("x " * 600), "the message makes")
    child.send("/quit\r")
    child.process.join(10)
    assert child.process.exitcode == 0


def test_tab_completes_commands_and_names(start):
    child = start()
    for typed, rest, expected in (
        ("/adapter o", "ne", "one writes from here on"),
        ("/ba", "se", "demo writes from here on"),
    ):
        child.send(typed + TAB)
        child.expect(rest)
        say(child, "", expected)
        child.expect(">")


def test_a_long_chat_drops_its_oldest_messages(start):
    child = start("--temperature", "0", "--max-new-tokens", "8")
    for _ in range(2):
        say(child, paste("def f(x): " * 40), NOTE)
        child.expect("demo>")
    say(child, paste("def f(x): " * 40), "the oldest 2 messages no longer fit")


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\x07b\x9bc\n\td é") == "a[2Jbc\n\td é"
