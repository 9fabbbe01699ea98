"""A mount from beginning to end.

It opens the volume, recovers, mounts, serves until somebody unmounts or a signal comes, and then
brings everything to disk. Nothing is left to later: when `serve` returns, the volume is closed.
"""

import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pyfuse3
import trio

from clonefs.engines import ReadOnlySystem, Recorder, StorageSystem
from clonefs.errors import ClonefsError, busy, failed
from clonefs.fuse.complaints import Complaints
from clonefs.fuse.control import Control
from clonefs.fuse.operations import Operations
from clonefs.fuse.options import MountOptions, parse_options
from clonefs.fuse.render import timestamp
from clonefs.fuse.session import Session
from clonefs.fuse.tree import SOURCE, Tree
from clonefs.fuse.watch import Watch
from clonefs.logs import set_level
from clonefs.units import LogicalUnit, file_under, open_backing
from clonefs.volume import MetadataVolume, open_volume

log = logging.getLogger(__name__)


def serve(meta: Path, mountpoint: Path, options: str, on_ready: Callable[[], None]) -> None:
    """Mount the volume `meta` on `mountpoint` and serve it until it is unmounted, or SIGTERM or
    SIGINT comes. `on_ready` is called once the tree is there. Blocks.

    Raises ClonefsError for whatever keeps it from mounting, or from closing cleanly.
    """
    parsed = parse_options(options, uid=os.getuid(), gid=os.getgid())
    set_level(parsed.log)
    volume = open_volume(meta.absolute(), read_only=parsed.read_only)
    daemon = Daemon(volume, mountpoint.absolute(), parsed, on_ready)
    try:
        trio.run(daemon.run)
    except BaseExceptionGroup as group:
        raise _the_reason(group) from group


def _the_reason(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first refusal or failure in `group` that is meant for people; else the group itself."""
    found: BaseException | None = group.subgroup(ClonefsError)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found or group


class Daemon:
    """One mount of one volume."""

    def __init__(
        self,
        volume: MetadataVolume,
        mountpoint: Path,
        options: MountOptions,
        on_ready: Callable[[], None],
    ) -> None:
        self._mountpoint = mountpoint
        self._options = options
        self._on_ready = on_ready
        self._device: int | None = None
        self._stale: set[tuple[str, str]] = set()
        self._stale_event = trio.Event()
        self._complaints = Complaints()
        kind = ReadOnlySystem if volume.read_only else StorageSystem
        self._system = kind(
            Recorder(volume),
            self._open_unit,
            forget_pages=self._forget_pages,
            wall_clock=time.time,
            on_event=self._event,
            on_change=self._changed,
            on_error=self._complaints.complain,
        )
        self._session = Session()
        self._watch = Watch()
        self._control = Control(self._system, self._in_use, str(mountpoint))
        self._tree = Tree(self._system, self._control, options, time.time_ns())
        self._operations = Operations(
            self._tree, self._control, options, self._opened_with_truncation, self._watch
        )

    async def run(self) -> None:
        """Serve, and close whatever happens."""
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self._complaints.run)
                await self._system.start(nursery)
                async with self._mounted():
                    nursery.start_soon(self._end_on_signals)
                    nursery.start_soon(self._refresh_sizes)
                    await self._serve()
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await self._system.stop()
                    finally:
                        nursery.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def _mounted(self) -> AsyncIterator[None]:
        # Options are ASCII for pyfuse3, and libfuse takes a comma for their end.
        name = self._system.volume.name.encode("ascii", "backslashreplace").decode()
        name = name.replace("\\", "\\\\").replace(",", "\\,")
        options = {
            "default_permissions",
            f"fsname={name}",
            "subtype=clonefs",
            *self._options.kernel,
        }
        if self._options.read_only:
            options.add("ro")
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), options)
        except RuntimeError as error:
            raise failed(f"{self._mountpoint} cannot be mounted: {error}") from error
        try:
            yield
        finally:
            pyfuse3.close(unmount=True)

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            nursery.start_soon(self._watch.run)
            await self._session.serve()
            nursery.cancel_scope.cancel()

    async def _announce(self) -> None:
        """The tree is there when a look at it is answered."""
        found = await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        self._device = found.st_dev
        self._ask_for_depth(os.minor(found.st_dev))
        log.info("%s is mounted on %s", self._system.volume.name, self._mountpoint)
        self._on_ready()

    def _ask_for_depth(self, connection: int) -> None:
        """The kernel sends 12 asynchronous requests at a time to a FUSE file system, whatever the
        depth of the queue above it. Only root may ask for more, and it goes without."""
        control = Path(f"/sys/fs/fuse/connections/{connection}")
        with contextlib.suppress(OSError):
            (control / "max_background").write_text("64")
            (control / "congestion_threshold").write_text("48")

    async def _end_on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("%s: unmounting", signal.Signals(number).name)
                self._session.end()
                return

    # What the system and the control files ask of us

    def _in_use(self, group: str, name: str) -> bool:
        return self._operations.in_use(group, name)

    async def _open_unit(
        self, path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> LogicalUnit:
        await trio.to_thread.run_sync(self._refuse_own_files, path, abandon_on_cancel=True)
        return await trio.to_thread.run_sync(
            functools.partial(
                open_backing,
                path,
                create_size=create_size,
                size=size,
                read_only=self._options.read_only,
            )
        )

    def _refuse_own_files(self, path: Path) -> None:
        """A backing on this very mount would wait for itself. In a thread: we answer these stats."""
        if self._device is None:
            return
        for place in (path, path.parent, *filter(None, [file_under(path)])):
            try:
                device = place.stat().st_dev
            except OSError:
                continue
            if device == self._device:
                raise busy(f"{path} lies on this mount itself: choose another backing")

    async def _forget_pages(self, group: str) -> None:
        node = self._tree.at((group, SOURCE))
        if node is None:
            return
        self._tree.let_modified_move(node.path)
        # Where the kernel does not know the file, it has no pages of it.
        with contextlib.suppress(FileNotFoundError):
            await trio.to_thread.run_sync(pyfuse3.invalidate_inode, node.inode)
        self._tree.let_modified_move(node.path)  # of who has opened it meanwhile, too

    def _event(self, line: str) -> None:
        self._control.events.append(f"{timestamp(time.time())} {line}")
        self._watch.stir()

    def _changed(self, *place: str) -> None:
        """The state of the group, or of its clone, has changed, or it has come or gone."""
        for depth in range(len(place) + 1):
            self._control.changed[place[:depth]] = time.time()

    def _opened_with_truncation(self, group: str, name: str) -> None:
        self._stale.add((group, name))
        self._stale_event.set()

    async def _refresh_sizes(self) -> None:
        """Look at LU files that were opened with O_TRUNC, so that the kernel, which set their size
        to nothing by itself, learns it again."""
        while True:
            await self._stale_event.wait()
            self._stale_event = trio.Event()
            stale, self._stale = self._stale, set()
            # The kernel truncates after our answer to the open, and does not say when.
            for pause in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.016):
                await trio.sleep(pause)
                for group, name in stale:
                    await self._look_at(self._mountpoint / group / name)

    async def _look_at(self, path: Path) -> None:
        try:
            await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
        except OSError as error:
            log.debug("%s: %s", path, error)
