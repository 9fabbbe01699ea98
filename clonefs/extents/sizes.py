"""Sizes as people write them: a plain number is bytes; K, M, G and T are powers of 1024."""

import re

from clonefs.errors import invalid

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,20})([KMGT]?)", re.ASCII)


def parse_size(text: str) -> int:
    """The number of bytes that `text` says. Raises ClonefsError (EINVAL)."""
    match = _SIZE.fullmatch(text.upper())
    if match is None:
        raise invalid(f"{text!r} is not a size: write bytes, or a number with K, M, G or T")
    return int(match[1]) * _UNITS[match[2]]


def format_size(size: int) -> str:
    """`size` bytes in the largest unit that loses nothing: 65536 is 64K."""
    for unit in "TGMK":
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)
