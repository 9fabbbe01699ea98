"""The engines: the trio tasks that move bytes as the Clone Group decides, and every command."""

from clonefs.engines.cod import AFTERWARDS
from clonefs.engines.counters import SOURCE, Tally, TallyStatistics
from clonefs.engines.host import CloneLu, HostLu, SourceLu, past_the_end
from clonefs.engines.read_only import ReadOnlySystem
from clonefs.engines.recorder import Recorder, in_thread
from clonefs.engines.recovery import Recovery
from clonefs.engines.server import GroupServer
from clonefs.engines.statistics import (
    CONDITIONS,
    CloneStatistics,
    GroupMetrics,
    GroupStatistics,
    metrics,
    statistics,
)
from clonefs.engines.system import StorageSystem
from clonefs.engines.verify import VerifyStatistics

__all__ = [
    "AFTERWARDS",
    "CONDITIONS",
    "SOURCE",
    "CloneLu",
    "CloneStatistics",
    "GroupMetrics",
    "GroupServer",
    "GroupStatistics",
    "HostLu",
    "ReadOnlySystem",
    "Recorder",
    "Recovery",
    "SourceLu",
    "StorageSystem",
    "Tally",
    "TallyStatistics",
    "VerifyStatistics",
    "in_thread",
    "metrics",
    "past_the_end",
    "statistics",
]
