"""The mounted tree: which node has which name, inode number and attributes.

Nodes are derived from the system each time the kernel asks; only inode numbers are remembered, since
the kernel keeps them. A number belongs to a path and to the object behind it, and is never given to
another: a group that is removed and added again is a new file.
"""

import stat
from dataclasses import dataclass

import pyfuse3
from pyfuse3 import EntryAttributes, InodeT

from clonefs.engines import HostLu, StorageSystem
from clonefs.fuse.control import TABLES, Control, ControlFile
from clonefs.fuse.options import MountOptions

CONTROL = "control"
SOURCE = "source"
# What cmp, cat and stdio read at once: a request costs more than the bytes in it.
LARGEST_REQUEST = 128 << 10
REMEMBERED = 1  # seconds that the kernel does not ask again for attributes of what it may cache

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """What is at `path`: a directory, a control file, or an LU file."""

    path: Path
    inode: InodeT
    control: ControlFile | None = None
    lu: HostLu | None = None

    @property
    def where(self) -> Path:
        """Of a control file or directory: (), (group,) or (group, clone)."""
        return self.path[1:-1] if self.control else self.path[1:]

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else ""


class Tree:
    """The tree over `system`; `started_ns` is the time that files without one of their own show."""

    def __init__(
        self, system: StorageSystem, control: Control, options: MountOptions, started_ns: int
    ) -> None:
        self._system = system
        self._control = control
        self._options = options
        self._started_ns = started_ns
        self._inodes: dict[tuple[Path, int], InodeT] = {((), 0): pyfuse3.ROOT_INODE}
        self._paths: dict[InodeT, tuple[Path, int]] = {pyfuse3.ROOT_INODE: ((), 0)}
        # Objects whose id() stands in a key: they must live as long as the key does.
        self._identities: list[object] = []
        self._known_identities: set[int] = set()
        # Times of modification of what is open, that stay as they are; None for those that do not.
        self._held: dict[Path, int | None] = {}

    def node(self, inode: InodeT) -> Node | None:
        """The node of that number, if what it was is still there."""
        path, _ = self._paths[inode]
        node = self.at(path)
        return node if node is not None and node.inode == inode else None

    def child(self, parent: InodeT, name: str) -> Node | None:
        """The node of that name in a directory."""
        node = self.node(parent)
        if node is None or name in (".", ".."):
            return node
        return self.at((*node.path, name))

    def children(self, node: Node) -> list[Node]:
        """Everything in a directory."""
        found = (self.at((*node.path, name)) for name in self._names(node.path))
        return [child for child in found if child is not None]

    def _names(self, path: Path) -> list[str]:
        system = self._system
        if not path:
            return [CONTROL, *sorted(system.servers)]
        if path[0] != CONTROL:
            return [SOURCE, *system.server(path[0]).group.clones]
        names = list(TABLES[len(path) - 1])
        if len(path) == 1:
            names += sorted(system.servers)
        elif len(path) == 2:
            names += system.server(path[1]).group.clones
        return names

    def at(self, path: Path) -> Node | None:
        """The node at `path`, or None."""
        if not path:
            return Node(path, pyfuse3.ROOT_INODE)
        if path[0] == CONTROL:
            return self._control_at(path)
        server = self._system.servers.get(path[0])
        if server is None or len(path) > 2:
            return None
        if len(path) == 1:
            return Node(path, self._inode(path, server))
        lu = self.lu(path[0], path[1])
        return None if lu is None else Node(path, self._inode(path, lu), lu=lu)

    def lu(self, group: str, name: str) -> HostLu | None:
        """The Source or the clone of that name."""
        if name == SOURCE:
            return self._system.sources.get(group)
        return self._system.clones.get((group, name))

    def _control_at(self, path: Path) -> Node | None:
        identity: object = None
        for depth in range(1, len(path)):
            name = path[depth]
            if depth == len(path) - 1 and depth <= len(TABLES) and name in TABLES[depth - 1]:
                return Node(path, self._inode(path, identity), TABLES[depth - 1][name])
            if depth == 1:
                identity = self._system.servers.get(name)
            elif depth == 2:
                identity = self._system.clones.get((path[1], name))
            else:
                return None
            if identity is None:
                return None
        return Node(path, self._inode(path, identity))

    def _inode(self, path: Path, identity: object) -> InodeT:
        number = 0 if identity is None else id(identity)
        if number not in self._known_identities:
            self._known_identities.add(number)
            self._identities.append(identity)
        key = (path, number)
        if key not in self._inodes:
            inode = InodeT(len(self._inodes) + 1)
            self._inodes[key] = inode
            self._paths[inode] = key
        return self._inodes[key]

    def caches(self, node: Node) -> bool:
        """Whether the kernel may keep pages of the file."""
        return self._options.cached and node.lu is not None and node.name == SOURCE

    def attributes(self, node: Node) -> EntryAttributes:
        """What stat(2) shows. Nothing of it may be cached, since states change modes at any time, but
        of a file whose pages are: the kernel would ask before each read of them."""
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.generation = 0
        entry.entry_timeout = 0
        entry.attr_timeout = REMEMBERED if self.caches(node) else 0
        entry.st_uid = self._options.uid
        entry.st_gid = self._options.gid
        entry.st_blksize = 4096 if node.lu is None else LARGEST_REQUEST
        modified, changed = self._times_ns(node)
        entry.st_atime_ns = entry.st_mtime_ns = modified
        entry.st_ctime_ns = changed
        kind, mode, size, held = self._kind(node)
        entry.st_mode = pyfuse3.ModeT(kind | (mode & ~self._options.umask))
        entry.st_size = size
        entry.st_blocks = -(-held // 512)
        entry.st_nlink = 2 if kind == stat.S_IFDIR else 1
        return entry

    def _times_ns(self, node: Node) -> tuple[int, int]:
        """When the content was last changed, and when that or the state was."""
        where = node.path if node.lu is not None else node.where
        state = self._ns(self._control.changed.get(where))
        if node.lu is None:
            return state, state
        modified = self._ns(node.lu.modified())
        held = self._held.get(node.path)
        return modified if held is None else held, max(modified, state)

    def hold_modified(self, node: Node) -> None:
        """Let the time of modification be what it is, until `let_modified_go`: where the kernel has
        pages, it takes another time for a change of others, and drops them."""
        self._held.setdefault(node.path, self._times_ns(node)[0])

    def let_modified_move(self, path: Path) -> None:
        """Do not hold it after all, until it is let go and held again. A write that is under way while
        the kernel is told to drop its pages has its own dropped as well; one that is read in its place
        is older, and stays unless the kernel sees another time."""
        if path in self._held:
            self._held[path] = None

    def let_modified_go(self, path: Path) -> None:
        """Show the time of modification as it is again."""
        self._held.pop(path, None)

    def _ns(self, seconds: float | None) -> int:
        return self._started_ns if seconds is None else int(seconds * 1_000_000_000)

    def _kind(self, node: Node) -> tuple[int, int, int, int]:
        """(file type, mode before the umask, size, bytes held)."""
        if node.lu is not None:
            mode = 0o666 if node.lu.writable() else 0o444
            return stat.S_IFREG, mode, node.lu.size, node.lu.allocated()
        if node.control is None:
            return stat.S_IFDIR, 0o555, 0, 0
        mode = (0o444 if node.control.readable else 0) | (0o222 if node.control.write else 0)
        # tail -f looks at the size; for the others a page, as sysfs has it.
        size = self._control.events.end if node.control.is_log else 4096
        return stat.S_IFREG, mode, size, 0
