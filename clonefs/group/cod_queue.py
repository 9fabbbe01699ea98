"""The COD Queue: the host requests that wait for extents to be copied.

"This is a component of the Protected Restore that coordinates all the I/O requests that require
data copied from the Clone LU to the Source LU before it can be processed." It says who waits for
what; whoever waits looks at the maps again when an extent has been copied, for the copy may have
failed. Waiting itself is the engines'.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class WaitingRequest:
    """A host request: `verb` is read or write; bytes; and the extents [first, stop) it touches."""

    verb: str
    offset: int
    length: int
    first: int
    stop: int


class CodQueue:
    """The waiting requests of one Clone Group, in order of arrival."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: dict[int, WaitingRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[WaitingRequest]:
        return iter(list(self._requests.values()))

    def add(self, request: WaitingRequest) -> None:
        """`request` begins to wait."""
        self._requests[id(request)] = request

    def remove(self, request: WaitingRequest) -> None:
        """`request` waits no longer."""
        del self._requests[id(request)]
