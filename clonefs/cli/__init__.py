"""The command `clonefs`: what people type instead of `echo`.

A module for each command or small family of them. This one puts them together, and is the only
place where an error becomes one line on standard error and an exit status:

    0    done
    1    refused or failed; the line says what and why
    2    wrong usage (click says it)
    130  interrupted from the keyboard

A command raises ClonefsError, or lets an OSError through; it must never print an error and go on.
The modules import what is heavy (rich, trio, pyfuse3, the volume) only where it is used, so that
`clonefs status` starts fast.
"""

import errno
import os
from typing import Any, NoReturn

import click

from clonefs import __version__
from clonefs.cli.copies import fracture, restore, reverse_sync, sync, wait
from clonefs.cli.groups import add_clone, add_group, remove_clone, remove_group
from clonefs.cli.map import map_
from clonefs.cli.mount import mount, umount
from clonefs.cli.offline import check, dump
from clonefs.cli.status import status
from clonefs.cli.verify import verify
from clonefs.cli.volume import format_
from clonefs.errors import ClonefsError

__all__ = ["main"]


class _Commands(click.Group):
    """The group of all commands, which turns what they raise into one line and a status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)
        except ClonefsError as error:
            _refuse(ctx, error.reason)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output went away: click ends quietly
            _refuse(ctx, _sentence(error))


def _refuse(ctx: click.Context, reason: str) -> NoReturn:
    click.echo(f"clonefs: {' '.join(reason.splitlines())}", err=True)
    ctx.exit(1)


def _sentence(error: OSError) -> str:
    strerror = error.strerror or str(error)
    return strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {strerror}"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="clonefs", message="%(prog)s %(version)s")
def main() -> None:
    """Keep complete copies of a disk image, and restore one in an instant.

    A mount shows one directory for each clone group: the Source, which production runs on, and its
    Clones. Every command below only writes to or reads from the files under MOUNTPOINT/control, so
    anything that it does, echo can do. (Only fracture --freeze does more: it freezes file systems.)

    \b
    Example, from nothing to a copy that can be restored:
      clonefs format /var/lib/clonefs.meta
      clonefs mount /var/lib/clonefs.meta /mnt
      clonefs add-group /mnt payroll /srv/payroll.img
      clonefs add-clone /mnt/payroll nightly /backup/nightly.img
      clonefs wait /mnt/payroll/nightly
      clonefs fracture /mnt/payroll/nightly
      clonefs restore /mnt/payroll/nightly
    """


for _command in (
    format_,
    mount,
    umount,
    add_group,
    add_clone,
    remove_clone,
    remove_group,
    sync,
    fracture,
    restore,
    reverse_sync,
    status,
    map_,
    wait,
    verify,
    dump,
    check,
):
    main.add_command(_command)
