"""The engines: the trio tasks that move bytes as the Clone Group decides, and every command."""

from clonefs.engines.host import CloneLu, HostLu, SourceLu, past_the_end
from clonefs.engines.read_only import ReadOnlySystem
from clonefs.engines.recorder import Recorder, in_thread
from clonefs.engines.recovery import Recovery
from clonefs.engines.server import GroupServer
from clonefs.engines.statistics import CloneStatistics, GroupStatistics, statistics
from clonefs.engines.system import StorageSystem
from clonefs.engines.verify import VerifyStatistics

__all__ = [
    "CloneLu",
    "CloneStatistics",
    "GroupServer",
    "GroupStatistics",
    "HostLu",
    "ReadOnlySystem",
    "Recorder",
    "Recovery",
    "SourceLu",
    "StorageSystem",
    "VerifyStatistics",
    "in_thread",
    "past_the_end",
    "statistics",
]
