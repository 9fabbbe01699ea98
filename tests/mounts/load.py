"""Hosts that write and read while something happens to the mount.

A `Writer` is a thread that remembers what was acknowledged; a `FileWriter` is one that makes files in
a file system, and remembers what was flushed; a `Host` is a process of its own that writes to an area
of its own and reads it again. All can say whether a byte was lost.
"""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

from tests.mounts.mount import DEADLINE_S, assert_same, opened, touched, wait_for


class Writer(threading.Thread):
    """Writes at random places of a file, some whole extents and some odd bytes, until stopped or
    until a write fails.

    `expected`: what the file must hold, as far as it was acknowledged. `doubtful`: the bytes of the
    write that failed, which may have been written or not; None if there is none. `start`: the byte of
    the file at which its area begins; everything else is counted from there.
    """

    def __init__(
        self, path: Path, expected: bytes, seed: object, extent: int, *, start: int = 0
    ) -> None:
        super().__init__(name=f"writer of {path}", daemon=True)
        self.expected = bytearray(expected)
        self.doubtful: range | None = None
        self.doubtful_data = b""
        self.acknowledged = 0
        self.error: OSError | None = None
        self.written: set[int] = set()
        self._path = path
        self._start = start
        self._random = random.Random(str(seed))
        self._extent = extent
        self._stop_it = threading.Event()

    def run(self) -> None:
        try:
            with opened(self._path, os.O_WRONLY) as fd:
                while not self._stop_it.is_set():
                    self._write_once(fd)
        except OSError as error:
            self.error = error

    def _write_once(self, fd: int) -> None:
        offset, data = self._choose()
        self.doubtful, self.doubtful_data = range(offset, offset + len(data)), data
        assert os.pwrite(fd, data, self._start + offset) == len(data)
        self.expected[offset : offset + len(data)] = data
        self.written |= touched(offset, len(data), self._extent)
        self.doubtful = None
        self.acknowledged += 1

    def _choose(self) -> tuple[int, bytes]:
        size, extent = len(self.expected), self._extent
        kind = self._random.randrange(4)
        if kind == 0:  # one or two whole extents
            offset = self._random.randrange(size // extent) * extent
            length = extent * self._random.randint(1, 2)
        elif kind == 1:  # across the border of two
            offset = self._random.randrange(1, size // extent) * extent - self._random.randint(
                1, 999
            )
            length = self._random.randint(1000, 4096)
        else:
            offset = self._random.randrange(size)
            length = self._random.randint(1, 8192)
        return offset, self._random.randbytes(min(length, size - offset))

    def wait_for_more(self, count: int) -> None:
        """Return when that many more writes have been acknowledged."""
        goal = self.acknowledged + count
        wait_for(lambda: self.acknowledged >= goal or self.error, f"for {count} more writes")
        assert self.error is None, self.error

    def stop(self) -> None:
        """Let the write that is under way end, and stop. None may have failed."""
        self._stop_it.set()
        self.join(DEADLINE_S)
        assert not self.is_alive()
        assert self.error is None, self.error

    def failed(self) -> None:
        """The daemon is dead: return when the writer has seen it."""
        self.join(DEADLINE_S)
        assert not self.is_alive()
        assert self.error is not None

    def check(self, actual: bytes, what: str) -> None:
        """`actual` holds what was acknowledged; where the last write failed, either may be there.

        What is found there is what is expected from then on.
        """
        if self.doubtful is not None:
            start, stop = self.doubtful.start, self.doubtful.stop
            old, new = self.expected[start:stop], self.doubtful_data
            found = actual[start:stop]
            assert all(b in pair for b, *pair in zip(found, old, new, strict=True)), (
                f"{what}: bytes {start} to {stop} are neither old nor new"
            )
            self.expected[start:stop] = found
        assert_same(actual, self.expected, what)

    def extents_in_doubt(self) -> set[int]:
        """The extents that the write that failed would have touched."""
        if self.doubtful is None:
            return set()
        return touched(self.doubtful.start, len(self.doubtful), self._extent)


class FileWriter(threading.Thread):
    """Makes files in a directory, and removes old ones, until one of these fails.

    `files`: what was there before, by name. Of what it does itself it remembers what was begun, and
    what a successful fsync has covered; only the latter is promised to anybody.
    """

    MOST = 24  # files

    def __init__(self, where: Path, name: str, seed: object, files: dict[str, bytes]) -> None:
        super().__init__(name=f"writer below {where}", daemon=True)
        self.flushed = dict(files)
        self.begun: dict[str, bytes] = {}
        self.being_removed: set[str] = set()
        self.removed: set[str] = set()
        self.error: OSError | None = None
        self._where = where
        self._name = name
        self._random = random.Random(str(seed))

    def run(self) -> None:
        try:
            while True:
                self._make_a_file()
                if len(self.flushed) > self.MOST:
                    self._remove_a_file()
        except OSError as error:
            self.error = error

    def _make_a_file(self) -> None:
        name = f"{self._name} {len(self.begun)}"
        data = self.begun[name] = self._random.randbytes(self._random.randint(1, 48 << 10))
        with opened(self._where / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            assert os.write(fd, data) == len(data)
            if self._random.random() < 0.6:
                os.fsync(fd)
                self._flush_the_directory()
                self.flushed[name] = data

    def _remove_a_file(self) -> None:
        name = self._random.choice(sorted(self.flushed))
        self.being_removed.add(name)
        (self._where / name).unlink()
        self._flush_the_directory()
        self.being_removed.remove(name)
        self.removed.add(name)
        del self.flushed[name]

    def _flush_the_directory(self) -> None:
        with opened(self._where, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def failed(self) -> None:
        """The disk is gone: return when the writer has seen it."""
        self.join(DEADLINE_S)
        assert not self.is_alive()
        assert self.error is not None

    def check(self, what: str) -> dict[str, bytes]:
        """What was flushed is there, what was removed for good is not, and of the rest there is what
        had come to the disk, and not a byte of anything else. Returns what there is."""
        found = {path.name: path.read_bytes() for path in self._where.iterdir()}
        for name, data in self.flushed.items():
            if name not in self.being_removed or name in found:
                assert name in found, f"{what}: {name} was flushed and is lost"
                assert_same(found[name], data, f"{what}: {name}")
        assert self.removed.isdisjoint(found), f"{what}: what was removed is there again"
        for name in found.keys() - self.flushed.keys():
            data = self.begun[name]  # KeyError: nobody has ever made it
            assert _data_or_zeros(found[name], data), f"{what}: {name} holds what nobody wrote"
        return found


def _data_or_zeros(found: bytes, data: bytes) -> bool:
    """ext4 gives a file its blocks and its size before their data: what did not come to the disk is
    missing at the end, or reads as zeros."""
    sectors = (slice(at, at + 512) for at in range(0, len(found), 512))
    return len(found) <= len(data) and all(
        found[each] == data[: len(found)][each] or not any(found[each]) for each in sectors
    )


_HOST = """
import os, random, sys
path, start, stop, seed, old = sys.argv[1:]
start, stop, rng = int(start), int(stop), random.Random(seed)
fd = os.open(path, os.O_RDWR)
expected = bytearray(open(old, "rb").read()[start:stop])
def check(offset, length):
    found = os.pread(fd, length, start + offset)
    if found != expected[offset : offset + length]:
        sys.exit(f"bytes {start + offset}+{length} are not what was written")
print("ready", flush=True)
sys.stdin.readline()
count = 0
os.set_blocking(0, False)
while sys.stdin.buffer.read(1) is None:
    offset = rng.randrange(stop - start)
    length = min(rng.choice((1, 512, 4096, 10000, 70000)), stop - start - offset)
    check(offset, length)
    data = rng.randbytes(length)
    os.pwrite(fd, data, start + offset)
    expected[offset : offset + length] = data
    check(max(0, offset - 100), min(length + 200, stop - start - max(0, offset - 100)))
    count += 1
check(0, stop - start)
sys.stdout.buffer.write(b"%d\\n" % count + expected)
"""


class Host:
    """A process with an old descriptor of the file, which has bytes [start, stop) for itself.

    From `go` to `end` it reads, writes, and reads again; the first bytes that it expects are those
    of the file `old`.
    """

    def __init__(self, path: Path, start: int, stop: int, seed: object, old: Path) -> None:
        self.start, self.stop = start, stop
        arguments = [str(path), str(start), str(stop), str(seed), str(old)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HOST, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def go(self) -> None:
        """Begin."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def end(self) -> bytes:
        """Stop, and what its area holds now. Fails if it has found a wrong byte."""
        output, complaint = self._process.communicate(timeout=DEADLINE_S)
        assert self._process.returncode == 0, complaint.decode()
        count, _, data = output.partition(b"\n")
        assert int(count) > 0
        assert len(data) == self.stop - self.start
        return data

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


_READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for line in sys.stdin:
    offset, length = map(int, line.split())
    data = os.pread(fd, length, offset)
    sys.stdout.buffer.write(b"%d\\n" % len(data) + data)
    sys.stdout.buffer.flush()
"""


class Reader:
    """A process that has opened a file long ago, and reads when it is told to."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.read(0, 1)

    def read(self, offset: int, length: int) -> bytes:
        """What it reads there now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{offset} {length}\n".encode())
        self._process.stdin.flush()
        return self._process.stdout.read(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
