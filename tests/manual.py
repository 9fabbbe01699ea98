"""The manual pages under docs/man, made from what `--help` says and from docs/control-files.md.

    python -m tests.manual

writes them anew. What is only in them (what a mount helper takes, exit status, files, examples)
stands here.
"""

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from clonefs import __version__
from clonefs.cli import SECTIONS, main
from clonefs.fuse.options import EXPLAINED
from tests.test_docs import ROOT, cells, page, section, tables

MAN = ROOT / "docs/man"
_WIDTH = 80


def pages() -> dict[str, str]:
    """Each manual page by the name of its file."""
    return {
        "clonefs.1": "\n".join(_wrapped(_clonefs())) + "\n",
        "mount.clonefs.8": "\n".join(_wrapped(_mount_clonefs())) + "\n",
    }


# roff ------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text as it is: no character of it is a request, and a hyphen can be copied to a shell."""
    return text.replace("\\", "\\e").replace("-", "\\-")


def _line(text: str) -> str:
    """A line of text: one that begins with a dot is a request otherwise."""
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _marked_up(markdown: str) -> str:
    """A cell of a table: code is bold, emphasis is italic, a link is its text."""
    markdown = re.sub(r"[;,] see (below|\*Verification\*)", "", markdown)  # it is not in the page
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", markdown).replace("\\|", "|")
    text = _plain(text).replace("→", "\\(->").replace("×", "\\(mu")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return _line(re.sub(r"\*([^* ][^*]*)\*", r"\\fI\1\\fR", text))


def _capitals(text: str) -> str:
    """Help with what is to be put in for a word in italics."""
    return _line(re.sub(r"\b[A-Z]{4,}(?:/[A-Z]+)*\b", r"\\fI\g<0>\\fR", _plain(text)))


def _tagged(tag: str, *lines: str) -> Iterator[str]:
    yield from (".TP", tag, *lines)


def _literal(lines: Iterable[str]) -> Iterator[str]:
    yield from (".PP", ".RS 4", ".nf")
    yield from (_line(_plain(line)) for line in lines)
    yield from (".fi", ".RE")


def _head(name: str, number: int, manual: str) -> Iterator[str]:
    yield '.\\" Made by python -m tests.manual: change what it is made from.'
    yield f'.TH {name.upper()} {number} {_released()} "clonefs {__version__}" "{manual}"'
    yield from (".nh", ".ad l")  # a path that is broken at a hyphen is another path


def _released() -> str:
    """The date of this version in the changelog."""
    found = re.search(
        rf"^## {re.escape(__version__)}, ([0-9-]+)$", page("changelog.md"), re.MULTILINE
    )
    assert found is not None, f"the changelog has no heading `## {__version__}, DATE`"
    return found[1]


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    """Lines of at most 80 characters, but for those that are kept as they are."""
    kept = False
    for line in lines:
        kept = line == ".nf" or (kept and line != ".fi")
        if kept or len(line) <= _WIDTH or line.startswith((".SH", ".TH")):
            yield line
        else:
            yield from map(
                _line, textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)
            )


# From the help ---------------------------------------------------------------------------------


def _help(command: click.Command) -> Iterator[str]:
    """Its paragraphs; one that begins with a backspace is kept as it is."""
    text = inspect.cleandoc(command.help or "")
    for number, paragraph in enumerate(text.split("\n\n")):
        if paragraph.startswith("\b"):
            _, title, *lines = paragraph.splitlines()
            yield from (".PP", _capitals(title))
            yield from _literal(line.removeprefix("  ") for line in lines)
        else:
            if number:
                yield ".PP"
            yield _capitals(" ".join(paragraph.split()))


def _options(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, str]]:
    """What each option is called, and what it does."""
    for param in command.params:
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            yield record


def _option_tag(names: str) -> str:
    """`--size SIZE`: the name bold, the value in italics."""
    words = []
    for word in names.split(" "):
        comma = "," if word.endswith(",") else ""
        font = "B" if word.startswith("-") else "I"
        words.append(f"\\f{font}{_plain(word.removesuffix(','))}\\fR{comma}")
    return " ".join(words)


def _synopsis(command: click.Command, ctx: click.Context) -> str:
    short = [_option_tag(names.split(", ")[-1]) for names, _ in _options(command, ctx)]
    given = [f"[{each}]".replace(" ", "\\~") for each in short]
    given += [
        _argument(param, ctx) for param in command.params if isinstance(param, click.Argument)
    ]
    return " ".join([f"\\fBclonefs {_plain(command.name or '')}\\fR", *given])


def _argument(param: click.Argument, ctx: click.Context) -> str:
    return (
        f"\\fI{_plain(param.make_metavar(ctx)).strip('[]')}\\fR"
        if param.required
        else (f"[\\fI{param.make_metavar(ctx).strip('[]')}\\fR]")
    )


def _command(command: click.Command) -> Iterator[str]:
    ctx = click.Context(command, info_name=command.name, help_option_names=[])
    yield from _tagged(_synopsis(command, ctx))
    yield from (".RS",)
    yield from _help(command)
    for names, text in _options(command, ctx):
        yield from _tagged(_option_tag(names), _capitals(text))
    if command.name == "mount":
        yield from (".PP", "What \\fB\\-o\\fR takes is in \\fBmount.clonefs\\fR(8).")
    yield ".RE"


# From control-files.md -------------------------------------------------------------------------


def _control_files() -> Iterator[str]:
    text = page("control-files.md")
    for heading in ("### control/", "### control/GROUP/", "### control/GROUP/CLONE/"):
        yield f".SS MOUNTPOINT/{heading.removeprefix('### ')}"
        for name, mode, what in cells(tables(section(text, heading))[0])[1:]:
            yield from _tagged(f"{_marked_up(name)} ({mode})", _marked_up(what))


def _words(heading: str, number: int = 0) -> Iterator[str]:
    for word, meaning, *_ in cells(tables(section(page("control-files.md"), heading))[number])[1:]:
        yield from _tagged(f"\\fB{_plain(word)}\\fR", _marked_up(meaning))


# The pages -------------------------------------------------------------------------------------


def _clonefs() -> Iterator[str]:
    ctx = click.Context(main, info_name="clonefs")
    yield from _head("clonefs", 1, "User Commands")
    yield from (
        ".SH NAME",
        "clonefs \\- full point\\-in\\-time copies of disk images, restored in an instant",
    )
    yield from (
        ".SH SYNOPSIS",
        "\\fBclonefs\\fR \\fICOMMAND\\fR [\\fIOPTION\\fR ...] \\fIARGUMENT\\fR ...",
    )
    yield ".SH DESCRIPTION"
    yield from _help(main)
    yield from _DESCRIPTION
    yield ".SH OPTIONS"
    for names, text in _options(main, ctx):
        yield from _tagged(_option_tag(names), _capitals(text))
    yield ".SH COMMANDS"
    for heading, commands in SECTIONS.items():
        yield f".SS {heading}"
        for command in commands:
            yield from _command(command)
    yield ".SH STATES"
    yield from _words("## States")
    yield ".SH CONDITIONS"
    yield from _words("### Conditions")
    yield ".SH CONTROL FILES"
    yield from _CONTROL_FILES
    yield from _control_files()
    yield from _CLONEFS_END


_DESCRIPTION = r"""
.PP
A Clone is first a mirror of its Source: what is written to the Source goes to both, and what
differs is
copied.
Once they are equal it can be \fIfractured\fR, split off: then it is a complete copy of that
instant, and may
be written to.
A \fIrestore\fR takes effect at once, whatever the size: the next read of the Source shows what
the clone has,
and the copying goes on behind it while the Source is read and written.
The clone does not change by that, so that the same restore can be made again.
""".strip().splitlines()

_CONTROL_FILES = r"""
Whatever the commands do is done by reading and writing these files (r, w: can be read,
written).
One write(2) is one whole command, and has taken effect when it returns.
If it fails nothing has changed, and the file \fBerror\fR in the same directory says why.
\fBpoll\fR(2) wakes when what was read from a file has changed.
""".strip().splitlines()

_CLONEFS_END = r"""
.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
Refused or failed. One line on standard error says what, why, and what to do next.
.TP
.B 2
Wrong usage, with one line too.
.TP
.B 130
Interrupted from the keyboard.
.SH ENVIRONMENT
.TP
.B NO_COLOR
If it is set to anything, there are no colours, unless \fB\-\-color always\fR wants them. There
are none in a
pipe.
.SH FILES
.TP
.I MOUNTPOINT/GROUP/source
The Source of a group, a file of fixed size. \fBlosetup\fR(8), \fBmkfs\fR(8) and \fBmount\fR(8)
work on it.
.TP
.I MOUNTPOINT/GROUP/CLONE
A clone. It can be written to while it is fractured.
.TP
.I MOUNTPOINT/control/
The control files.
.TP
.I /etc/fuse.conf
A user who is not root needs \fBuser_allow_other\fR there for the mount option
\fBallow_other\fR.
.SH EXAMPLES
A virtual machine's image gets a copy every night, at an instant at which its file system is
frozen:
.PP
.RS 4
.nf
clonefs sync \-\-wait /mnt/payroll/nightly
fsfreeze \-\-freeze /srv/payroll
clonefs fracture /mnt/payroll/nightly
fsfreeze \-\-unfreeze /srv/payroll
.fi
.RE
.PP
It is put back. What is in a page cache above the Source knows nothing of that, so the file
system is unmounted
and its loop device detached first:
.PP
.RS 4
.nf
umount /srv/payroll
clonefs\-loop detach /mnt/payroll/source
clonefs restore /mnt/payroll/nightly
mount "$(clonefs\-loop attach /mnt/payroll/source)" /srv/payroll
.fi
.RE
.PP
The same without the command:
.PP
.RS 4
.nf
echo 1 > /mnt/control/payroll/nightly/protected_restore
.fi
.RE
.SH SEE ALSO
.BR mount.clonefs (8),
.BR fuse (4),
.BR fsfreeze (8),
.BR losetup (8),
.BR poll (2)
""".strip().splitlines()


def _mount_clonefs() -> Iterator[str]:
    yield from _head("mount.clonefs", 8, "System Administration")
    yield from _MOUNT_BEGIN
    for name, text in EXPLAINED.items():
        value = "\\fIN\\fR" if name.endswith("=") else ""
        yield from _tagged(f"\\fB{_plain(name)}\\fR{value}", _capitals(text))
    yield from _MOUNT_END


_MOUNT_BEGIN = r"""
.SH NAME
mount.clonefs, umount.clonefs \- mount and unmount clonefs
.SH SYNOPSIS
.B mount \-t clonefs
[\fB\-fnsv\fR]
[\fB\-o\fR \fIoptions\fR]
.I META MOUNTPOINT
.PP
.B umount
[\fB\-flv\fR]
.I MOUNTPOINT
.SH DESCRIPTION
\fBmount\fR(8) and \fBumount\fR(8) call these for the type \fBclonefs\fR and for lines of
\fBfstab\fR(5).
They leave the work to \fBclonefs mount\fR and \fBclonefs umount\fR.
.I META
is a metadata volume that \fBclonefs format\fR has made, a file or a block device.
.PP
\fBmount\fR returns once the tree is there.
After a crash it recovers by itself.
A mount point with a clonefs whose daemon has died is mounted anew.
.PP
\fBumount\fR returns once everything is on disk.
It does not wait with \fB\-l\fR and \fB\-f\fR.
While the same tree is mounted elsewhere too, by a bind mount, the daemon goes on, and a line
says so.
A mount whose daemon has died is taken away.
.SH OPTIONS
.TP
.B \-f
Do nothing but look at the options; of \fBumount\fR: unmount by force, without waiting.
.TP
.B \-l
Of \fBumount\fR: take the mount away now, and let the daemon end when nobody uses it any more.
.TP
.B \-n
Taken, and does nothing.
.TP
.B \-s
Leave out options that are not known, instead of refusing them.
.TP
.B \-v
Say what was done.
.SH MOUNT OPTIONS
Behind \fB\-o\fR, in the fourth field of a line of \fBfstab\fR(5), and with \fBclonefs mount
\-o\fR:
""".strip().splitlines()

_MOUNT_END = r"""
.PP
\fBdefaults\fR, \fBsuid\fR, \fBdev\fR, \fBexec\fR, \fBatime\fR and \fBasync\fR do nothing.
Options that are for \fBmount\fR(8) and \fBsystemd\fR(1) are left to them: \fBauto\fR,
\fBnoauto\fR,
\fBnofail\fR, \fB_netdev\fR, \fBuser\fR, \fBusers\fR, \fBowner\fR, \fBgroup\fR, \fBx\-\fR...
and others.
\fBremount\fR is refused: unmount, and mount with other options.
.PP
With \fBuser\fR in \fBfstab\fR(5) a user who can read and write the volume mounts it, and owns
the tree.
.SH EXIT STATUS
.TP
.B 0
Mounted, unmounted.
.TP
.B 1
Wrong usage.
.TP
.B 32
Not mounted; not unmounted, or not closed cleanly. One line says why.
.SH FILES
.TP
.I /etc/clonefs/NAME.conf
What the systemd units \fBclonefs@\fR\fINAME\fR and \fBclonefs\-loop@\fR\fINAME\fR take:
\fBMETA=\fR,
\fBMOUNTPOINT=\fR, \fBOPTIONS=\fR and \fBLOOPS=\fR, a line each.
.TP
.I /run/mount/utab
The table in which \fBumount\fR(8) finds that it has to call \fBumount.clonefs\fR.
.TP
.I /etc/fuse.conf
A user who is not root needs \fBuser_allow_other\fR there for \fBallow_other\fR.
.SH EXAMPLES
.RS 4
.nf
mount \-t clonefs /var/lib/clonefs.meta /mnt \-o allow_other
.fi
.RE
.PP
In \fI/etc/fstab\fR, mounted when somebody first looks at it:
.PP
.RS 4
.nf
/var/lib/clonefs.meta  /mnt  clonefs  noauto,x\-systemd.automount,allow_other  0 0
.fi
.RE
.SH SEE ALSO
.BR clonefs (1),
.BR fstab (5),
.BR mount (8),
.BR umount (8)
""".strip().splitlines()


def write_pages(directory: Path) -> None:
    """Write them below this directory."""
    directory.mkdir(exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    write_pages(MAN)
