"""Who reads the kernel's requests: many that wait, hosts that die waiting, a pyfuse3 of another kind."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clonefs.fuse import session
from tests.mounts.faulty import FaultyDevice
from tests.mounts.mount import (
    DEADLINE_S,
    EXTENT,
    Group,
    Mount,
    assert_same,
    mounted,
    noise,
    opened,
    read,
    wait_for,
    write,
)

SIZE = 64 * EXTENT
GOOD = noise("good", SIZE)
MANY = 5 * session.IDLE_WORKERS
PLAIN = """
from clonefs.cli import main
from clonefs.fuse import session
session._fits = lambda: False
main()
"""


def test_what_is_used_of_pyfuse3_is_there() -> None:
    assert session._fits()


def test_another_pyfuse3_reads_in_its_own_way(tmp_path: Path) -> None:
    with mounted(tmp_path / "work", program=("-c", PLAIN)) as mount:
        mount.expect_in_log("this pyfuse3 is not known")
        assert "this pyfuse3 is not known" in mount.log.read_text()
        group = mount.add_group(data=GOOD)
        clone = group.add_fractured()
        with ThreadPoolExecutor(MANY) as hosts:
            list(
                hosts.map(lambda at: write(group.source, at, bytes(EXTENT)), range(0, SIZE, EXTENT))
            )
        clone.restore()
        assert_same(read(group.source, 0, SIZE), GOOD, "the Source")


def hanging_group(mount: Mount, device: FaultyDevice) -> Group:
    name = mount.new_name()
    group = Group(mount, name, device.path / f"{name}.img")
    group.backing.write_bytes(GOOD)
    mount.control("add_group").write(f"{name} {group.backing}")
    return group


def test_requests_that_wait_hold_up_nobody(mount_above: Mount, device: FaultyDevice) -> None:
    """More of them than there are idle workers, several times: workers come and go."""
    group, other = hanging_group(mount_above, device), mount_above.add_group(data=GOOD)
    for _ in range(3):
        fault = device.hang(group.backing, "read")
        with ThreadPoolExecutor(MANY + 1) as hosts:
            try:
                found = [hosts.submit(read, group.source, at * 512, 512) for at in range(MANY)]
                fault.wait_for_a_hang()
                for at in range(MANY):
                    sector = hosts.submit(read, other.source, at * 512, 512)
                    assert_same(sector.result(DEADLINE_S), GOOD[at * 512 :][:512], "the other")
                assert not any(each.done() for each in found)
            finally:
                fault.mend()
            for at, each in enumerate(found):
                assert_same(each.result(DEADLINE_S), GOOD[at * 512 :][:512], "what hung")


def test_hosts_that_are_killed_while_they_wait(mount_above: Mount, device: FaultyDevice) -> None:
    """The kernel takes a request back that nobody has read yet: to read one that is gone would stop
    the mount."""
    group, other = hanging_group(mount_above, device), mount_above.add_group(data=GOOD)
    fault = device.hang(group.backing, "read")
    reader = (
        sys.executable,
        "-c",
        "import sys; open(sys.argv[1], 'rb', 0).read(512)",
        group.source,
    )
    hosts = [subprocess.Popen(reader) for _ in range(session.IDLE_WORKERS + 4)]
    try:
        fault.wait_for_a_hang()
    finally:
        for host in hosts:
            host.send_signal(signal.SIGKILL)
    assert_same(read(other.source, 0, SIZE), GOOD, "the other")
    fault.mend()
    assert [host.wait() for host in hosts] == [-signal.SIGKILL] * len(hosts)
    assert_same(read(group.source, 0, SIZE), GOOD, "what hung")


def test_a_mount_whose_files_are_never_polled(tmp_path: Path) -> None:
    with mounted(tmp_path / "work", options="nopoll") as mount:
        clone = mount.add_group(data=GOOD).add_fractured()
        with opened(clone.control("state").path, os.O_RDONLY) as fd:
            os.read(fd, 100)
            poll = select.poll()
            poll.register(fd, select.POLLIN | select.POLLPRI | select.POLLERR)
            assert poll.poll(0) == [(fd, select.POLLIN)]
        clone.rate(1)
        write(clone.group.source, 0, bytes(8 * EXTENT))
        clone.sync()
        waiter = subprocess.Popen([sys.executable, "-m", "clonefs", "wait", clone.path])
        clone.rate("max")
        assert waiter.wait() == 0
        wait_for(lambda: clone.state == "synchronized")
