"""A file system that passes the files of one directory through, and fails on demand.

    python faulty_fs.py DIRECTORY MOUNTPOINT

A process of its own, so that it goes on when a daemon under test is killed, and the other way
round. It is told what to do on standard input, a JSON object a line, and answers each with one on
standard output; it unmounts when its standard input ends. `tests/mounts/faulty.py` talks to it.

Files are opened with direct I/O, so that each request of a daemon comes here and none is answered
from the page cache; those whose names begin with `mapped` are not, and can be mapped shared.
"""

import errno
import functools
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from pyfuse3 import FUSEError, InodeT


@dataclass(eq=False)
class Fault:
    """What is to happen to requests of one kind that touch bytes [first, stop) of one file. `number`
    is an errno, or 0: the request hangs until the fault is mended, or for `delay` seconds if that is
    given. `left`: for how many requests, None for all."""

    file: str
    request: str
    number: int
    first: int
    stop: int
    left: int | None
    delay: float | None = None
    hits: int = 0
    hanging: int = 0
    mended: trio.Event = field(default_factory=trio.Event)

    def meets(self, file: str, request: str, offset: int, length: int) -> bool:
        return (
            self.left != 0
            and (self.file, self.request) == (file, request)
            and self.first < max(offset + length, offset + 1)
            and offset < self.stop
        )


class FaultyFs(pyfuse3.Operations):
    """One directory without directories in it. The inode of a file is its name's for ever."""

    enable_writeback_cache = False

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._names: dict[int, str] = {pyfuse3.ROOT_INODE: "."}
        self._inodes = {".": int(pyfuse3.ROOT_INODE)}
        self._open: dict[int, str] = {}
        self._faults: dict[int, Fault] = {}
        self._numbers = itertools.count(1)

    # What the test says

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do what a line of standard input says; the answer."""
        verb = order.pop("verb")
        if verb == "fault":
            number = next(self._numbers)
            self._faults[number] = Fault(**order)
            return {"fault": number}
        if verb == "look":
            fault = self._faults[order["fault"]]
            return {"hits": fault.hits, "hanging": fault.hanging}
        assert verb == "mend"
        chosen = [order["fault"]] if "fault" in order else list(self._faults)
        for number in chosen:
            self._faults[number].left = 0
            self._faults[number].mended.set()
        return {}

    async def _meet(self, request: str, file: str, offset: int = 0, length: int = 0) -> None:
        """Fail or hang, if that is what is to happen to this request."""
        for fault in list(self._faults.values()):
            if not fault.meets(file, request, offset, length):
                continue
            fault.hits += 1
            if fault.left is not None:
                fault.left -= 1
            if fault.number:
                raise FUSEError(fault.number)
            fault.hanging += 1
            with trio.move_on_after(math.inf if fault.delay is None else fault.delay):
                await fault.mended.wait()
            fault.hanging -= 1

    # Files

    def _path(self, name: str) -> Path:
        return self._directory / name

    def _attributes(self, name: str) -> pyfuse3.EntryAttributes:
        try:
            found = self._path(name).lstat()
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        inode = self._inodes.setdefault(name, pyfuse3.ROOT_INODE + len(self._inodes))
        self._names[inode] = name
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = InodeT(inode)
        for each in ("mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"):
            setattr(entry, f"st_{each}", getattr(found, f"st_{each}"))
        # A file that changes makes the kernel drop its pages, those that are mapped too: no disk does.
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = 0
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        return self._attributes(os.fsdecode(name))

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._attributes(self._names[inode])

    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: object
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.truncate(self._path(self._names[inode]), attr.st_size)
        return self._attributes(self._names[inode])

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start: int, token: Any) -> None:
        for at, name in enumerate(sorted(path.name for path in self._directory.iterdir()), 1):
            if at > start and not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._attributes(name), at
            ):
                break

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return await self._opened(self._names[inode], flags & ~os.O_EXCL)

    async def _opened(self, name: str, flags: int) -> pyfuse3.FileInfo:
        await self._meet("open", name)
        # The page cache writes through descriptors of others, and reads what it writes in part.
        flags = (flags & ~(os.O_ACCMODE | os.O_APPEND)) | os.O_RDWR
        fd = os.open(self._path(name), flags, 0o600)
        self._open[fd] = name
        mapped = name.startswith("mapped")
        return pyfuse3.FileInfo(fh=fd, direct_io=not mapped, keep_cache=mapped)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        opened = await self._opened(os.fsdecode(name), flags | os.O_CREAT)
        return opened, self._attributes(os.fsdecode(name))

    async def unlink(self, parent: int, name: bytes, ctx: object) -> None:
        self._path(os.fsdecode(name)).unlink()

    async def read(self, fh: int, offset: int, length: int) -> bytes:
        await self._meet("read", self._open[fh], offset, length)
        return os.pread(fh, length, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        await self._meet("write", self._open[fh], offset, len(data))
        return os.pwrite(fh, data, offset)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._meet("fsync", self._open[fh])

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        del self._open[fh]
        os.close(fh)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        found = os.statvfs(self._directory)
        for each in ("bsize", "frsize", "blocks", "bfree", "bavail", "namemax"):
            setattr(data, f"f_{each}", getattr(found, f"f_{each}"))
        data.f_files = data.f_ffree = data.f_favail = 1000
        return data


async def _obey(file_system: FaultyFs) -> None:
    """Lines of standard input, until it ends."""
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as orders:
        async for chunk in orders:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                print(json.dumps(file_system.obey(json.loads(line))), flush=True)
    file_system.obey({"verb": "mend"})
    pyfuse3.terminate()


async def _serve(file_system: FaultyFs) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, file_system)
        await pyfuse3.main(max_tasks=1000)
        nursery.cancel_scope.cancel()


def main(directory: str, mountpoint: str) -> None:
    """Mount, and serve until standard input ends."""
    file_system = FaultyFs(Path(directory))
    pyfuse3.init(file_system, mountpoint, {"fsname=faulty", "subtype=faulty"})
    print("{}", flush=True)  # mounted
    try:
        trio.run(functools.partial(_serve, file_system))
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
