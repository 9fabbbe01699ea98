"""A mount that changes nothing: the groups of a volume as a mount would find them, for reading.

It shows the states and maps that recovery would make of the volume, in pages that are private. There
are no engines, no checkpoints and no commits. It must never write to a unit or to the volume, nor
flush one; the volume refuses commits (EROFS), and the units are open for reading only.
"""

from msgspec.structs import replace
from trio import Nursery

from clonefs.engines.cod import CodEngine
from clonefs.engines.host import CloneLu, SourceLu
from clonefs.engines.recovery import Loaded
from clonefs.engines.server import GroupServer
from clonefs.engines.stamps import look
from clonefs.engines.sync import COPYING
from clonefs.engines.system import StorageSystem
from clonefs.errors import ClonefsError
from clonefs.group import MIRRORED, transitions
from clonefs.units import Buffer, LogicalUnit, MissingUnit

IDLE = "the mount is read-only, so nothing is copied: mount it without ro, and it goes on"


class ReadOnlySystem(StorageSystem):
    """The groups of a volume that is open read-only. No command may be given to it."""

    async def start(self, nursery: Nursery) -> None:
        """Show what recovery would make of the volume. Raises ClonefsError if it cannot be used."""
        opened = {group.name: await self._open_units(group) for group in self.volume.record.groups}
        doubt = look(self.volume, opened)
        loaded = [self._load(group, doubt) for group in self.volume.record.groups]
        self._tell(self._recovery(doubt, loaded, []), was_clean=self.volume.closed_cleanly)
        for each in loaded:
            self._show(each, opened[each.group.record.name])

    def _show(self, loaded: Loaded, opened: list[LogicalUnit]) -> None:
        record = loaded.group.record
        source, *others = opened
        clones = {clone.name: unit for clone, unit in zip(record.clones, others, strict=True)}
        server = self._make_server(loaded, source, clones)
        server.durability.mark_live_maps()
        self.servers[server.name] = server
        self.sources[server.name] = ReadOnlySource(server, Uncopied(server))
        for name, unit in clones.items():
            self.clones[server.name, name] = ReadOnlyClone(server, name)
            self._as_a_mount_would(server, name, unit)

    def _as_a_mount_would(self, server: GroupServer, name: str, unit: LogicalUnit) -> None:
        """Split off a clone whose backing is missing; a copy that would go on waits."""
        group = server.group
        clone = group.record.clone(name)
        if isinstance(unit, MissingUnit) and clone.state in MIRRORED:
            now = self._wall_clock()
            group.adopt(
                transitions.split_off_failed(group.record, name, reason=unit.reason, now=now)
            )
        elif clone.state in COPYING:
            group.adopt(group.record.with_clone(replace(clone, reason=IDLE)))
            self.transfers.waiting.add((server.name, name))

    async def stop(self) -> None:
        """Let go of everything. Raises ClonefsError, or OSError of a backing's file system."""
        for server in self.servers.values():
            for unit in (server.source, *server.units.values()):
                unit.close()
        await self.recorder.close(clean=False)


class Uncopied(CodEngine):
    """In the place of the COD Engine: who reads a pending extent gets the clone's bytes, and the
    extent stays pending."""

    def may_copy(self) -> bool:
        return False


class _ReadOnlyLu:
    """What an LU of a read-only mount refuses."""

    _server: GroupServer

    def writable(self) -> bool:
        return False

    def refuse_write(self) -> ClonefsError:
        broken = self._server.recorder.volume.broken
        assert broken is not None
        return broken

    def write_now(self, offset: int, data: Buffer) -> bool:
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        raise self.refuse_write()

    async def flush(self) -> None:
        pass  # nothing has been written


class ReadOnlySource(_ReadOnlyLu, SourceLu):
    """The Source of a group."""


class ReadOnlyClone(_ReadOnlyLu, CloneLu):
    """A clone."""
