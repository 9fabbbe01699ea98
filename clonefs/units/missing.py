"""A unit whose backing is not there, so that everything else can come up without it."""

import errno
from collections.abc import Sequence
from typing import NoReturn

from clonefs.errors import DeviceError
from clonefs.units.protocol import Buffer, LogicalUnit


class MissingUnit:
    """Every request fails with EIO and the reason why the backing could not be opened."""

    def __init__(self, name: str, size: int, reason: str) -> None:
        self.name = name
        self.size = size
        self.reason = reason
        self.sparse = False

    def _fail(self) -> NoReturn:
        raise DeviceError(errno.EIO, self.reason, self.name)

    def read_now(self, offset: int, length: int) -> Buffer | None:
        self._fail()

    async def read(self, offset: int, length: int) -> Buffer:
        self._fail()

    def write_now(self, offset: int, data: Buffer) -> bool:
        self._fail()

    async def write(self, offset: int, data: Buffer) -> None:
        self._fail()

    async def copy_from(
        self, origin: LogicalUnit, ranges: Sequence[tuple[int, int]], *, share: bool
    ) -> int:
        self._fail()

    async def flush(self) -> None:
        self._fail()

    async def forget_cached(self) -> None:
        self._fail()

    async def data_from(self, offset: int) -> int:
        self._fail()

    def allocated(self) -> int:
        return 0

    def stamp(self) -> str | None:
        return None

    def set_stamp(self, stamp: str, *, durable: bool) -> None:
        pass

    def modified(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass
