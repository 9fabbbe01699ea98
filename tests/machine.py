"""A machine of its own for a test that installs things: a mount namespace with layers over the
directories that are written to.

What is installed, mounted or written to /etc inside is seen inside only, and is gone with it. Loop
devices are not: `close` detaches those over files of the mounts inside.
"""

import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clonefs.volume import format_volume
from tests.mounts.mount import DEADLINE_S, Loop, MiB, wait_for

TOP = Path(__file__).resolve().parent.parent
PROGRAM = TOP / ".venv/bin/clonefs"

_UNSHARE = ("unshare", "--mount", "--propagation", "private")

# What programs of the test write to; /mnt is for everybody, tmp_path is for root alone. First it lets go
# of what other tests have mounted at the moment: they could not take it down as long as it is here.
_LAYERS = """
set -e
awk '$0 ~ / - (fuse[.][^ ]+|[^ ]+ [/]dev[/]loop)/ { print $5 }' /proc/self/mountinfo | sort -r |
    while read -r mounted; do umount --lazy "$mounted" || true; done
mount -t tmpfs tmpfs {layers}
for directory in $(realpath /sbin) /usr/local /etc; do
    name={layers}/$(echo "$directory" | tr / -)
    mkdir "$name" "$name.work"
    mount -t overlay -o lowerdir="$directory",upperdir="$name",workdir="$name.work" overlay "$directory"
done
mkdir -p /run/mount /run/clonefs-loop /run/systemd/journal
mount -t tmpfs tmpfs /run/mount
mount -t tmpfs tmpfs /run/systemd/journal
mount -t tmpfs tmpfs /run/clonefs-loop
mount -t tmpfs -o mode=1777 tmpfs /mnt
: > /etc/fstab
echo ready
exec cat
"""


@dataclass
class Machine:
    """The namespace, as long as its process lives. `work` is a directory that is the test's."""

    work: Path
    holder: "subprocess.Popen[str]" = field(init=False)

    def __post_init__(self) -> None:
        layers = self.work / "layers"
        layers.mkdir()
        self.meta = self.work / "meta"
        self.mountpoint = self.work / "mnt"
        self.mountpoint.mkdir()
        format_volume(self.meta, size=4 * MiB, force=False)
        self.holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _LAYERS.replace("{layers}", shlex.quote(str(layers)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"

    def path(self, inside: Path | str) -> Path:
        """Where a path of inside is for the test."""
        return Path(f"/proc/{self.holder.pid}/root{inside}")

    def start(self, *command: str | Path, **options: Any) -> "subprocess.Popen[str]":
        """Start a program inside."""
        inside = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--wd=/"]
        return subprocess.Popen([*inside, *map(str, command)], text=True, **options)

    def result(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a program inside."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def run(self, *command: str | Path) -> str:
        """Run a program inside that must succeed and must not complain; what it prints."""
        done = self.result(*command)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done}"
        return done.stdout

    def refusal(self, *command: str | Path, status: int = 32) -> str:
        """The one line that a program says when it fails with this exit status."""
        done = self.result(*command)
        assert done.returncode == status, done
        line, end, rest = done.stderr.partition("\n")
        assert (end, rest) == ("\n", ""), done
        return line

    def install(self, *arguments: str | Path) -> None:
        """Install clonefs inside."""
        self.run(TOP / "mount-helpers/install", *arguments)

    def let_everybody_use(self, *programs: Path) -> None:
        """Open FUSE, and the directories that the programs lie in, to everybody; inside only."""
        parents = {directory for program in programs for directory in program.parents}
        for directory in sorted(parents):
            if not directory.stat().st_mode & 0o001:
                layer = self.work / "layers" / f"open{str(directory).replace('/', '-')}"
                self.run("mkdir", layer, f"{layer}.work")
                layers = f"lowerdir={directory},upperdir={layer},workdir={layer}.work"
                self.run("mount", "-t", "overlay", "-o", layers, "overlay", directory)
                self.run("chmod", "o+x", directory)

        # udev makes it so; a machine without udev need not have it.
        self.run("mknod", "--mode=666", "/mnt/fuse", "c", "10", "229")
        self.run("mount", "--bind", "/mnt/fuse", "/dev/fuse")

    # What is mounted

    def tree(self) -> Path:
        """The mounted tree, for the test."""
        return self.path(self.mountpoint)

    def report(self) -> Any:
        """status.json."""
        return json.loads((self.tree() / "control/status.json").read_text())

    def is_mounted(self) -> bool:
        """Whether clonefs is at the mount point."""
        return self.result("findmnt", "-t", "fuse.clonefs", self.mountpoint).returncode == 0

    def daemons(self) -> list[int]:
        """The processes with the volume, or the mount point, among their arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if entry.name.isdigit() and str(self.meta).encode() in words:
                found.append(int(entry.name))
        return found

    def add_group(self, size: str = "8M", backing: Path | None = None) -> Path:
        """Make the group `payroll`; the path of its Source inside."""
        backing = backing or self.work / "production.img"
        tail = "" if backing.is_block_device() else f" size={size}"
        (self.tree() / "control/add_group").write_text(f"payroll '{backing}'{tail}\n")
        return self.mountpoint / "payroll/source"

    def add_clone(self) -> Path:
        """Make its clone `nightly`, and wait until it is synchronized."""
        control = self.tree() / "control/payroll"
        (control / "add_clone").write_text(f"nightly '{self.work}/nightly.img'\n")
        wait_for(
            lambda: (control / "nightly/state").read_text() == "synchronized\n", "for the clone"
        )
        return self.mountpoint / "payroll/nightly"

    def close(self) -> None:
        """Put everything away."""
        # A loop device keeps its mount alive, and has no path any more once that is taken away.
        Loop.take_away(Loop.all_below(self.work))
        for mountpoint in self._mountpoints():
            self.result("umount", "--lazy", "--internal-only", mountpoint)
        self.holder.communicate(timeout=DEADLINE_S)
        wait_for(lambda: not self.daemons(), "for the daemons to end")

    def _mountpoints(self) -> list[str]:
        raw = self.result("findmnt", "--raw", "--noheadings", "--output", "TARGET").stdout
        listed = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), raw)
        below = [line for line in listed.splitlines() if line.startswith((str(self.work), "/mnt/"))]
        return [line for line in reversed(below) if not line.endswith("/layers")]
