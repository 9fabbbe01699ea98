"""The command `clonefs`: what people type instead of `echo`.

A module for each command or small family of them. This one puts them together, and is the only
place where an error becomes one line on standard error and an exit status:

    0    done
    1    refused or failed; the line says what and why
    2    wrong usage, in one line too
    130  interrupted from the keyboard

A command raises ClonefsError, or lets an OSError through; it must never print an error and go on.
The modules import what is heavy (rich, trio, pyfuse3, the volume) only where it is used, so that
`clonefs status` starts fast.
"""

import errno
import os
from typing import IO, Any, NoReturn

import click

from clonefs import __version__
from clonefs.cli.completion import completion
from clonefs.cli.copies import fracture, restore, reverse_sync, sync, wait
from clonefs.cli.groups import add_clone, add_group, remove_clone, remove_group
from clonefs.cli.installing import install
from clonefs.cli.map import map_
from clonefs.cli.mount import mount, umount
from clonefs.cli.offline import check, dump
from clonefs.cli.status import status
from clonefs.cli.verify import verify
from clonefs.cli.volume import format_, grow
from clonefs.errors import ClonefsError

__all__ = ["main"]


SECTIONS = {
    "A volume and its mount": (format_, mount, umount),
    "Groups and clones": (add_group, add_clone, remove_clone, remove_group),
    "Copies": (sync, fracture, restore, reverse_sync, wait),
    "What there is": (status, map_, verify),
    "A volume that is not mounted": (check, dump, grow),
    "This machine": (install, completion),
}
_WIDEST_NAME = 14
_SETTINGS = {"help_option_names": ["-h", "--help"]}


class _Commands(click.Group):
    """The group of all commands, which turns what they raise into one line and a status."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the words before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _WrongUsage(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which somebody needs them."""
        return [command.name or "" for section in SECTIONS.values() for command in section]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line for each, in sections."""
        for heading, section in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(command.name or "", command.short_help or "") for command in section],
                    col_max=_WIDEST_NAME,
                )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _WrongUsage(error) from error
        except KeyboardInterrupt:
            ctx.exit(130)
        except ClonefsError as error:
            _refuse(ctx, error.reason)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output went away: click ends quietly
            _refuse(ctx, _sentence(error))


class _WrongUsage(click.ClickException):
    """What click says in three lines, in one, with where to read on."""

    exit_code = 2

    def __init__(self, error: click.UsageError) -> None:
        command = error.ctx.command_path if error.ctx else "clonefs"
        said = " ".join(error.format_message().split()).rstrip(".")
        super().__init__(f"{command}: {said}: see {command} --help")

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(self.message, file=file, err=file is None)


def _refuse(ctx: click.Context, reason: str) -> NoReturn:
    click.echo(f"clonefs: {' '.join(reason.splitlines())}", err=True)
    ctx.exit(1)


def _sentence(error: OSError) -> str:
    strerror = error.strerror or str(error)
    return strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {strerror}"


@click.group(cls=_Commands, no_args_is_help=False, context_settings=_SETTINGS)
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


for _section in SECTIONS.values():
    for _command in _section:
        _command.short_help = _command.get_short_help_str(200)  # or click cuts it off
        main.add_command(_command)
