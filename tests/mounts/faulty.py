"""A device that fails when it is told to: a handle for `tests/mounts/faulty_fs.py`.

What lies below `path` can be made to fail or to hang, by file, kind of request and bytes; the same
files lie below `behind`, where they never fail. A test sees what is on the device there.
"""

import contextlib
import errno
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mounts.mount import DEADLINE_S, mounts_below, run, wait_for

_EVERYTHING = 1 << 62


@dataclass(frozen=True)
class Fault:
    """Something that is the matter with a device, until it is mended."""

    device: "FaultyDevice"
    number: int

    @property
    def hits(self) -> int:
        """How many requests have met it."""
        return int(self.device.tell(verb="look", fault=self.number)["hits"])

    @property
    def hanging(self) -> int:
        """How many requests hang now."""
        return int(self.device.tell(verb="look", fault=self.number)["hanging"])

    def wait_for_a_hit(self) -> None:
        """Return once a request has met it."""
        wait_for(lambda: self.hits, "for the fault to be met")

    def wait_for_a_hang(self, count: int = 1) -> None:
        """Return once as many requests hang."""
        wait_for(lambda: self.hanging >= count, f"for {count} requests to hang")

    def mend(self) -> None:
        """It fails no more, and what hangs goes on."""
        self.device.tell(verb="mend", fault=self.number)


class FaultyDevice:
    """The file system, mounted in `work`."""

    def __init__(self, work: Path) -> None:
        self.behind = work / "behind"
        self.path = work / "device"
        self.behind.mkdir(parents=True)
        self.path.mkdir()
        self._telling = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("faulty_fs.py"), self.behind, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the test, which then puts it away
        )
        self._answer()

    def tell(self, **order: Any) -> dict[str, Any]:
        """Give an order; the answer."""
        with self._telling:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def fail(
        self,
        file: Path,
        request: str,
        number: int = errno.EIO,
        *,
        first: int = 0,
        stop: int = _EVERYTHING,
        times: int | None = None,
        delay: float | None = None,
    ) -> Fault:
        """From now on each `request` (open, read, write, fsync) that touches bytes [first, stop) of
        `file` fails with this errno; with `times` so many of them."""
        assert file.parent in (self.path, self.behind)
        answer = self.tell(
            verb="fault",
            file=file.name,
            request=request,
            number=number,
            first=first,
            stop=stop,
            left=times,
            delay=delay,
        )
        return Fault(self, answer["fault"])

    def hang(self, file: Path, request: str, *, first: int = 0, stop: int = _EVERYTHING) -> Fault:
        """The same, but it hangs until it is mended."""
        return self.fail(file, request, 0, first=first, stop=stop)

    def slow_down(self, file: Path, request: str, delay: float) -> Fault:
        """The same, but it goes on by itself after `delay` seconds."""
        return self.fail(file, request, 0, delay=delay)

    def mend(self) -> None:
        """Nothing fails or hangs any more."""
        with contextlib.suppress(BrokenPipeError):  # it has vanished
            self.tell(verb="mend")

    def vanish(self) -> None:
        """The device is gone for good, and its requests fail, those that hang too."""
        self._process.kill()
        self._process.wait()
        run("umount", "--lazy", self.path)

    def close(self) -> None:
        """Put it away."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            for place in mounts_below(self.path):
                run("umount", "--lazy", place)


@contextlib.contextmanager
def faulty_device(work: Path) -> Iterator[FaultyDevice]:
    """A device that is put away at the end, with all that is on it."""
    device = FaultyDevice(work)
    try:
        yield device
    finally:
        device.close()
        run("rm", "-r", "--one-file-system", work)
