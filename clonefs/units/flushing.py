"""A flush that failed has failed (rule D10).

The kernel drops what it could not write and tells whoever flushes first; the next flush succeeds,
and would be a lie. Every unit keeps one of these, and asks it before it flushes.
"""

import errno

from clonefs.errors import DeviceError


class FlushFailure:
    """Whether a flush of the unit `name` has failed since it was opened. Who uses it must let one
    flush run at a time: of those who flush together the kernel tells one."""

    __slots__ = ("_failure", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._failure: DeviceError | None = None

    def check(self) -> None:
        """Raises DeviceError if a flush has failed."""
        if self._failure is not None:
            raise self._failure

    def remember(self, why: str) -> DeviceError:
        """A flush has failed: the error to raise, now and for ever."""
        self._failure = DeviceError(
            errno.EIO,
            f"flushing {self._name} failed ({why}): what was written to it since the last flush may "
            f"be lost; look at the device, then unmount and mount again",
            self._name,
        )
        return self._failure
