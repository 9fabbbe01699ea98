"""The commands for people, on real mounts: maps drawn, status watched, waits that poll wakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounts.mount import DEADLINE_S, EXTENT, MiB, Mount, noise, run, wait_for, write
from tests.terminal import CLONEFS, on_terminal


def clonefs(*words: str | Path) -> str:
    """What the command prints."""
    return run(*CLONEFS, *words)


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


# wait and status --watch

# It would look again by itself only after an hour: what makes it go on is poll(2).
PATIENT = (
    "-c",
    (
        "import clonefs.cli.waiting as w, clonefs.cli.watch as v; from clonefs.cli import main; "
        "w._LONGEST_WAIT_S = v._BUSY_S = v._QUIET_S = 3600; main()"
    ),
)


def is_polling(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process waits in poll(2)."""
    assert process.poll() is None, "it has ended"
    return "poll" in Path(f"/proc/{process.pid}/wchan").read_text()


@pytest.mark.parametrize("words", [[], ["--state", "fractured"]])
def test_a_wait_is_woken_when_the_copy_is_done(shared: Mount, words: list[str]) -> None:
    group = shared.add_group(data=noise("good", 1 * MiB))
    clone = group.add_fractured()
    write(group.source, 0, noise("bad", 1 * MiB))
    clone.rate(1)
    clone.restore()
    command = [sys.executable, *PATIENT, "wait", *words, str(clone.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            wait_for(lambda: is_polling(process), "for the wait")
            clone.rate("max")
            assert process.communicate(timeout=60)[0] == b""
        finally:
            process.kill()
    assert process.returncode == 0
    assert clone.state == "fractured"


def test_a_wait_is_woken_when_the_daemon_dies(mount: Mount) -> None:
    clone = mount.add_group(data=noise("good", 1 * MiB)).add_fractured()
    write(clone.group.source, 0, noise("bad", 1 * MiB))
    clone.rate(1)
    clone.restore()
    command = [sys.executable, *PATIENT, "wait", str(clone.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: is_polling(process), "for the wait")
            mount.kill()
            said = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()
    assert process.returncode == 1
    assert said.startswith("clonefs: ")
    assert said.count("\n") == 1
    mount.start()


def test_a_restore_is_watched_from_its_beginning_to_its_end(shared: Mount) -> None:
    group = shared.add_group(data=noise("good", 1 * MiB))
    clone = group.add_fractured()
    write(group.source, 0, noise("bad", 1 * MiB))
    program = (sys.executable, *PATIENT)
    with on_terminal("status", "--watch", group.source.parent, program=program) as terminal:
        terminal.wait_for("nothing is being copied")
        clone.rate(1)
        clone.restore()
        terminal.wait_for("restoring")
        terminal.wait_for("/16")
        terminal.wait_for("waiting")
        seen = len(terminal.text)
        clone.rate("max")
        terminal.wait_for("nothing is being copied", after=seen)
        terminal.press("q")
        assert terminal.end() == 0


def test_a_pipe_gets_lines_of_a_sync(shared: Mount) -> None:
    group = shared.add_group(data=noise("good", 1 * MiB))
    command = [sys.executable, "-u", *PATIENT, "status", "--watch", str(group.source.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            wait_for(lambda: is_polling(process), "for the watch")
            clone = group.add_clone(sync=False)
            clone.rate(1)
            clone.sync()
            assert process.stdout is not None
            found = b""
            while b"1/16 6%" not in found:
                found += process.stdout.readline()
            assert b"synchronizing" in found
            clone.rate("max")
            while b"synchronized normal" not in found:
                found += process.stdout.readline()
        finally:
            process.kill()
    assert clone.state == "synchronized"


def paths_after(typed: str) -> str:
    """What a shell is told that `clonefs wait` with this, and a Tab, may become."""
    done = subprocess.run(
        CLONEFS,
        env=os.environ
        | {"_CLONEFS_COMPLETE": "fish_complete", "CLONEFS_WORDS": "clonefs\nwait"}
        | {"CLONEFS_WORD": typed},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert done.stderr == ""
    return done.stdout


def test_completion_waits_for_no_mount_that_hangs(mount: Mount) -> None:
    clone = mount.add_group(1 * MiB).add_fractured()
    typed = f"{mount.mountpoint}/"
    mount.signal(signal.SIGSTOP)
    try:
        assert paths_after(typed) == f"file\t{typed}\t\n"
    finally:
        mount.signal(signal.SIGCONT)
    assert paths_after(typed) == f"path\t{clone.path}\tfractured\n"
