"""mount and umount: start the daemon, and wait until it has put everything on disk.

Both make a promise about the moment they return. mount: the tree can be used. umount: the volume is
closed, and was closed cleanly. The daemon itself is in clonefs.fuse, and is imported only in the
process that becomes it.
"""

import fcntl
import os
import select
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from clonefs import logs
from clonefs.cli import arguments, background, kernel, service_manager, tree
from clonefs.errors import ClonefsError, busy, failed, invalid, missing
from clonefs.fuse.options import EXPLAINED


class _Mount(click.Command):
    """Its help ends with what -o takes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line for each option."""
        with formatter.section("Mount options"):
            formatter.write_dl(list(EXPLAINED.items()))


@click.command(cls=_Mount)
@click.argument("meta", type=arguments.file)
@click.argument("mountpoint", type=arguments.directory)
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPTIONS",
    help="Mount options, separated by commas.",
    shell_complete=arguments.mount_options,
)
@click.option("--log-level", type=click.Choice(list(logs.LEVELS)), help="The same as -o log=LEVEL.")
@click.option("-f", "foreground", is_flag=True, help="Stay in front, and log to standard error.")
def mount(
    meta: Path,
    mountpoint: Path,
    options: tuple[str, ...],
    log_level: str | None,
    foreground: bool,
) -> None:
    """Mount the metadata volume META at the directory MOUNTPOINT.

    It returns once the tree is there, and the daemon goes on in the background and logs to journald,
    or to syslog.
    After a crash the mount recovers by itself. A mount that a killed daemon has left behind is
    taken away first.

    \b
    Example:
      clonefs mount /var/lib/clonefs.meta /mnt
      clonefs mount /var/lib/clonefs.meta /mnt -o allow_other,uid=1000
    """
    where = Path(os.path.realpath(mountpoint))
    _prepare(where)
    level = f"log={log_level}" if log_level else ""
    job = partial(_serve, meta.absolute(), where, ",".join(filter(None, (*options, level))))
    if foreground:
        logs.begin(logs.in_front(where))
        job(partial(service_manager.ready, f"{meta} is mounted on {where}"))
    else:
        _check_tree(where, background.start(job, partial(logs.in_background, where)))
        if not kernel.note_for_umount(meta.absolute(), where):
            click.echo(f"clonefs: umount {where} will not wait; clonefs umount does", err=True)


def _serve(meta: Path, mountpoint: Path, options: str, on_ready: Callable[[], None]) -> None:
    from clonefs.fuse.daemon import serve

    serve(meta, mountpoint, options, on_ready)


def _prepare(mountpoint: Path) -> None:
    """Make sure that this is a directory to mount on."""
    while kernel.is_dead(mountpoint):
        _detach_dead(mountpoint)
    if not mountpoint.exists():
        raise missing(f"there is no directory {mountpoint} to mount on: make it first")
    if not mountpoint.is_dir():
        raise invalid(f"{mountpoint} is not a directory to mount on: name one")
    there = kernel.topmost(mountpoint)
    if there is not None and there.fstype == kernel.FSTYPE:
        raise busy(f"clonefs is mounted at {mountpoint} already")


def _detach_dead(mountpoint: Path) -> None:
    there = kernel.topmost(mountpoint)
    if there is None or there.fstype != kernel.FSTYPE:
        kind = "the file system" if there is None else f"the {there.fstype} mount"
        raise failed(f"{kind} at {mountpoint} is dead, and is not clonefs: unmount it first")
    kernel.detach(mountpoint)


def _check_tree(mountpoint: Path, daemon: background.Daemon) -> None:
    """The daemon says that it is ready: see for ourselves, as whoever comes next will."""
    try:
        mountpoint.joinpath(tree.CONTROL, tree.STATUS).stat()
    except OSError as error:
        if kernel.is_dead(mountpoint):
            raise failed(f"{daemon.how_it_ended()} as soon as it had mounted") from error
        raise failed(f"{mountpoint} is mounted, but shows no tree: {error.strerror}") from error


@click.command()
@click.argument("mountpoint", type=arguments.mountpoint)
@click.option("--dead", is_flag=True, help="Only if its daemon has died; else do nothing.")
def umount(mountpoint: Path, dead: bool) -> None:
    """Unmount MOUNTPOINT, and return once everything is on disk.

    A copy that is running goes on at the next mount. A mount that is in use is left as it is. One
    whose daemon has died is taken away; the next mount recovers.

    \b
    Example:
      clonefs umount /mnt
    """
    where = Path(os.path.realpath(mountpoint))
    if dead and not kernel.is_dead(where):
        return
    there = kernel.topmost(where)
    if there is None or there.fstype != kernel.FSTYPE:
        raise invalid(f"{mountpoint} is not the mount point of a clonefs mount: see clonefs status")
    if kernel.is_dead(where):
        kernel.detach(where)
        click.echo(f"clonefs: the daemon of {where} had died; the next mount recovers", err=True)
        return
    report = tree.report(tree.mount_at(where))
    volume = Path(report["volume"]["path"])
    if report.get("daemon", {}).get("read_only"):
        _unmount_read_only(where, there, report["daemon"]["pid"])
        return
    kernel.unmount(where)
    _check_unmounted_everywhere(there)
    _wait_until_released(volume)
    _check_closed_cleanly(volume)


def _unmount_read_only(where: Path, there: kernel.MountEntry, pid: int) -> None:
    """Wait for the daemon itself: others may read the volume too, so its lock says nothing."""
    daemon = os.pidfd_open(pid)
    try:
        kernel.unmount(where)
        _check_unmounted_everywhere(there)
        select.select([daemon], [], [])
    finally:
        os.close(daemon)


def _check_unmounted_everywhere(gone: kernel.MountEntry) -> None:
    """A bind mount keeps the daemon going: to wait for its end would be to wait for ever."""
    for entry in kernel.mounts():
        if entry.device == gone.device and entry.fstype == gone.fstype:
            raise busy(
                f"{gone.mountpoint} is unmounted, but the daemon goes on for the mount at "
                f"{entry.mountpoint}: unmount that too"
            )


def _wait_until_released(volume: Path) -> None:
    """The daemon has an exclusive lock on its volume until the last of its writes is on disk."""
    try:
        with volume.open("rb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        raise _unknown(volume, error.strerror or str(error)) from error


def _check_closed_cleanly(volume: Path) -> None:
    from clonefs.volume import was_closed_cleanly

    try:
        clean = was_closed_cleanly(volume)
    except ClonefsError as error:
        raise _unknown(volume, error.reason) from error
    if not clean:
        raise failed(
            f"the daemon could not write everything out to {volume}: the next mount recovers"
        )


def _unknown(volume: Path, why: str) -> ClonefsError:
    return failed(f"unmounted, but whether {volume} was closed cleanly cannot be seen: {why}")
