"""scripts/chat.py in a pseudo-terminal."""

import os
import pty
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pexpect.fdpexpect

from oracles.serving_process import forks

ROOT = Path(__file__).parents[2]
# pexpect's terminal does not answer questions about the cursor's position.
TERMINAL = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
ROWS, COLUMNS = 40, 200


@contextmanager
def run_script(*arguments: str) -> Iterator[pexpect.spawn]:
    """`python scripts/chat.py ...`, as users run it."""
    environment = {**os.environ, **TERMINAL, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = pexpect.spawn(
        sys.executable,
        [str(ROOT / "scripts/chat.py"), *arguments],
        env=environment,
        encoding="utf-8",
        timeout=30,
        dimensions=(ROWS, COLUMNS),
    )
    try:
        yield child
    finally:
        child.close(force=True)


class Fork(pexpect.fdpexpect.fdspawn):
    """The main function of chat.py in a process that has imported it already."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        outer, self._inner = pty.openpty()
        termios.tcsetwinsize(self._inner, (ROWS, COLUMNS))
        super().__init__(outer, encoding="utf-8", timeout=30)
        self.process = forks().Process(target=_main, args=(os.ttyname(self._inner), arguments))
        self.process.start()

    def end(self) -> None:
        """End the process and close the terminal."""
        self.process.kill()
        self.process.join()
        os.close(self._inner)
        self.close()


@contextmanager
def run_fork(*arguments: str) -> Iterator[Fork]:
    """A chat with these arguments."""
    child = Fork(arguments)
    try:
        yield child
    finally:
        child.end()


def _main(terminal: str, arguments: tuple[str, ...]) -> None:
    assert "chat" in sys.modules, "the script was not imported before the fork"
    import chat

    os.setsid()
    opened = os.open(terminal, os.O_RDWR)  # the new session's terminal
    for number in range(3):
        os.dup2(opened, number)
    # multiprocessing has given the process another stdin.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    os.environ.update(TERMINAL)
    sys.argv = ["chat.py", *arguments]
    chat.main()
