"""Logical units: where the bytes of a Source or a Clone really are.

A unit reads, writes, flushes and copies, and knows nothing of extents, groups or maps. `LogicalUnit`
is the narrow interface; `BackingUnit` is a file or a block device, `MissingUnit` stands for one that
could not be opened, and clonefs.testing has a simulated one.
"""

from clonefs.units.backing import (
    STAMP,
    BackingUnit,
    file_under,
    open_alone,
    open_backing,
    read_stamp,
)
from clonefs.units.flushing import FlushFailure
from clonefs.units.missing import MissingUnit
from clonefs.units.protocol import Buffer, LogicalUnit

__all__ = [
    "STAMP",
    "BackingUnit",
    "Buffer",
    "FlushFailure",
    "LogicalUnit",
    "MissingUnit",
    "file_under",
    "open_alone",
    "open_backing",
    "read_stamp",
]
