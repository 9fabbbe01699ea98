"""clonefs: clones of logical units that can be restored in an instant.

The names in this package are those of Table 1 of the patent application: Source, Clone, Clone
Group, Sync Engine, COD Engine, Delta Map, Protected Restore Map. docs/architecture.md is the map
of the house.
"""

__version__ = "1.0.0"
