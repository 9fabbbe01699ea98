"""Written scenarios: stories that between them meet every ordering rule.

Each is run again and again, and broken off or made to fail at one point after the other
(clonefs.testing.sweeps). A scenario says what hosts and people do; it checks nothing itself, for the
oracle does; and nothing in it may depend on a request or a command that succeeds.
"""

from collections.abc import Awaitable, Callable

import trio

from clonefs.testing.driver import PER_EXTENT, Driver
from clonefs.testing.ledger import SOURCE
from clonefs.volume import CloneState

S = CloneState
G, H = "g", "h"
A, B, C = "a", "b", "c"

Scenario = Callable[[Driver], Awaitable[None]]


async def _synchronized(d: Driver, group: str, *names: str) -> None:
    for name in names:
        await _until_not(d, group, name, S.SYNCHRONIZING)


async def _copied(d: Driver, group: str, name: str) -> None:
    await _until_not(d, group, name, S.RESTORING, S.REVERSE_SYNCHRONIZING, S.SYNCHRONIZING)


async def _until_not(d: Driver, group: str, name: str, *states: CloneState) -> None:
    await d.until(lambda: d.state(group, name) not in states)


async def _write_often(d: Driver, first: int) -> None:
    for _ in range(5):
        await d.write(G, SOURCE, first, 2)


async def sync_and_fracture(d: Driver) -> None:
    """L1, L2, L3, D1, D2, D3: hosts write while a clone is copied, while it is mirrored, after it
    was split off, and while it is copied again."""
    async with trio.open_nursery() as nursery:
        for first in (0, 3, 9):
            nursery.start_soon(d.write, G, SOURCE, first, 4)
    await _synchronized(d, G, A)
    async with trio.open_nursery() as nursery:  # again and again in the same extents
        for first in (0, 3, PER_EXTENT, PER_EXTENT + 3, 2 * PER_EXTENT):
            nursery.start_soon(_write_often, d, first)
    async with trio.open_nursery() as nursery:  # overlapping
        nursery.start_soon(d.write, G, SOURCE, 2, 10)
        nursery.start_soon(d.write, G, SOURCE, 6, 3)
        nursery.start_soon(d.fracture, (G, A))
    await d.write(G, SOURCE, PER_EXTENT, PER_EXTENT)
    await d.flush(G, SOURCE)
    await d.sync(G, A, then_fracture=True)
    await d.write(G, SOURCE, 1, 2)
    await _copied(d, G, A)
    await d.write(G, SOURCE, 0, 1)
    await d.read(G, A, 0, PER_EXTENT)


async def protected_restore(d: Driver) -> None:
    """L3, L4, L5, D4, D5, D6, D7: reads and writes of what is pending, whole and in part, flushes,
    the end of the restore, and the same restore again."""
    await _synchronized(d, G, A)
    await d.fracture((G, A))
    await d.write(G, SOURCE, 0, 3 * PER_EXTENT)
    await d.flush(G, SOURCE)
    await d.rate(G, A, 256 << 10)
    await d.restore(G, A)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(d.flush, G, SOURCE)
        nursery.start_soon(d.write, G, SOURCE, 1, 2)
        nursery.start_soon(d.write, G, SOURCE, 2 * PER_EXTENT + 3, 1)
    await d.read(G, SOURCE, 0, 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(d.write, G, SOURCE, PER_EXTENT + 1, 2)
        nursery.start_soon(d.write, G, SOURCE, 2 * PER_EXTENT, PER_EXTENT)
        nursery.start_soon(d.read, G, SOURCE, PER_EXTENT, 2 * PER_EXTENT)
    await d.flush(G, SOURCE)
    await d.write(G, SOURCE, 2, 1)
    await _copied(d, G, A)
    await d.read(G, SOURCE, 0, 3 * PER_EXTENT)
    await d.restore(G, A)
    await _copied(d, G, A)
    await d.read(G, SOURCE, 0, 3 * PER_EXTENT)


async def restore_begun_again(d: Driver) -> None:
    """D4, D5: a restore is begun again, which drops what hosts wrote; is broken off by force; and is
    begun once more."""
    await _synchronized(d, G, A)
    await d.fracture((G, A))
    await d.write(G, SOURCE, 0, 2 * PER_EXTENT)
    await d.rate(G, A, 256 << 10)
    await d.restore(G, A)
    await d.write(G, SOURCE, 1, PER_EXTENT)
    await d.flush(G, SOURCE)
    await d.restore(G, A)
    await d.read(G, SOURCE, 0, 2 * PER_EXTENT)
    await d.write(G, SOURCE, 3, 2)
    await d.fracture((G, A), force=True)
    await d.write(G, SOURCE, 4, 2)
    await d.restore(G, A)
    await d.read(G, SOURCE, 0, 2 * PER_EXTENT)
    await _copied(d, G, A)


async def older_and_newer(d: Driver) -> None:
    """L6, D4: three points in time, one clone mirrored; restores from the oldest and the newest, and
    a clone that is mirrored again while a restore runs."""
    await _synchronized(d, G, A, B, C)
    await d.fracture((G, A))
    await d.write(G, SOURCE, 0, PER_EXTENT)
    await d.fracture((G, B))
    await d.write(G, SOURCE, PER_EXTENT - 2, 4)
    await d.rate(G, A, 512 << 10)
    await d.restore(G, A)
    await d.sync(G, B)
    await d.write(G, SOURCE, 1, 1)
    await _copied(d, G, A)
    await _synchronized(d, G, B)
    await d.restore(G, C)
    await d.read(G, SOURCE, 0, 2 * PER_EXTENT)
    await _copied(d, G, C)


async def a_clone_is_written_to(d: Driver) -> None:
    """L1, D1 for clones: a host writes to a fractured clone, it is restored from, and mirrored
    again."""
    await _synchronized(d, G, A)
    await d.fracture((G, A))
    await d.write(G, A, 0, 3)
    await d.flush(G, A)
    await d.write(G, A, PER_EXTENT, PER_EXTENT)
    await d.restore(G, A)
    await d.read(G, SOURCE, 0, 2 * PER_EXTENT)
    await _copied(d, G, A)
    await d.write(G, A, 2, 1)
    await d.sync(G, A)
    await _synchronized(d, G, A)
    await d.write(G, SOURCE, 0, 1)


async def reverse_sync(d: Driver) -> None:
    """D8: reads come from the clone where it differs, writes go to both, a flush flushes both; then
    the clone is mirrored, and what is written goes on to it."""
    await _synchronized(d, G, A, B)
    await d.fracture((G, A))
    await d.write(G, SOURCE, 0, 2 * PER_EXTENT)
    await d.rate(G, A, 512 << 10)
    await d.restore(G, A, reverse=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(d.write, G, SOURCE, 1, 2)
        nursery.start_soon(d.write, G, SOURCE, PER_EXTENT, PER_EXTENT)
        nursery.start_soon(d.read, G, SOURCE, 0, 2 * PER_EXTENT)
    await d.flush(G, SOURCE)
    await d.write(G, SOURCE, 2, 1)
    await d.read(G, SOURCE, 0, PER_EXTENT)
    await _copied(d, G, A)
    await d.write(G, SOURCE, 0, 3)
    await d.flush(G, SOURCE)
    await d.fracture((G, A))
    await d.write(G, SOURCE, 0, 1)
    await d.restore(G, A, reverse=True)
    await d.fracture((G, A), force=True)
    await d.write(G, SOURCE, 5, 1)
    await d.restore(G, A)
    await _copied(d, G, A)


async def two_groups_at_one_instant(d: Driver) -> None:
    """D3: clones of two groups are split off while hosts write to both."""
    await _synchronized(d, G, A)
    await _synchronized(d, H, A)

    async def one_after_the_other() -> None:
        for sector in range(6):
            await d.write_in_order(G, H, sector)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_after_the_other)
        await d.until(lambda: d.counts.writes >= 4)
        await d.fracture((G, A), (H, A))
    await d.flush(H, SOURCE)


async def checkpoints(d: Driver) -> None:
    """D1, D2: intent is trimmed between writes, flushed ones and others."""
    await _synchronized(d, G, A)
    for round_ in range(3):
        await d.write(G, SOURCE, round_ * PER_EXTENT, 3)
        await trio.sleep(0.03)
        await d.write(G, SOURCE, round_ * PER_EXTENT + 2, 2)
        await d.flush(G, SOURCE)
    await d.write(G, SOURCE, 0, 4 * PER_EXTENT - 3)
    await d.fracture((G, A))
    for extent in range(4):  # while a checkpoint flushes
        await trio.sleep(d.world.random.choice((0.0, 0.003, 0.01)))
        await d.write(G, SOURCE, extent * PER_EXTENT, 1)
    await trio.sleep(0.05)
    await d.write(G, A, 0, 2)
    await trio.sleep(0.05)
    await d.restore(G, A)
    await _copied(d, G, A)
    await trio.sleep(0.05)


async def configuration(d: Driver) -> None:
    """D10: clones and groups come and go while hosts write, and with what is not flushed yet."""
    await _synchronized(d, G, A)
    await d.fracture((G, A))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(d.write, G, SOURCE, 0, 2 * PER_EXTENT)
        nursery.start_soon(d.remove_clone, G, A)
    await d.write(G, SOURCE, 1, 1)
    await d.add_clone(G, A)
    await d.write(G, SOURCE, 2, 2)
    await _synchronized(d, G, A)
    await _synchronized(d, H, A)
    await d.fracture((H, A))
    await d.write(H, A, 2, 2)
    await d.remove_clone(H, A)
    await d.write(H, SOURCE, 0, 2)
    await d.remove_group(H)
    await d.add_group(H)
    await d.add_clone(H, A)
    await _synchronized(d, H, A)
    await d.write(H, SOURCE, 0, 1)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        sync_and_fracture,
        protected_restore,
        restore_begun_again,
        older_and_newer,
        a_clone_is_written_to,
        reverse_sync,
        two_groups_at_one_instant,
        checkpoints,
        configuration,
    )
}
