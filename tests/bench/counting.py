"""What counting each request costs: clonefs as it is against itself without the lines that count.

These lines are few, and all in the handlers: `STRIPPED` is what must be found in them. Once in one
process, where the handlers are called without a kernel, and once with a mount and fio.
"""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import trio

from clonefs.engines import Recorder, StorageSystem
from clonefs.fuse.options import MountOptions
from clonefs.units import open_backing
from clonefs.volume import format_volume, open_volume

MODULE = "clonefs.fuse.operations"
COUNTS = "perf_counter_ns()"
STRIPPED = 4  # lines: two for a read, two for a write
BATCH = 1000  # requests that are timed together
BATCHES = 400

# A program that is clonefs, and counts or does not as SIGNALS say. Two mounts would have files of their
# own, and those are not equally fast.
PROGRAM = (
    "-c",
    (
        "import sys; sys.path.insert(0, '.'); from tests.bench import counting; counting.obey(); "
        "from clonefs.cli import main; main(prog_name='clonefs')"
    ),
)
SIGNALS = {"with": signal.SIGUSR1, "without": signal.SIGUSR2}


def obey() -> None:
    """From now on this process counts after one of SIGNALS, and does not after the other."""
    import clonefs.fuse.operations as counting

    operations = counting.Operations
    for name, module in (("with", counting), ("without", without())):
        read, write = module.Operations.read, module.Operations.write

        def change(*_: object, read: Any = read, write: Any = write) -> None:
            operations.read, operations.write = read, write  # type: ignore[method-assign]

        signal.signal(SIGNALS[name], change)


def tell(pid: int, name: str, metrics: Path, lu: Path) -> None:
    """Let the process count or not, and see that it does so."""
    os.kill(pid, SIGNALS[name])
    before = _reads(metrics)
    fd = os.open(lu, os.O_RDONLY)
    for _ in range(2):  # a signal may come in the middle of the first one
        os.pread(fd, 512, 0)
    os.close(fd)
    if (_reads(metrics) > before) != (name == "with"):
        raise AssertionError(f"the daemon does not do as it was told: {name}")


def _reads(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    (line,) = (each for each in lines if "host_requests" in each and 'op="read"' in each)
    return int(line.split()[-1])


def without() -> ModuleType:
    """The handlers without counting."""
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.origin is not None
    lines = Path(spec.origin).read_text().splitlines()
    kept = [line for line in lines if COUNTS not in line]
    if len(lines) - len(kept) != STRIPPED:
        raise AssertionError(f"{MODULE} counts in another way than it did: mend this benchmark")
    module = ModuleType("tests.bench.without")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile("\n".join(kept), spec.origin, "exec"), module.__dict__)
    return module


async def in_process(work: Path) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds of one request in each batch, by the request and by with or without."""
    import clonefs.fuse.operations as counting

    format_volume(work / "counted", size=None, force=False)
    (work / "counted.img").write_bytes(os.urandom(1 << 20))

    async def open_unit(
        path: Path, *, create_size: int | None = None, size: int | None = None
    ) -> Any:
        return open_backing(path, create_size=create_size, size=size)

    async def nothing(group: str) -> None:
        pass

    system = StorageSystem(
        Recorder(open_volume(work / "counted")),
        open_unit,
        forget_pages=nothing,
        wall_clock=time.time,
        on_event=lambda line: None,
    )
    async with trio.open_nursery() as nursery:
        await system.start(nursery)
        await system.add_group("group", work / "counted.img", size=None, extent_size=None)
        lu = system.sources["group"]
        found = {}
        handlers = {
            "with": _operations(counting, system, lu),
            "without": _operations(without(), system, lu),
        }
        block = bytes(4096)
        requests: dict[str, Callable[[Any], Any]] = {
            "read of 4 KiB": lambda operations: operations.read(1, 8192, 4096),
            "write of 4 KiB": lambda operations: operations.write(1, 8192, block),
        }
        for name, request in requests.items():
            found[name] = await _timed(handlers, request)
        await system.stop()
        nursery.cancel_scope.cancel()
    return found


def _operations(module: ModuleType, system: StorageSystem, lu: Any) -> Any:
    from clonefs.fuse.control import Control
    from clonefs.fuse.tree import Tree
    from clonefs.fuse.watch import Watch

    options = MountOptions(uid=0, gid=0)
    control = Control(system, lambda group, name: False, "/")
    operations = module.Operations(
        Tree(system, control, options, 0), control, options, lambda group, name: None, Watch()
    )
    operations._lus[1] = module.LuHandle("group", "source", lu, False, False)
    return operations


async def _timed(handlers: dict[str, Any], request: Callable[[Any], Any]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in handlers}
    for number in range(BATCHES):
        names = list(handlers) if number % 2 else list(handlers)[::-1]
        for name in names:
            operations = handlers[name]
            started = time.perf_counter_ns()
            for _ in range(BATCH):
                await request(operations)
            times[name].append((time.perf_counter_ns() - started) / BATCH)
    return times


def processor_time(pid: int) -> float:
    """Seconds that a process and its threads have had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
