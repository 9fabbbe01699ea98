"""What clonefs is compared with: qemu-storage-daemon, as a user would run it.

Its images are opened with cache.direct=off, so that it works from the page cache as clonefs does, and
aio=io_uring, which is faster than its default, aio=threads. A FUSE export of version 7.2 that is
writable claims the right to change the size of what it exports, and block-stream refuses to run beside
that: so under block-stream reads go through a FUSE export that is not writable, and writes through NBD,
in which the kernel's FUSE has no part.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.stage import run, running, wait_for


def file_node(name: str, path: Path, *more: str, aio: str = "io_uring") -> tuple[str, str]:
    """The arguments that open a file."""
    return "--blockdev", ",".join(
        ("driver=file", f"node-name={name}", f"filename={path}", f"aio={aio}", *more)
    )


@contextlib.contextmanager
def exported(work: Path, image: Path, aio: str) -> Iterator[tuple[Path, int]]:
    """The FUSE export of a raw image; its path, and the daemon's process id."""
    export = work / f"export-{aio}"
    export.touch()
    with running(
        work,
        "qemu-storage-daemon",
        *file_node("file", image, aio=aio),
        "--export",
        f"type=fuse,id=fuse,node-name=file,mountpoint={export},writable=on,growable=off",
    ) as daemon:
        wait_for(lambda: export.stat().st_size > 0, "qemu-storage-daemon")
        allow_background(export)
        yield export, daemon.pid


def allow_background(export: Path) -> None:
    """As many requests under way as clonefs allows itself, where the kernel lets us say so."""
    connection = Path(f"/sys/fs/fuse/connections/{os.minor(export.stat().st_dev)}")
    with contextlib.suppress(OSError):
        (connection / "max_background").write_text("64")
        (connection / "congestion_threshold").write_text("48")


class Overlay:
    """A qcow2 overlay in a running qemu-storage-daemon."""

    def __init__(self, work: Path, where: Path | str) -> None:
        self.where = where
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(work / "qmp"))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self._order("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def stream(self) -> None:
        """Begin to copy what it does not have yet."""
        self._order("block-stream", {"job-id": "stream", "device": "overlay"})

    def streaming(self) -> bool:
        """Whether it still copies. Raises AssertionError if that has failed."""
        jobs = self._order("query-block-jobs")
        assert all(job["io-status"] == "ok" for job in jobs), jobs
        return bool(jobs)

    def _order(self, verb: str, arguments: dict[str, str] | None = None) -> Any:
        self._file.write(json.dumps({"execute": verb, "arguments": arguments or {}}) + "\n")
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline())):
            pass
        if "error" in answer:
            raise AssertionError(f"{verb}: {answer['error']['desc']}")
        return answer["return"]


@contextlib.contextmanager
def overlay(work: Path, base: Path, *, writable: bool) -> Iterator[Overlay]:
    """A new, empty qcow2 overlay on a raw image, exported through FUSE, or writable through NBD."""
    image, export, nbd = work / "overlay.qcow2", work / "overlay", work / "nbd"
    image.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(image))
    export.touch()
    by_fuse = ("--export", f"type=fuse,id=fuse,node-name=overlay,mountpoint={export},writable=off")
    by_nbd = (
        *("--nbd-server", f"addr.type=unix,addr.path={nbd}"),
        *("--export", "type=nbd,id=nbd,node-name=overlay,name=lu,writable=on"),
    )
    command = (
        *("qemu-storage-daemon", "--chardev", f"socket,id=qmp,path={work}/qmp,server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
        *file_node("base", base, "read-only=on"),
        *file_node("file", image),
        *("--blockdev", "driver=qcow2,node-name=overlay,file=file,backing=base"),
        *(by_nbd if writable else by_fuse),
    )
    try:
        with running(work, *command):
            wait_for(nbd.exists if writable else lambda: export.stat().st_size > 0, "the overlay")
            if not writable:
                allow_background(export)
            answers = Overlay(work, f"nbd+unix:///lu?socket={nbd}" if writable else export)
            try:
                yield answers
            finally:
                answers.close()
    finally:
        for left in (nbd, work / "qmp", image):
            left.unlink(missing_ok=True)
