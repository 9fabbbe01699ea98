"""The metadata volume: what clonefs remembers.

It holds the superblock, one record (states, names, backings, map slots) in two slots, and the pages
of the maps. It knows how to keep them and not what they are for: no rule about Sources, Clones or
restores belongs here. docs/data-format.md has the picture of the layout.
"""

from clonefs.volume.durable import DurableMap
from clonefs.volume.growth import grow_volume
from clonefs.volume.layout import DEFAULT_SIZE, MINIMUM_SIZE, Superblock
from clonefs.volume.medium import FileMedium, Medium
from clonefs.volume.record import CloneRecord, CloneState, GroupRecord, MapSlot, Record, SplitBy
from clonefs.volume.volume import (
    MetadataVolume,
    format_medium,
    format_volume,
    open_volume,
    was_closed_cleanly,
)

__all__ = [
    "DEFAULT_SIZE",
    "MINIMUM_SIZE",
    "CloneRecord",
    "CloneState",
    "DurableMap",
    "FileMedium",
    "GroupRecord",
    "MapSlot",
    "Medium",
    "MetadataVolume",
    "Record",
    "SplitBy",
    "Superblock",
    "format_medium",
    "format_volume",
    "grow_volume",
    "open_volume",
    "was_closed_cleanly",
]
