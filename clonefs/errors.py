"""What goes wrong, as people see it: an errno and one sentence.

The sentence names the thing and says what to do next. It ends up in an `error` file of the control
directory, or as the one line that a command prints. This module must never import another one of
clonefs: every layer raises these.
"""

import errno as _errno


class ClonefsError(Exception):
    """A refusal or a failure with the errno that the contract gives it.

    `errno` is what the system call of the user fails with; `reason` is a sentence for people.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno
        self.reason = reason

    def __repr__(self) -> str:
        return f"ClonefsError({_errno.errorcode.get(self.errno, self.errno)}, {self.reason!r})"


class DeviceError(ClonefsError):
    """A device failed. `unit` is the name of the logical unit that it is under."""

    def __init__(self, errno: int, reason: str, unit: str) -> None:
        super().__init__(errno, reason)
        self.unit = unit


def invalid(reason: str) -> ClonefsError:
    """EINVAL: not a command, a bad name or a bad value."""
    return ClonefsError(_errno.EINVAL, reason)


def missing(reason: str) -> ClonefsError:
    """ENOENT: no such group, clone or backing."""
    return ClonefsError(_errno.ENOENT, reason)


def taken(reason: str) -> ClonefsError:
    """EEXIST: the name is in use."""
    return ClonefsError(_errno.EEXIST, reason)


def busy(reason: str) -> ClonefsError:
    """EBUSY: the present state forbids it, or the backing is in use."""
    return ClonefsError(_errno.EBUSY, reason)


def full(reason: str) -> ClonefsError:
    """ENOSPC: the metadata volume is full, or a write past the end of an LU."""
    return ClonefsError(_errno.ENOSPC, reason)


def read_only(reason: str) -> ClonefsError:
    """EROFS: nothing can be changed through this mount."""
    return ClonefsError(_errno.EROFS, reason)


def failed(reason: str) -> ClonefsError:
    """EIO: a device failed."""
    return ClonefsError(_errno.EIO, reason)
