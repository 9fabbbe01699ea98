"""Mount options: what `-o` takes."""

from dataclasses import dataclass, replace

from clonefs.errors import ClonefsError, invalid
from clonefs.logs import LEVELS

# Taken by the kernel as for every file system, so passed on as they are.
_KERNEL = frozenset({"allow_other", "nosuid", "nodev", "noexec", "noatime"})
_IGNORED = frozenset({"", "defaults", "suid", "dev", "exec", "atime", "async"})

EXPLAINED = {
    "uid=": "Who owns every file; who mounts, if not given.",
    "gid=": "The group of every file; that of who mounts, if not given.",
    "umask=": "Octal: permissions to take away from 0666 for files and 0555 for directories; 077 if "
    "not given.",
    "allow_other": "Let others than who mounts look at the tree at all; modes decide what they may do.",
    "ro": "Change nothing on disk, neither the volume nor a backing.",
    "rw": "The opposite, as it is if neither is given.",
    "cached": "Let the kernel cache pages of Sources: shared mappings of them work, and what is read "
    "again is not asked for; first reads, large writes and restores take longer.",
    "nopoll": "Never ask whether a file is ready: faster where programs use io_uring on LU files, but "
    "poll(2) and select do not wait for changes of control files.",
    "poll": "The opposite, as it is if neither is given.",
    "log=": "What is logged: debug, info, warning or error; info if not given.",
    "nosuid": "No set-user-ID bits; set in any case.",
    "nodev": "No device files; set in any case.",
    "noexec": "Nothing can be executed.",
    "noatime": "As for other file systems.",
}
"""Every option that does something, with its `=` if it has a value; for help and for shells."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """`uid` and `gid` own every file; `umask` takes permissions away; `cached` lets the kernel keep
    pages of Sources (docs/decisions/kernel-cache.md); without `poll` the kernel never asks whether a
    file is ready (docs/decisions/poll.md); `read_only` changes nothing on disk; `log` is the level of
    the log; `kernel` is passed on."""

    uid: int
    gid: int
    umask: int = 0o077
    cached: bool = False
    poll: bool = True
    read_only: bool = False
    log: str = "info"
    kernel: frozenset[str] = frozenset()


def parse_options(text: str, *, uid: int, gid: int) -> MountOptions:
    """`text` is a comma-separated list. Raises ClonefsError (EINVAL)."""
    options = MountOptions(uid=uid, gid=gid)
    for option in text.split(","):
        name, equals, value = option.strip().partition("=")
        match name:
            case "uid" if equals:
                options = replace(options, uid=_number(option, value, 10))
            case "gid" if equals:
                options = replace(options, gid=_number(option, value, 10))
            case "umask" if equals:
                options = replace(options, umask=_number(option, value, 8))
            case "cached" if not equals:
                options = replace(options, cached=True)
            case "poll" | "nopoll" if not equals:
                options = replace(options, poll=name == "poll")
            case "ro" | "rw" if not equals:
                options = replace(options, read_only=name == "ro")
            case "log" if equals:
                options = replace(options, log=_level(option, value))
            case _ if name in _KERNEL and not equals:
                options = replace(options, kernel=options.kernel | {name})
            case _ if name in _IGNORED and not equals:
                pass
            case _:
                raise _unknown(option)
    return options


def _number(option: str, value: str, base: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if number < 0:
        raise invalid(f"mount option {option!r} has no number as its value")
    return number


def _level(option: str, value: str) -> str:
    if value not in LEVELS:
        raise invalid(f"mount option {option!r} has no level: there are {', '.join(LEVELS)}")
    return value


def _unknown(option: str) -> ClonefsError:
    return invalid(
        f"mount option {option!r} is not known: there are {', '.join(sorted(EXPLAINED))}"
    )
