"""install: make clonefs a part of this machine, also for those who have only the Python package.

mount-helpers/ of the repository is clonefs/mount_helpers of the package. The work is done by its
`install`; here is only where it lies, and which program is to be called.
"""

import os
import subprocess
import sys
from pathlib import Path

import click

import clonefs
from clonefs.cli.arguments import directory
from clonefs.errors import missing

_PACKAGE = Path(clonefs.__file__).parent


def helpers() -> Path:
    """The directory with what other programs of the machine need."""
    for place in (_PACKAGE / "mount_helpers", _PACKAGE.parent / "mount-helpers"):
        if place.is_dir():
            return place
    raise missing(f"{_PACKAGE} is incomplete: mount_helpers is not in it: install clonefs again")


@click.command()
@click.option("--uninstall", is_flag=True, help="Take away what was put there.")
@click.option(
    "--prefix", type=directory, metavar="DIR", help="Where it goes; /usr/local if not given."
)
@click.pass_context
def install(ctx: click.Context, uninstall: bool, prefix: Path | None) -> None:
    """Make clonefs a part of this machine: run it as root.

    It puts links to this program, the helpers of mount(8) and umount(8), clonefs-loop, systemd units,
    manual pages and shell completion where the machine looks for them. Run it as often as you like;
    what is mounted stays mounted. This program must stay where it is.

    \b
    Example:
      clonefs install
      clonefs install --uninstall
    """
    options = ["--uninstall"] if uninstall else []
    options += ["--prefix", str(prefix)] if prefix else []
    command = ["bash", str(helpers() / "install"), "--program", str(_program()), *options]
    ctx.exit(subprocess.run(command, check=False).returncode)


def _program() -> Path:
    """What was called, by the name that it has without links: one of them may be to be replaced."""
    called = Path(os.path.realpath(sys.argv[0]))
    return called if called.name == "clonefs" else Path(sys.executable).parent / "clonefs"
