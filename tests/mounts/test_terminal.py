"""The commands for people, on real mounts: maps drawn, status watched, waits that poll wakes."""

import json
import sys
from pathlib import Path

from tests.mounts.mount import EXTENT, MiB, Mount, noise, run, write


def clonefs(*words: str | Path) -> str:
    """What the command prints."""
    return run(sys.executable, "-m", "clonefs", *words)


# map


def test_a_map_of_a_restore_is_what_the_maps_say(shared: Mount) -> None:
    group = shared.add_group(data=noise("good", 4 * MiB))
    clone = group.add_fractured()
    for extent in (1, 2, 3, 40, 41, 63):
        write(group.source, extent * EXTENT, b"x")
    drawn = clonefs("map", "--ascii", clone.path).splitlines()
    assert drawn[2].split()[1] == ".###" + 36 * "." + "##" + 21 * "." + "#"
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()
    write(group.source, 41 * EXTENT, b"y" * EXTENT)
    write(group.source, 50 * EXTENT, b"y" * 512)
    cells = json.loads(clonefs("map", "--json", clone.path))[f"{group.name}/nightly"]
    assert {n for n, count in enumerate(cells["marked"]) if count} == clone.delta()
    assert (
        {n for n, count in enumerate(cells["protected"]) if count} == group.protected() == {41, 50}
    )
    assert cells["marked_extents"] == group.restore_status()["pending"]
    row = clonefs("map", "--ascii", group.source).splitlines()[2].split()[1]
    assert (row[41], row[50], row.count("#")) == ("P", "P", cells["marked_extents"])
    clone.rate("max")
    clone.wait("fractured")
    drawn = clonefs("map", "--ascii", clone.path).splitlines()
    assert drawn[1].startswith("2 different")


def test_a_map_of_millions_of_extents_is_drawn(shared: Mount) -> None:
    group = shared.add_group(16 << 30, extent=4096)
    clone = group.add_clone(sync=False)
    drawn = clonefs("map", clone.path).splitlines()
    assert "of 4194304 extents" in drawn[1]
    assert set("".join(line.split()[1] for line in drawn[2:-1])) == {"█"}
