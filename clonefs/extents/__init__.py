"""The ground floor: extents, the maps that say something of each, and sizes in words.

Everything above counts in these terms. Nothing here does I/O or waits, and nothing here knows what
a map means: that is the Clone Group's.
"""

from clonefs.extents.geometry import MAX_EXTENT_SIZE, MAX_SIZE, MIN_EXTENT_SIZE, SECTOR, Geometry
from clonefs.extents.maps import ExtentMap, Pieces, Run, extent_list, run_text
from clonefs.extents.sizes import format_size, parse_size

__all__ = [
    "MAX_EXTENT_SIZE",
    "MAX_SIZE",
    "MIN_EXTENT_SIZE",
    "SECTOR",
    "ExtentMap",
    "Geometry",
    "Pieces",
    "Run",
    "extent_list",
    "format_size",
    "parse_size",
    "run_text",
]
