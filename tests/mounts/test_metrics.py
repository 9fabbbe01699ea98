"""control/metrics of real mounts: what they really show, against the page and against what was done."""

import errno
import json
import os
import re
import select
import subprocess
from pathlib import Path

import pytest
from prometheus_client.samples import Sample

from tests.mounts.faulty import FaultyDevice
from tests.mounts.mount import (
    EXTENT,
    Group,
    MiB,
    Mount,
    copied_by_reading,
    noise,
    opened,
    read,
    wait_for,
    write,
)
from tests.test_metrics import documented, parsed

Labels = dict[str, str]


def shown(mount: Mount) -> dict[str, list[Sample]]:
    """The samples by the names of their metrics."""
    families = parsed(mount.control("metrics").path.read_bytes())
    return {name: family.samples for name, family in families.items()}


def value(mount: Mount, name: str, **labels: str) -> float:
    """The one sample with these labels."""
    metric = re.sub(r"_(count|sum)$", "", name)
    found = [
        sample.value
        for sample in shown(mount)[metric if metric in shown(mount) else name]
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def host_io(mount: Mount, group: Group) -> dict[str, int]:
    """What status.json has of it."""
    status = json.loads(mount.control("status.json").read())
    io: dict[str, int] = status["groups"][group.name]["host_io"]
    return io


@pytest.fixture
def busy(mount: Mount) -> Group:
    """A group in a restore, of which everything was used once."""
    group = mount.add_group(data=noise("good", 4 * MiB))
    clone = group.add_fractured()
    clone.control("verify").write("1")
    wait_for(lambda: clone.control("verify").read().startswith("done"), "for the verification")
    write(group.source, 0, noise("bad", 2 * MiB))
    clone.rate(1)
    clone.restore()
    clone.wait_for_the_one_extent()
    copied_by_reading(clone, 20)
    write(group.source, 21 * EXTENT + 5, b"in part")
    read(clone.path, 0, 512)
    with opened(group.source, os.O_RDWR) as fd:
        os.fsync(fd)
    return group


def test_a_mount_shows_what_is_documented_and_nothing_else(mount: Mount, busy: Group) -> None:
    families = parsed(mount.control("metrics").path.read_bytes())
    found = {
        name: (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"mountpoint", "le"},
        )
        for name, family in families.items()
    }
    told = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, (kind, _, labels, _) in documented().items()
    }
    assert found == told
    for family in families.values():
        identities = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert len(set(identities)) == len(identities)
        assert {s.labels["mountpoint"] for s in family.samples} == {str(mount.mountpoint)}


def test_what_was_done_is_counted(mount: Mount, busy: Group) -> None:
    of_group, of_clone = {"group": busy.name}, {"group": busy.name, "clone": "nightly"}
    source = of_group | {"lu": "source"}
    requests = {
        op: value(mount, "clonefs_host_requests_total", op=op, **source)
        for op in ("read", "write", "flush")
    }
    assert requests["read"] >= 1
    assert requests["write"] >= 2
    assert requests["flush"] == 1
    for op, count in requests.items():
        assert value(mount, "clonefs_host_request_seconds_count", op=op, **source) == count
        assert value(mount, "clonefs_host_request_seconds_sum", op=op, **source) > 0
        assert value(mount, "clonefs_host_errors_total", op=op, **source) == 0
    assert value(mount, "clonefs_host_bytes_total", op="read", **source) == 512 * requests["read"]
    assert value(mount, "clonefs_host_bytes_total", op="write", **source) == 2 * MiB + 7
    assert host_io(mount, busy) == {
        "reads": requests["read"],
        "read_bytes": 512 * requests["read"],
        "writes": requests["write"],
        "written_bytes": 2 * MiB + 7,
    }
    # The extent that was read, and the one that was written in part; one was swept.
    cod = of_clone | {"engine": "cod"}
    assert value(mount, "clonefs_copied_extents_total", **cod) == 2
    assert value(mount, "clonefs_copied_bytes_total", **cod) == 2 * EXTENT
    assert value(mount, "clonefs_cod_copy_seconds_count", **of_group) == 2
    # The read may have had its answer before the copy.
    assert value(mount, "clonefs_cod_wait_seconds_count", **of_group) >= 1
    sync = of_clone | {"engine": "sync"}
    assert value(mount, "clonefs_copied_extents_total", **sync) == 64 + 1
    assert value(mount, "clonefs_clone_pending_extents", **of_clone) == 32 - 3
    assert value(mount, "clonefs_clone_delta_extents", **of_clone) == 32 - 3
    assert value(mount, "clonefs_clone_copy_done_extents", **of_clone) == 3
    assert value(mount, "clonefs_clone_copy_extents", **of_clone) == 32
    assert value(mount, "clonefs_group_protected_extents", **of_group) == 1
    assert value(mount, "clonefs_clone_rate_limit_bytes_per_second", **of_clone) == 1
    assert value(mount, "clonefs_clone_different_extents", **of_clone) == 0
    assert value(mount, "clonefs_map_writes_total", map="delta", **of_group) >= 1
    assert value(mount, "clonefs_map_writes_total", map="protected", **of_group) >= 1
    bytes_written = value(mount, "clonefs_map_written_bytes_total", map="protected", **of_group)
    assert bytes_written >= 1024
    assert bytes_written % 512 == 0
    assert value(mount, "clonefs_flushes_total", **source) >= 1
    assert value(mount, "clonefs_commit_seconds_count") >= 6
    before = value(mount, "clonefs_commands_total", result="refused")
    with mount.refuses(errno.EBUSY, f"{busy.name}/nightly"):
        busy.clone("nightly").fracture()
    assert value(mount, "clonefs_commands_total", result="refused") == before + 1


def test_one_state_holds(mount: Mount, busy: Group) -> None:
    def holding(name: str, label: str) -> list[str]:
        return [sample.labels[label] for sample in shown(mount)[name] if sample.value == 1]

    assert holding("clonefs_clone_state", "state") == ["restoring"]
    assert len(shown(mount)["clonefs_clone_state"]) == 7
    assert holding("clonefs_clone_condition", "condition") == ["normal"]
    assert holding("clonefs_group_state", "state") == ["normal"]
    busy.clone("nightly").fracture("force")
    assert holding("clonefs_clone_state", "state") == ["reverse-out-of-sync"]
    assert holding("clonefs_clone_condition", "condition") == ["waiting"]


def test_a_checkpoint_makes_the_age_begin_anew(mount: Mount, busy: Group) -> None:
    def count() -> float:
        return value(mount, "clonefs_checkpoints_total", group=busy.name)

    before = count()
    wait_for(lambda: count() > before, "for a checkpoint")
    assert value(mount, "clonefs_checkpoint_age_seconds", group=busy.name) < 5


def test_errors_are_counted_and_said_once(mount_above: Mount, device: FaultyDevice) -> None:
    mount = mount_above
    mount.expect_in_log("source: read at")
    backing = device.path / "source.img"
    backing.write_bytes(noise("good", 1 * MiB))
    group = Group(mount, "g", backing)
    mount.control("add_group").write(f"g {backing}")
    device.fail(backing, "read")
    for number in range(50):
        with pytest.raises(OSError):
            read(group.source, number * 512, 512)
    counted = value(mount, "clonefs_host_errors_total", group="g", lu="source", op="read")
    assert counted == 50
    assert value(mount, "clonefs_host_requests_total", group="g", lu="source", op="read") == 0
    lines = [line for line in mount.log.read_text().splitlines() if "read at" in line]
    assert len(lines) == 1
    device.mend()
    mount.umount()
    lines = [line for line in mount.log.read_text().splitlines() if "read at" in line]
    assert len(lines) == 2
    assert "(one of 49 more in the last" in lines[1]


def test_a_read_only_mount_has_metrics(mount: Mount, busy: Group) -> None:
    mount.remount("ro")
    read(busy.source, 0, 512)
    assert value(mount, "clonefs_read_only") == 1
    assert value(mount, "clonefs_volume_failed") == 0
    assert value(mount, "clonefs_host_bytes_total", group=busy.name, lu="source", op="read") == 512
    assert value(mount, "clonefs_clone_pending_extents", group=busy.name, clone="nightly") == 29
    assert value(mount, "clonefs_commit_seconds_count") == 0
    assert set(documented()) - set(shown(mount)) == {
        "clonefs_checkpoint_age_seconds",
        "clonefs_clone_different_extents",  # the verification was one of the mount before
        "clonefs_clone_unreadable_extents",
    }


def test_host_io_wakes_nobody(mount: Mount) -> None:
    group = mount.add_group(1 * MiB)
    with opened(mount.control("status.json").path, os.O_RDONLY) as fd:
        os.read(fd, 1 << 20)
        poll = select.poll()
        poll.register(fd, select.POLLPRI | select.POLLERR)
        assert poll.poll(0) == []
        write(group.source, 0, b"x" * 512)
        assert host_io(mount, group)["writes"] == 1
        assert poll.poll(0) == []
        mount.add_group(1 * MiB)  # this does
        assert poll.poll(60000) != []


def test_a_descriptor_shows_the_state_at_its_open(mount: Mount, busy: Group) -> None:
    with opened(mount.control("metrics").path, os.O_RDONLY) as fd:
        busy.clone("nightly").fracture("force")
        text = b"".join(iter(lambda: os.read(fd, 4096), b""))
        again = os.pread(fd, 1 << 20, 0)
    assert again == text
    state = [s for s in parsed(text)["clonefs_clone_state"].samples if s.value == 1]
    assert [s.labels["state"] for s in state] == ["restoring"]


# What the page says about scraping


def command(number: int, mount: Mount, directory: Path) -> str:
    """A command of the page that is marked as tested, for this mount."""
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    found: str = re.findall(r"<!-- tested -->\n```[a-z ]*\n(.*?)```", text, re.DOTALL)[number]
    assert "/srv/clonefs" in found
    return found.replace("/srv/clonefs", str(mount.mountpoint)).replace(
        "/var/lib/prometheus/node-exporter", str(directory)
    )


def test_a_file_for_node_exporter_is_there_whole(mount: Mount, busy: Group, tmp_path: Path) -> None:
    script = command(0, mount, tmp_path)
    subprocess.run(["sh", "-c", script], check=True, timeout=60)
    assert set(parsed((tmp_path / "clonefs.prom").read_bytes())) == set(documented())
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["clonefs.prom"]
    broken = script.replace(str(mount.mountpoint), str(tmp_path / "gone"))
    before = (tmp_path / "clonefs.prom").read_bytes()
    assert subprocess.run(["sh", "-c", broken], check=False, capture_output=True).returncode != 0
    assert (tmp_path / "clonefs.prom").read_bytes() == before


def test_the_script_for_socat_answers_in_http(mount: Mount, busy: Group, tmp_path: Path) -> None:
    script = tmp_path / "clonefs-metrics"
    script.write_text(command(1, mount, tmp_path))
    script.chmod(0o700)
    answer = subprocess.run([script], check=True, capture_output=True, timeout=60).stdout
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.splitlines() == [
        b"HTTP/1.0 200 OK",
        b"Content-Type: text/plain; version=0.0.4",
    ]
    assert set(parsed(body)) == set(documented())
