"""A terminal for one command: of a given size, with keys that can be pressed, and what is drawn."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

DEADLINE_S = 60.0
CLONEFS = (sys.executable, "-m", "clonefs")


class Terminal:
    """A command that runs on a pseudo-terminal, which is its controlling one: Ctrl-C reaches it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", master: int, before: list[object]
    ) -> None:
        self.process = process
        self.before = before
        """How it treated keys before the command ran."""
        self.drawn = ""
        self._master = master

    @property
    def text(self) -> str:
        """What was drawn so far, without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.drawn).replace("\r\n", "\n")

    def wait_for(self, text: str, *, after: int = 0) -> None:
        """Return once this is drawn, in what comes behind the first `after` characters."""
        self.wait_until(lambda: text in self.text[after:], repr(text), look_again_s=1.0)

    def wait_until(
        self, look: Callable[[], object], what: str = "it", *, look_again_s: float = 0.02
    ) -> None:
        """Return once `look` is true; what is drawn meanwhile is read."""
        deadline = time.monotonic() + DEADLINE_S
        while not look():
            assert time.monotonic() < deadline, f"{what} never comes: {self.text!r}"
            assert self._read(look_again_s) or self.process.poll() is None, f"ended: {self.text!r}"

    def press(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Give the window another size."""
        set_size(self._master, columns, lines)

    def settings(self) -> list[object]:
        """How the terminal treats keys."""
        return list(termios.tcgetattr(self._master))

    def end(self) -> int:
        """The exit status, once the command has ended and all is read."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            self._read(0.05)
            assert time.monotonic() < deadline, f"it does not end: {self.text!r}"
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        self.drawn += os.read(self._master, 1 << 16).decode(errors="replace")
        return True


def set_size(master: int, columns: int, lines: int) -> None:
    """The size of the window of a pseudo-terminal."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@contextlib.contextmanager
def on_terminal(
    *words: str | Path,
    columns: int = 120,
    lines: int = 40,
    program: Sequence[str] = CLONEFS,
    environment: dict[str, str] | None = None,
) -> Iterator[Terminal]:
    """`clonefs` with these arguments on a terminal; ended with the block, if it has not."""
    master, slave = pty.openpty()
    set_size(master, columns, lines)
    before = list(termios.tcgetattr(master))
    kept = {
        k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")
    }
    process = subprocess.Popen(
        ["setsid", "--ctty", *program, *map(str, words)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=kept | {"TERM": "xterm-256color", "PYTHONUTF8": "1"} | (environment or {}),
    )
    terminal = Terminal(process, master, before)
    try:
        yield terminal
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(slave)
        os.close(master)


def drawn_by(
    *words: str | Path, columns: int = 120, environment: dict[str, str] | None = None
) -> Terminal:
    """What a command draws that ends by itself, successfully."""
    with on_terminal(*words, columns=columns, environment=environment) as terminal:
        if terminal.end() != 0:
            pytest.fail(terminal.text)
        return terminal
