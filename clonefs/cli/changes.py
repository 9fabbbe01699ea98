"""Waiting until a control file shows something else: poll(2), as the tree offers it.

The files are opened for one look and closed after it, so that nothing keeps a mount in use but a wait
that is under way. What has changed between the look and the wait ends the wait at once.
"""

import os
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from clonefs.cli import tree

_CHANGED = select.POLLPRI | select.POLLERR


class Look:
    """Control files as they stood when they were opened, and what tells of their changes."""

    def __init__(self, texts: dict[str, str], descriptors: list[int]) -> None:
        self._texts = texts
        self._descriptors = descriptors

    def value(self, file: str) -> str:
        """The text of a file, without the newline at its end."""
        return self._texts[file].strip()

    def wait(self, timeout_s: float | None, *, also: int | None = None) -> bool:
        """Return when one of the files has changed, or after this time. True if `also`, another
        descriptor, has something to read."""
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, _CHANGED)
        if also is not None:
            poll.register(also, select.POLLIN)
        found = poll.poll(None if timeout_s is None else max(timeout_s, 0) * 1000)
        return any(descriptor == also for descriptor, _ in found)


@contextmanager
def looked_at(place: tree.Place, *files: str) -> Iterator[Look]:
    """The control files of `place`, read in this order. Raises ClonefsError as tree.read does."""
    with ExitStack() as stack:
        texts: dict[str, str] = {}
        descriptors: list[int] = []
        for file in files:
            descriptor, texts[file] = tree.open_and_read(place, file)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield Look(texts, descriptors)
