"""The metadata volume, open: its record, and its live maps.

Invariants: the newest record that is whole is the truth, and a commit that failed leaves the one
before it; slots that the record names overlap nowhere; a live map is the volume's own pages, so
that a bit costs no system call and outlives the daemon.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
import struct
import threading
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from bitarray import bitarray

from clonefs.errors import ClonefsError, busy, failed, invalid, missing, read_only, taken
from clonefs.extents import ExtentMap, Geometry, Pieces, format_size
from clonefs.units import open_alone
from clonefs.volume import layout
from clonefs.volume.durable import DurableMap, load_durable_maps
from clonefs.volume.layout import DEFAULT_SIZE, MINIMUM_SIZE, PAGE, DamagedError, Superblock
from clonefs.volume.medium import FileMedium, Medium
from clonefs.volume.record import GroupRecord, MapSlot, Record, decode_record, encode_record

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


class MetadataVolume:
    """A volume on `medium`, of which nobody else may be writing.

    `trusted`: the live maps are what the daemon before left, bit for bit. It closed the volume, or
    it died while this boot of the machine went on (`boot_id`). `overwritten` are the groups whose live
    maps have changed all the same, `damage` sentences about the record that is not in use.
    `read_only`: the medium keeps stores to itself, and nothing can be committed. Raises ClonefsError.
    """

    def __init__(self, medium: Medium, boot_id: str, *, read_only: bool = False) -> None:
        self._medium = medium
        self._maps: dict[MapSlot, ExtentMap] = {}
        # A record that could not be written, nor replaced: a crash may bring what it says into effect.
        self.uncertain = False
        self._committing = threading.Lock()
        self.name = medium.name
        self.read_only = read_only
        self._broken: ClonefsError | None = _is_read_only(medium.name) if read_only else None
        self.superblock = _read_superblock(medium)
        self.generation, self.record, self.damage = _newest_record(medium, self.superblock)
        layout.check_slots(self.superblock, list(self.record.slots()))
        for group in self.record.groups:
            _check_lengths(group)
        self.boot_id = boot_id
        self.trusted = self.record.trusts_live_maps(boot_id)
        self.overwritten = frozenset(self._overwritten())

    def _overwritten(self) -> Iterator[str]:
        """Groups whose live maps are not what the volume was closed with."""
        for group in self.record.groups if self.record.clean else ():
            found = layout.live_checksum(self._medium.view, group.live_slots())
            if group.live_checksum not in (None, found):
                yield group.name

    def trusts(self, group: GroupRecord) -> bool:
        """Whether the live maps of that group may be taken as they stand."""
        return self.trusted and group.name not in self.overwritten

    @property
    def uuid(self) -> str:
        """The volume's UUID in its usual form."""
        return str(uuid_module.UUID(bytes=self.superblock.uuid))

    @property
    def closed_cleanly(self) -> bool:
        """Whether the record says that the volume was closed, and that nothing is the matter."""
        return self.record.clean and not self.record.doubtful

    @property
    def used(self) -> int:
        """Bytes that are spoken for."""
        return self.superblock.first_map_byte + sum(slot.length for slot in self.record.slots())

    def opened(self) -> Record:
        """The record, marked as in use in this boot: it must be committed before any map changes."""
        return msgspec.structs.replace(
            self.record, clean=False, boot_id=self.boot_id, doubtful=False
        )

    def commit(self, record: Record) -> None:
        """Make `record` the record, durably. Blocks. Raises ClonefsError: then nothing has changed.

        After an EIO nothing can be committed any more until the volume is opened again (rule D10):
        which of the two records a crash would find is not known.
        """
        with self._committing:
            if (broken := self.broken) is not None:
                raise broken
            slot = self._pack(record)
            try:
                self._write_record(slot)
            except ClonefsError as error:
                raise self._break(error, "no state can change", committing=True) from error
            self.generation += 1
            self.record = record

    def _pack(self, record: Record) -> bytes:
        return layout.pack_record(self.superblock, self.generation + 1, encode_record(record))

    def _write_record(self, slot: bytes) -> None:
        self._medium.write_durably(self.superblock.record_slot(self.generation + 1), slot)

    def _break(self, error: ClonefsError, what: str, *, committing: bool = False) -> ClonefsError:
        """A write has failed: nothing else is written any more (rule D10). The kernel tells so of any
        page that it could not write back, a live map's too, so that these are doubtful now."""
        if self._broken is None:
            self.uncertain = not self._doubt() and committing
            self._broken = failed(
                f"the metadata volume cannot be written ({error.reason}): {what} until it is mended "
                f"and mounted again"
            )
        return _fresh(self._broken)

    def _doubt(self) -> bool:
        """Write the record again, as one whose live maps are doubtful. It takes the place of one that
        could not be written, which must not be found later: what that says has not happened. If this
        fails too, only refusing every host write keeps the promise. Returns whether it was written."""
        try:
            self._write_record(self._pack(msgspec.structs.replace(self.record, doubtful=True)))
        except ClonefsError:
            return False
        return True

    def settle(self) -> None:
        """Let stable storage have what was found, if a daemon of this boot has not closed the volume: a
        write that failed is in the page cache all the same, and looks durable (rule D10). Blocks. Raises
        ClonefsError (EIO); then nothing else must be written, for the other record may be the only one
        that is on disk."""
        if self.record.clean or not self.trusted:
            return
        record = layout.pack_record(self.superblock, self.generation, encode_record(self.record))
        self._medium.write_durably(self.superblock.record_slot(self.generation), record)
        for group in self.record.groups:
            end = group.durable.offset + group.durable.length
            for at in range(group.durable.offset, end, 1 << 20):
                held = self._medium.read(at, min(1 << 20, end - at))
                if held != bytes(len(held)):
                    self._medium.write_durably(at, held)

    def overtake(self, generation: int, record: Record) -> None:
        """Commit `record` as newer than `generation`, in both slots: what else they hold is older
        than it seems. Blocks. Raises ClonefsError."""
        step = max(0, generation - self.generation)
        self.generation += step + step % 2  # even: the record that there is stays until the new one
        self.commit(record)
        self.commit(record)

    def write_durably(self, offset: int, data: bytes) -> None:
        """Write sectors of a durable map. Blocks. Raises ClonefsError (EIO), and from then on
        nothing can be written any more (rule D10)."""
        try:
            self._medium.write_durably(offset, data)
        except ClonefsError as error:
            with self._committing:
                raise self._break(error, "no map can change") from error

    def durable_maps(self, group: GroupRecord, extents: int) -> tuple[DurableMap, DurableMap]:
        """The Persistent Delta Map and the Persistent Protected Restore Map of a group, loaded.

        A damaged sector of the former reads as all ones; of the latter as zeros, and `damaged` of
        the map says so.
        """
        return load_durable_maps(self._medium.read, self.superblock.uuid, group, extents)

    def clear_durably(self, slot: MapSlot) -> None:
        """Durable maps that have never been written are zeros on stable storage. Blocks."""
        for at in range(slot.offset, slot.offset + slot.length, 1 << 20):
            self.write_durably(at, bytes(min(1 << 20, slot.offset + slot.length - at)))

    @property
    def broken(self) -> ClonefsError | None:
        """Why nothing can be committed any more; then no map may change either."""
        return None if self._broken is None else _fresh(self._broken)

    def map(self, slot: MapSlot, extents: int) -> ExtentMap:
        """The live map in `slot`; the same object each time."""
        if slot not in self._maps:
            pages = self._medium.view[slot.offset : slot.offset + slot.length]
            bits = bitarray(buffer=pages, endian="little")
            self._maps[slot] = self._new_map(bits, extents, *self._pieces(slot, extents))
        return self._maps[slot]

    def _new_map(
        self, bits: bitarray, extents: int, pieces: Pieces | None, resting: Iterable[int]
    ) -> ExtentMap:
        return ExtentMap(bits, extents, pieces, resting)

    def _pieces(self, slot: MapSlot, extents: int) -> tuple[Pieces | None, list[int]]:
        """The pieces of a live map, and those of them that rest from the beginning: what is clear on a
        volume that was closed. Elsewhere the disk may have more than the page cache."""
        pieces = _PiecesOfSlot(slot, self._medium, self._wake)
        if self.read_only or slot.length < self._medium.piece:
            self._medium.keep(slot.offset, slot.length)
            return None, []
        resting = []
        for number in range(-(-extents // pieces.size)):
            if self.record.clean and pieces.is_clear(number):
                pieces.rest(number)
                resting.append(number)
            else:
                self._medium.keep(*pieces.place(number))
        return pieces, resting

    def _wake(self, offset: int, length: int) -> None:
        try:
            self._medium.wake(offset, length)
        except ClonefsError as error:
            with self._committing:
                raise self._break(error, "no map can change") from error

    def flush_map(self, slot: MapSlot) -> None:
        """What a live map has is on stable storage. Blocks. Raises ClonefsError (EIO)."""
        try:
            self._medium.flush_part(slot.offset, slot.length)
        except ClonefsError as error:
            with self._committing:
                raise self._break(error, "no state can change") from error

    def new_map_slot(self, extents: int, *, beside: tuple[MapSlot, ...] = ()) -> MapSlot:
        """A free slot for a live map, its pages cleared. It is free until a record names it.

        `beside`: slots that are also to be left alone. Raises ClonefsError (ENOSPC).
        """
        slot = self._new_slot(layout.live_map_length(extents), beside)
        self._medium.keep(slot.offset, slot.length)
        for at in range(slot.offset, slot.offset + slot.length, 1 << 20):
            end = min(at + (1 << 20), slot.offset + slot.length)
            self._medium.view[at:end] = bytes(end - at)
        return slot

    def new_durable_slot(self, extents: int, *, beside: tuple[MapSlot, ...] = ()) -> MapSlot:
        """A free slot for a group's durable maps, to be cleared with `clear_durably`; else like
        `new_map_slot`."""
        return self._new_slot(layout.durable_maps_length(extents), beside)

    def _new_slot(self, length: int, beside: tuple[MapSlot, ...]) -> MapSlot:
        slot = layout.free_slot(self.superblock, [*self.record.slots(), *beside], length)
        self._forget_maps_in(slot)
        return slot

    def _forget_maps_in(self, slot: MapSlot) -> None:
        """Drop the maps of slots that no record names any more and that are handed out again."""
        end = slot.offset + slot.length
        for old in [
            old for old in self._maps if old.offset < end and slot.offset < old.offset + old.length
        ]:
            self._maps.pop(old).release()
            self._medium.forget(old.offset, old.length)

    def _flush_maps(self) -> None:
        try:
            self._medium.flush()
        except ClonefsError as error:
            with self._committing:
                raise self._break(error, "no state can change") from error

    def extend(self, size: int) -> None:
        """Let the superblock say that the volume has `size` bytes, which must be there, durably. Blocks.
        What is new is used once the volume is opened again. Raises ClonefsError (EIO)."""
        superblock = dataclasses.replace(self.superblock, size=size)
        self.write_durably(0, superblock.pack())

    def conclude(self) -> None:
        """Say that all units are flushed and the maps are final. Blocks.

        Raises ClonefsError if that cannot be made durable: then the next mount recovers.
        """
        self._flush_maps()
        groups = tuple(
            msgspec.structs.replace(
                group,
                live_checksum=layout.live_checksum(self._medium.view, group.live_slots()),
            )
            for group in self.record.groups
        )
        self.commit(msgspec.structs.replace(self.record, clean=True, groups=groups))

    def close(self, *, clean: bool) -> None:
        """Let go of the volume; `clean`: conclude it first, and let go of it whatever comes of that.
        Raises ClonefsError like `conclude`."""
        try:
            if clean:
                self.conclude()
        finally:
            for extents in self._maps.values():
                extents.release()
            self._maps.clear()
            self._medium.close()


class _PiecesOfSlot:
    """The pieces of the live map in `slot`; `wake` gets the bytes of one that has to be kept again."""

    def __init__(self, slot: MapSlot, medium: Medium, wake: Callable[[int, int], None]) -> None:
        self.size = medium.piece * 8
        self._slot = slot
        self._medium = medium
        self._wake = wake

    def place(self, piece: int) -> tuple[int, int]:
        """Its offset in the volume and its length, in bytes."""
        start = piece * self._medium.piece
        return self._slot.offset + start, min(self._medium.piece, self._slot.length - start)

    def is_clear(self, piece: int) -> bool:
        """Whether it is all zeros. Raises ClonefsError (EIO)."""
        offset, length = self.place(piece)
        return self._medium.read(offset, length) == bytes(length)

    def rest(self, piece: int) -> None:
        self._medium.rest(*self.place(piece))

    def wake(self, piece: int) -> None:
        self._wake(*self.place(piece))


def _fresh(error: ClonefsError) -> ClonefsError:
    """One to raise. What has been raised knows its callers, who may have a part of the view."""
    return ClonefsError(error.errno, error.reason)


def _is_read_only(name: str) -> ClonefsError:
    return read_only(f"{name} is mounted read-only: unmount it, and mount it without ro")


def _read_superblock(medium: Medium) -> Superblock:
    try:
        superblock = Superblock.unpack(medium.read(0, PAGE))
    except DamagedError as damage:
        raise invalid(f"{medium.name}: {damage}") from damage
    if superblock.size > medium.size:
        raise invalid(
            f"{medium.name} has been cut short: it has {medium.size} bytes and should have "
            f"{superblock.size}"
        )
    return superblock


def _check_lengths(group: GroupRecord) -> None:
    """Raises ClonefsError (EIO) if a map of the group does not fit into its slot."""
    extents = Geometry(group.size, group.extent_size).extents
    live = [group.protected, *(clone.delta for clone in group.clones)]
    if min(slot.length for slot in live) < layout.live_map_length(
        extents
    ) or group.durable.length < layout.durable_maps_length(extents):
        raise failed(
            f"the metadata volume is damaged: its record has a map of group {group.name!r} that is "
            f"too short for {extents} extents"
        )


def _newest_record(medium: Medium, superblock: Superblock) -> tuple[int, Record, tuple[str, ...]]:
    found: list[tuple[int, Record]] = []
    reasons = []
    for number, letter in ((0, "A"), (1, "B")):
        start = superblock.record_slot(number)
        slot = medium.read(start, superblock.record_size)
        try:
            generation, payload = layout.unpack_record(superblock, slot)
            found.append((generation, decode_record(payload)))
        except DamagedError as damage:
            reasons.append(f"record slot {letter}: {damage}")
        except msgspec.MsgspecError as unknown:
            reasons.append(
                f"record slot {letter}: it is whole, but this clonefs does not know it ({unknown})"
            )
    if not found:
        raise failed(f"{medium.name} is damaged, or newer than this clonefs: {'; '.join(reasons)}")
    return *max(found, key=lambda pair: pair[0]), tuple(reasons)


def format_medium(medium: Medium, uuid: bytes) -> None:
    """Write an empty volume over all of `medium`, and make it durable."""
    superblock = layout.plan(medium.size, uuid)
    step = 1 << 20
    for at in range(0, medium.size, step):
        medium.view[at : at + step] = bytes(min(step, medium.size - at))
    payload = encode_record(Record())
    for generation in (0, 1):
        start = superblock.record_slot(generation)
        slot = layout.pack_record(superblock, generation, payload)
        medium.view[start : start + len(slot)] = slot
    # The superblock is last: a volume that has one is whole.
    medium.flush()
    medium.write_durably(0, superblock.pack())


def format_volume(path: Path, *, size: int | None, force: bool) -> None:
    """Make a metadata volume of a file or a block device. Blocks.

    `size` in bytes: of a file 64 MiB if None; of a block device all of it. A file is allocated in
    full. Raises ClonefsError: EINVAL (too small, or neither file nor device), EEXIST (it holds
    something, and `force` is not given), EBUSY, ENOSPC.
    """
    if size is not None and size < MINIMUM_SIZE:
        raise invalid(
            f"{format_size(size)} is too small for a metadata volume: the least is "
            f"{format_size(MINIMUM_SIZE)}"
        )
    created = not os.path.lexists(path)
    fd = _open_volume(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if created else 0))
    try:
        if not force:
            _refuse_what_is_not_empty(fd, path)
        size = _size_it(fd, path, size)
        medium = FileMedium(os.dup(fd), str(path), size)
        try:
            format_medium(medium, uuid_module.uuid4().bytes)
        finally:
            medium.close()
    except BaseException as error:
        if created:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise
    finally:
        os.close(fd)


def _refuse_what_is_not_empty(fd: int, path: Path) -> None:
    if os.pread(fd, 8, 0) == layout.SUPERBLOCK_MAGIC:
        raise taken(
            f"{path} is a clonefs metadata volume already: --force would erase what it holds"
        )
    offset = 0
    end = os.lseek(fd, 0, os.SEEK_END)
    while offset < end:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
        chunk = os.pread(fd, 1 << 20, offset)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            raise taken(f"{path} is not empty: --force would erase what it holds")
        offset += len(chunk)


def _size_it(fd: int, path: Path, size: int | None) -> int:
    """Give the file its size and all its blocks, or look how large the device is."""
    held = os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        size = size or held or DEFAULT_SIZE
        if size < MINIMUM_SIZE:
            raise invalid(
                f"{path} has {format_size(size)}, which is too small for a metadata volume: the "
                f"least is {format_size(MINIMUM_SIZE)} (--size)"
            )
        os.ftruncate(fd, 0)
        with contextlib.suppress(OSError):  # only Btrfs has the flag
            _no_copy_on_write(fd)
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        return size
    if size is not None and size > held:
        raise invalid(f"{path} has {format_size(held)}, which is less than {format_size(size)}")
    if held < MINIMUM_SIZE:
        raise invalid(
            f"{path} has {format_size(held)}, which is too small for a metadata volume: the least "
            f"is {format_size(MINIMUM_SIZE)}"
        )
    return size or held


def _no_copy_on_write(fd: int) -> None:
    """On Btrfs a store to a mapped page would need free space, and could find none."""
    flags = struct.unpack("i", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(4)))[0]
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags | _FS_NOCOW_FL))


def open_volume(
    path: Path, *, boot_id: str | None = None, read_only: bool = False
) -> MetadataVolume:
    """Open and lock the volume at `path`. Blocks. Raises ClonefsError.

    `boot_id`: this boot of the machine, if it is not to be read from the kernel. `read_only`: the
    volume stays as it is, and others may have it open in the same way.
    """
    medium = open_medium(path, read_only=read_only)
    try:
        return MetadataVolume(medium, boot_id or this_boot(), read_only=read_only)
    except BaseException:
        medium.close()
        raise


def open_medium(path: Path, *, read_only: bool = False) -> FileMedium:
    """Open and lock what lies at `path`, whatever it holds. Blocks. Raises ClonefsError.

    `read_only`: nothing that is done to the medium can change it. The lock is shared then.
    """
    fd = _open_volume(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        if os.lseek(fd, 0, os.SEEK_END) < MINIMUM_SIZE:
            raise invalid(f"{path} is not a clonefs metadata volume: it is too small for one")
        medium = FileMedium(fd, str(path), private=read_only)
    except BaseException:
        os.close(fd)
        raise
    if read_only:
        try:
            medium.keep(0, medium.size)  # all of it is looked at
        except BaseException:
            medium.close()
            raise
    return medium


def this_boot() -> str:
    """The boot id of the machine as it runs now."""
    return _BOOT_ID.read_text().strip()


def was_closed_cleanly(path: Path) -> bool:
    """Whether the volume, which nobody has mounted, needs no recovery. Raises ClonefsError."""
    volume = open_volume(path)
    try:
        return volume.record.clean
    finally:
        volume.close(clean=False)


def _open_volume(path: Path, flags: int) -> int:
    shared = flags & os.O_ACCMODE == os.O_RDONLY
    try:
        fd = open_alone(path, flags)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise invalid(f"{path} is neither a regular file nor a block device")
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise busy(f"{path} is in use: it is mounted, or serves as a backing") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refused(path: Path, error: OSError) -> ClonefsError:
    match error.errno:
        case errno.ENOENT:
            if not path.absolute().parent.exists():
                return missing(f"there is no directory {path.parent}: make it first")
            return missing(f"{path} does not exist: clonefs format makes a volume")
        case errno.EBUSY:
            return busy(f"{path} is in use: it is mounted, or part of another device")
        case errno.ENOSPC:
            return ClonefsError(
                errno.ENOSPC, f"no room for {path}: make space or choose a smaller --size"
            )
        case errno.EISDIR:
            return invalid(f"{path} is a directory")
        case _:
            return ClonefsError(error.errno or errno.EIO, f"{path}: {error.strerror}")
