"""Chat with a model and its adapters in the terminal.

    python scripts/chat.py demo
    python scripts/chat.py meta-llama/Llama-3.2-1B-Instruct --adapter sql=runs/sql

/help lists the commands. Ctrl-C stops a reply, Ctrl-D leaves. Needs `pip install -e '.[chat]'`.
"""

import argparse
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from serving.conversation import Conversation
from serving.models import add_model_arguments, load_served

from fastlora.arguments import number, option, whole_number
from fastlora.generation.sampling import SEED

HELP = {
    "/adapter NAME": "let an adapter write the next replies; without NAME: list them",
    "/base": "let the base write the next replies",
    "/system TEXT": "another system message; without TEXT: none",
    "/seed N": "the same samples every time; without N: random ones",
    "/temperature X": "0 takes the likeliest tokens",
    "/clear": "forget the chat so far",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D",
}


class Terminal:
    """Reads lines, runs commands, prints replies."""

    def __init__(self, chat: Conversation, history: str | None) -> None:
        """`history` is a file for past inputs; None keeps them in memory."""
        self.chat = chat
        self.console = Console(highlight=False)
        words = [text.split()[0] for text in HELP]
        words += [f"/adapter {name}" for name in chat.served.adapter_ids]
        self.session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(history),
            completer=WordCompleter(words, sentence=True),  # of the whole line
            complete_while_typing=False,
            key_bindings=_keys(),
        )
        self.commands: dict[str, Callable[[str], None]] = {
            "/adapter": self.adapter,
            "/base": lambda _: self.adapter(chat.base),
            "/system": self.system,
            "/seed": self.seed,
            "/temperature": self.temperature,
            "/clear": self.clear,
            "/help": self.help,
        }

    def run(self) -> None:
        """Until the user leaves."""
        self.note("/help lists the commands; Alt-Enter begins a new line; Ctrl-D leaves")
        while True:
            try:
                line = self.session.prompt(self._prompt).strip()
            except KeyboardInterrupt:  # Ctrl-C clears the line
                continue
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self.answer(line)
            except KeyboardInterrupt:  # before the first token, or after the last
                self.note("stopped")
            except (ValueError, FloatingPointError) as error:
                self.console.print(f"[red]{escape(str(error))}[/red]")

    def _prompt(self) -> FormattedText:
        return FormattedText([("bold ansigreen", f"{self.chat.name}> ")])

    def answer(self, line: str) -> None:
        """Run a command, or reply to a message."""
        if not line:
            return
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            if word not in self.commands:
                raise ValueError(f"there is no command {word}; /help lists them")
            return self.commands[word](rest.strip())
        with _interrupts() as is_stopped:
            for piece in self.chat.reply(line, is_stopped):
                self.console.print(Text(printable(piece)), end="", soft_wrap=True)
        self.console.print()
        last = self.chat.last
        speed = last.tokens / last.seconds if last.seconds else 0.0
        ends = {"length": "cut at the limit", "stopped": "stopped"}
        extra = f", {ends[last.end]}" if last.end in ends else ""
        if last.dropped:
            extra += f"; the oldest {last.dropped} messages no longer fit and were dropped"
        self.note(f"{last.tokens} tokens, {speed:.1f} a second{extra}")

    def note(self, text: str) -> None:
        """Print something that is not the model's."""
        self.console.print(Text(text, style="bright_black"))

    def adapter(self, name: str) -> None:
        """/adapter and /base."""
        if name:
            self.chat.use(name)
            return self.note(f"{name} writes from here on")
        for known in self.chat.served.adapter_ids:
            kind = " (base)" if known == self.chat.base else ""
            self.note(f"{'*' if known == self.chat.name else ' '} {known}{kind}")

    def system(self, text: str) -> None:
        """/system."""
        self.chat.system = text or None
        self.note(f"system message: {text}" if text else "no system message")

    def seed(self, text: str) -> None:
        """/seed."""
        if text and not (text.isdecimal() and int(text) < 2**64):
            raise ValueError(f"/seed: got {text!r}, expected a whole number in [0, 2**64)")
        self.chat.seed = int(text) if text else None
        self.note(f"seed {text}" if text else "random seeds")

    def temperature(self, text: str) -> None:
        """/temperature."""
        try:
            self.chat.set_temperature(float(text))
        except ValueError:
            raise ValueError(f"/temperature: got {text!r}, expected a number >= 0") from None
        self.note(f"temperature {text}")

    def clear(self, _: str) -> None:
        """/clear."""
        self.chat.clear()
        self.note("the chat is empty")

    def help(self, _: str) -> None:
        """/help."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for command, text in HELP.items():
            table.add_row(escape(command), text)
        self.console.print(table)


def printable(text: str) -> str:
    """Text without control characters: a model may write sequences that a terminal obeys."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C only makes the yielded function return True."""
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def main() -> None:
    given = arguments()
    try:
        served = load_served(given.model, given.adapter, load_in_4bit=given.load_in_4bit)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"chat.py: {error}") from error
    if "default" not in served.tokenizer.chat_templates:
        raise SystemExit(f"chat.py: {given.model} has no chat template, so it cannot chat.")
    chat = Conversation(served, system=given.system, max_new_tokens=given.max_new_tokens)
    chat.seed = given.seed
    try:
        chat.set_temperature(given.temperature)
        Terminal(chat, given.history).run()
    except ValueError as error:
        raise SystemExit(f"chat.py: {error}") from error
    finally:
        chat.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(add)
    add("--system", help="system message")
    add("--max-new-tokens", type=option(int, whole_number(1)), default=512, help="of one reply")
    temperature = option(float, number(low=0))
    add("--temperature", type=temperature, default=0.7, help="0 is greedy")
    add("--seed", type=option(int, SEED), help="seed of the sampling")
    add("--history", metavar="FILE", help="keep past inputs in a file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
