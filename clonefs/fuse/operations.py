"""The requests of the kernel.

Reads and writes of LU files are the hot path: one look-up of the handle, one call that does the
request in this step if it can, and the waiting one if not. Whatever goes wrong in a handler becomes
an errno here; an exception that got out would end the mount.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
)

from clonefs.engines import HostLu, Tally, past_the_end
from clonefs.errors import ClonefsError, DeviceError
from clonefs.fuse.contents import (
    READABLE,
    WRITABLE,
    Content,
    EventReader,
    Pieces,
    Readiness,
    Text,
    cpulist,
    encoded,
    snapshot,
)
from clonefs.fuse.control import Control, Show, attributes
from clonefs.fuse.options import MountOptions
from clonefs.fuse.tree import SOURCE, Node, Tree
from clonefs.fuse.watch import Watch
from clonefs.units import Buffer

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[P, Coroutine[Any, Any, T]]

MAXIMUM_COMMAND = 16 << 10
XATTR_PREFIX = b"user.clonefs."


def guarded(handler: Handler[P, T]) -> Handler[P, T]:
    """An exception that got out of a handler would end the mount: whatever it is becomes an errno."""

    @functools.wraps(handler)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except ClonefsError as error:
            raise FUSEError(error.errno) from None
        except Exception:
            _broken(handler.__name__)

    return call


@dataclass(slots=True)
class LuHandle:
    """An open LU file. `sync`: opened with O_SYNC or O_DSYNC; `truncating`: with O_TRUNC."""

    group: str
    name: str
    lu: HostLu
    sync: bool
    truncating: bool


@dataclass(slots=True)
class ControlHandle:
    """An open control file with what it shows, if it was opened for reading."""

    node: Node
    content: Content | None


class Operations(pyfuse3.Operations):
    """The handlers. `refresh` is called after an LU file was opened with O_TRUNC, see `open`."""

    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(
        self,
        tree: Tree,
        control: Control,
        options: MountOptions,
        refresh: Callable[[str, str], None],
        watch: Watch,
    ) -> None:
        super().__init__()
        self._watch = watch
        self._tree = tree
        self._control = control
        self._options = options
        self._refresh = refresh
        self._lus: dict[int, LuHandle] = {}
        self._controls: dict[int, ControlHandle] = {}
        self._next_handle = 1

    def in_use(self, group: str, name: str) -> bool:
        """Whether the LU file is open."""
        return any(each.group == group and each.name == name for each in self._lus.values())

    # The tree

    @guarded
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        node = self._tree.child(parent_inode, os.fsdecode(name))
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._tree.attributes(node)

    @guarded
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._tree.attributes(self._node(inode))

    def _node(self, inode: InodeT) -> Node:
        node = self._tree.node(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return node

    @guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if fields.update_size and node.lu is not None and attr.st_size != node.lu.size:
            raise FUSEError(errno.EINVAL)
        return self._tree.attributes(node)

    @guarded
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        self._node(inode)
        return FileHandleT(inode)

    @guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        node = self._tree.node(InodeT(fh))
        children = self._tree.children(node) if node else []
        # The number of an inode never changes and never comes again, so it is the position.
        for child in sorted(children, key=lambda child: child.inode):
            if child.inode <= start_id:
                continue
            attributes = self._tree.attributes(child)
            name = FileNameT(os.fsencode(child.name))
            if not pyfuse3.readdir_reply(token, name, attributes, child.inode):
                break

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def forget(self, inode_list: object) -> None:
        pass  # numbers are kept: they are few, and never used again for something else

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        volume = self._control.system.volume
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = volume.superblock.size // 4096
        data.f_bfree = data.f_bavail = (volume.superblock.size - volume.used) // 4096
        data.f_files = data.f_ffree = data.f_favail = 0
        data.f_namemax = 63
        return data

    # Open files

    @guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        node = self._node(inode)
        if node.lu is not None:
            return self._open_lu(node, node.lu, flags)
        if node.control is None:
            raise FUSEError(errno.EISDIR)
        return await self._open_control(node, flags)

    def _open_lu(self, node: Node, lu: HostLu, flags: int) -> FileInfo:
        group, name = node.path
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and not lu.writable():
            self._refused((group, name), lu.refuse_write())
        if flags & os.O_TRUNC:
            # The size never changes, but the kernel believes the file to be empty now, and would
            # end reads through other descriptors early. It asks again when somebody looks.
            self._refresh(group, name)
        handle = self._new_handle()
        sync = bool(flags & (os.O_SYNC | os.O_DSYNC))
        self._lus[handle] = LuHandle(group, name, lu, sync, bool(flags & os.O_TRUNC))
        cached = self._tree.caches(node)
        if cached:
            self._tree.hold_modified(node)
        return FileInfo(fh=handle, direct_io=not cached, keep_cache=cached)

    async def _open_control(self, node: Node, flags: int) -> FileInfo:
        control = node.control
        assert control is not None
        access = flags & os.O_ACCMODE
        if access != os.O_RDONLY and control.write is not None:
            self._refuse_if_read_only(node.where)
        if (access != os.O_WRONLY and not control.readable) or (
            access != os.O_RDONLY and control.write is None
        ):
            raise FUSEError(errno.EACCES)
        content = None if access == os.O_WRONLY else await self._content(node)
        handle = self._new_handle()
        self._controls[handle] = ControlHandle(node, content)
        return FileInfo(fh=handle, direct_io=True, keep_cache=False)

    async def _content(self, node: Node) -> Content:
        control = node.control
        assert control is not None
        if control.is_log:
            return EventReader(self._control.events)
        if control.map_of is not None:
            bits, extents = control.map_of(self._control, node.where)
            return Pieces(functools.partial(cpulist, await snapshot(bits), extents))
        if control.pieces_of is not None:
            return Pieces(await control.pieces_of(self._control))
        assert control.show is not None
        show = functools.partial(self._show, node, control.show)
        return Text(show) if control.telling is None else Text(show, control.telling)

    def _show(self, node: Node, show: Show) -> str | None:
        """The text of a file now, or None if it is gone, or another one by now."""
        if self._tree.node(node.inode) is None:
            return None
        return show(self._control, node.where)

    def _refuse_if_read_only(self, where: tuple[str, ...]) -> None:
        """The kernel refuses it before; but somebody may have remounted it with rw."""
        volume = self._control.system.volume
        if volume.read_only and volume.broken is not None:
            self._refused(where, volume.broken)

    def _new_handle(self) -> FileHandleT:
        handle = FileHandleT(self._next_handle)
        self._next_handle += 1
        return handle

    async def release(self, fh: FileHandleT) -> None:
        handle = self._lus.pop(fh, None)
        # Asked first: to look at all that is open takes long where that is much.
        if self._options.cached and handle and not self.in_use(handle.group, handle.name):
            self._tree.let_modified_go((handle.group, handle.name))
        self._controls.pop(fh, None)
        self._watch.forget(fh)

    async def flush(self, fh: FileHandleT) -> None:
        handle = self._lus.get(fh)
        if handle is not None and handle.truncating:
            handle.truncating = False
            self._refresh(handle.group, handle.name)

    @guarded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        handle = self._lus.get(fh)
        if handle is not None:
            with handle.lu.counters.flush.timed():
                await handle.lu.flush()

    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]
        handle = self._lus.get(fh)
        if handle is None:
            return await self._read_control(fh, off, size)
        lu = handle.lu
        length = min(size, lu.size - off)
        if length <= 0:
            return b""
        started = perf_counter_ns()
        try:
            data = lu.read_now(off, length)
            if data is None:
                data = await lu.read(off, length)
        except ClonefsError as error:
            self._failed(handle, lu.counters.read, "read", off, error)
        except Exception:
            _broken("read")
        lu.counters.read.done(length, perf_counter_ns() - started)
        return data

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        handle = self._lus.get(fh)
        if handle is None:
            return await self._write_control(fh, buf)
        lu = handle.lu
        length = len(buf)
        started = perf_counter_ns()
        try:
            if off + length > lu.size:
                length = lu.size - off
                if length <= 0:
                    raise past_the_end(lu.size)
                buf = buf[:length]
            if not lu.write_now(off, buf):
                await lu.write(off, buf)
            if handle.sync:
                await lu.flush()
        except ClonefsError as error:
            self._failed(handle, lu.counters.write, "write", off, error)
        except Exception:
            _broken("write")
        lu.counters.write.done(length, perf_counter_ns() - started)
        return length

    def _failed(
        self, handle: LuHandle, tally: Tally, verb: str, off: int, error: ClonefsError
    ) -> NoReturn:
        if error.errno == errno.EIO or isinstance(error, DeviceError):
            tally.errors += 1
            request = f"{verb} at {off}"
            self._control.system.request_failed(handle.group, handle.name, request, error)
        raise FUSEError(error.errno) from None

    # Control files

    @guarded
    async def _read_control(self, fh: FileHandleT, off: int, size: int) -> bytes:
        content = self._controls[fh].content
        assert content is not None
        return await content.read(off, size)

    @guarded
    async def poll(
        self,
        inode: InodeT,
        fh: FileHandleT,
        poll_handle: pyfuse3.PollHandle | None,
        ctx: pyfuse3.RequestContext,
    ) -> int:
        if not self._options.poll:
            raise FUSEError(errno.ENOSYS)
        handle = self._controls.get(fh)
        if handle is None:
            return READABLE | WRITABLE
        content = handle.content
        ready = Readiness(0) if content is None else content.poll()
        if poll_handle is not None and ready.changed is not None:
            self._watch.wait_for(fh, poll_handle, ready.changed)
        control = handle.node.control
        assert control is not None
        return ready.events | (WRITABLE if control.write else 0)

    # Extended attributes

    def _refuse_if_cached(self) -> None:
        """With pages of its own the kernel asks for an attribute before every write, unless it has
        learnt that there are none (docs/decisions/extended-attributes.md)."""
        if self._options.cached:
            raise FUSEError(errno.ENOSYS)

    def _attributes(self, inode: InodeT) -> tuple[tuple[str, ...], dict[bytes, Show]]:
        """The directory of control files of an LU, and its attributes by their whole names."""
        node = self._node(inode)
        if node.lu is None:
            return (), {}
        where = node.path[:1] if node.name == SOURCE else node.path
        shows = attributes(where).items()
        return where, {XATTR_PREFIX + name.encode(): show for name, show in shows}

    @guarded
    async def listxattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext
    ) -> list[pyfuse3.XAttrNameT]:
        self._refuse_if_cached()
        return [pyfuse3.XAttrNameT(name) for name in self._attributes(inode)[1]]

    @guarded
    async def getxattr(
        self, inode: InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        self._refuse_if_cached()
        where, shows = self._attributes(inode)
        if name not in shows:
            raise FUSEError(pyfuse3.ENOATTR)
        return encoded(shows[name](self._control, where))

    @guarded
    async def setxattr(
        self,
        inode: InodeT,
        name: pyfuse3.XAttrNameT,
        value: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._refuse_to_set(name)

    @guarded
    async def removexattr(
        self, inode: InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse_to_set(name)

    def _refuse_to_set(self, name: bytes) -> NoReturn:
        """Ours are there to be read; others there are none."""
        raise FUSEError(errno.EPERM if name.startswith(XATTR_PREFIX) else errno.EOPNOTSUPP)

    async def _write_control(self, fh: FileHandleT, buf: bytes) -> int:
        node = self._controls[fh].node
        assert node.control is not None
        assert node.control.write is not None
        if self._tree.node(node.inode) is None:  # removed since it was opened, or another by now
            raise FUSEError(errno.ENOENT)
        try:
            if len(buf) > MAXIMUM_COMMAND:
                raise ClonefsError(errno.EINVAL, "a command is one line, and shorter than this")
            await node.control.write(self._control, node.where, _text(buf))
        except ClonefsError as error:
            self._refused(node.where, error)
        except Exception:
            _broken(f"the command in {'/'.join(node.path)}")
        self._control.errors.pop(node.where, None)
        self._control.commands["done"] += 1
        return len(buf)

    def _refused(self, where: tuple[str, ...], error: ClonefsError) -> NoReturn:
        """Leave the sentence in the `error` file of the directory."""
        self._control.errors[where] = error.reason
        self._control.commands["refused"] += 1
        log.debug("%s: refused: %s", "/".join(("control", *where)), error.reason)
        raise FUSEError(error.errno) from None

    # What the tree does not have

    async def mknod(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        raise FUSEError(errno.EPERM)

    async def unlink(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        raise FUSEError(errno.EPERM)

    async def rmdir(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        raise FUSEError(errno.EPERM)

    async def symlink(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        target: FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        raise FUSEError(errno.EPERM)

    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)


def _text(buf: bytes) -> str:
    try:
        return buf.decode()
    except UnicodeDecodeError:
        raise ClonefsError(errno.EINVAL, "a command is UTF-8 text, and this is not") from None


def _broken(what: str) -> NoReturn:
    """A defect of clonefs: said in the log, EIO for the host, and the mount goes on."""
    log.exception("a defect in clonefs: %s failed", what)
    raise FUSEError(errno.EIO) from None
