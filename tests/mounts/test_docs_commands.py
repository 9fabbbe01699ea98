"""Every command that README and docs/ show is run, page by page, and prints what they show.

tests/pages.py has the convention. A page runs as root in an empty directory, with `clonefs` on its PATH,
and puts away all that it has made: what is left of mounts, loop devices and daemons fails it.
"""

import contextlib
import difflib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import pages
from tests.mounts.mount import Loop, mounts_below, run, wait_for
from tests.pages import PAGES, ROOT, Block

PAGE_DEADLINE_S = 200
RUNNABLE = [page for page in PAGES if pages.runnable(page)]
LANGUAGES = {
    "sh": "commands, which this module runs",
    "sh elsewhere": "commands that stand in ELSEWHERE",
    "text": "what the commands above it print",
    "usage": "the form of a command",
    "script": "a program of the reader's own",
    "sample": "what some command prints, with other data",
    **dict.fromkeys(
        ("cron", "fstab", "formula", "ini", "json", "mermaid", "picture"), "no commands"
    ),
}

# Commands of `sh elsewhere`, and the test that runs them, or why there is none.
HELPERS = "tests/test_mount_helpers.py"
PACKAGING = "tests/test_packaging.py"
FREEZE = "tests/mounts/test_freeze.py"
METRICS = "tests/mounts/test_metrics.py"
PROM = "/var/lib/prometheus/node-exporter/clonefs.prom"
TAKES_LONG = "takes minutes or more, and is for people"
NEEDS_SYSTEMD = "needs a running systemd"
ELSEWHERE = {
    "mount-helpers/demo": "takes a minute, and checks what it tells by itself",
    "tests/run": "it is what runs this",
    "tests/run --long": TAKES_LONG,
    "tests/run tests/mounts -x": TAKES_LONG,
    "mount-helpers/install": HELPERS,
    "mount-helpers/install --uninstall": HELPERS,
    "mount-helpers/setup": "README.md",
    "mount-helpers/setup --tests": "tests/run",
    "sudo tests/bench/run all --record": TAKES_LONG,
    "tests/run --long tests/mounts/test_crash.py tests/mounts/test_crash_file_systems.py": TAKES_LONG,
    ".venv/bin/python -m tests.state_tables": "tests/test_docs.py",
    "python -m clonefs.testing --seconds 3600": TAKES_LONG,
    "python -m clonefs.testing --replay 17": "tests/test_simulation.py",
    "python -m clonefs.testing --scenario reverse_sync --blow 'power cut' --number 212 --seed 0": (
        "tests/test_simulation.py"
    ),
    ".venv/bin/python -m tests.manual": "tests/test_manual.py",
    "apt install pipx python3-dev gcc libc6-dev pkgconf libfuse3-dev fuse3": PACKAGING,
    "export PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/opt/pipx/bin": PACKAGING,
    "pipx install .": PACKAGING,
    "/opt/pipx/bin/clonefs install": PACKAGING,
    "cat /srv/clonefs/control/metrics": METRICS,
    f"cat /srv/clonefs/control/metrics >{PROM}.new &&": METRICS,
    f"    mv {PROM}.new {PROM}": (METRICS),
    "socat TCP-LISTEN:9733,bind=127.0.0.1,reuseaddr,fork EXEC:/usr/local/bin/clonefs-metrics": (
        "listens on a port of the machine; the script that it calls is run by a test"
    ),
    "clonefs sync --wait /mnt/db/nightly": FREEZE,
    "clonefs fracture /mnt/db/nightly --freeze /srv/db": FREEZE,
    "journalctl -t clonefs": "needs a running journald",
    "journalctl CLONEFS_MOUNTPOINT=/srv/clonefs CLONEFS_GROUP=payroll -p warning": (
        "needs a running journald"
    ),
    "systemctl enable --now clonefs@NAME": NEEDS_SYSTEMD,
    "systemctl enable --now clonefs-loop@NAME": NEEDS_SYSTEMD,
}


def title(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


@dataclass
class Outcome:
    """What became of a page: its exit status, the line that it came to, and what each block printed."""

    status: int
    line: int
    outputs: list[str]


def run_page(page: Path, work: Path) -> Outcome:
    """Run the commands of a page in `work`. What they leave there stays."""
    outputs, last_line, temporary = (work.parent / name for name in ("outputs", "line", "tmp"))
    for directory in (work, outputs, temporary):
        directory.mkdir()
    file = work.parent / "page"
    file.write_text(pages.script(page, outputs, last_line))
    environment = {
        "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
        "HOME": str(work),
        "TMPDIR": str(temporary),
        "LC_ALL": "C.UTF-8",
    }
    process = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", file],
        # README begins where the program is.
        cwd=ROOT if page == ROOT / "README.md" else work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(PAGE_DEADLINE_S)
    except subprocess.TimeoutExpired:
        status = -signal.SIGALRM
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has left in the background
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    blocks = range(len(pages.runnable(page)))
    printed = [outputs / str(number) for number in blocks]
    texts = [each.read_text() if each.exists() else "" for each in printed]
    return Outcome(status, int(last_line.read_text()), texts)


# What a page leaves behind


def daemons_below(work: Path) -> list[int]:
    """The processes with a path below `work` among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if f"{work}/".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def put_away(work: Path) -> list[str]:
    """End whatever a page has left, file systems first; what that was."""
    mounts, loops = mounts_below(work), Loop.all_below(work)
    for place in mounts:
        # A page may have failed while a file system was frozen, and not every kernel lets go of it then.
        subprocess.run(["fsfreeze", "--unfreeze", place], check=False, capture_output=True)
        run("umount", "--lazy", place)
    Loop.take_away(loops)
    wait_for(lambda: not Loop.all_below(work), "for the loop devices of the page to be free")
    wait_for(lambda: not daemons_below(work), "for the daemons of the page to end")
    return [str(each) for each in (*mounts, *(loop.path for loop in loops))]


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; what is mounted in it is taken away at the end."""
    work = tmp_path / "work"
    yield work
    put_away(tmp_path)
    run("rm", "-r", "--one-file-system", tmp_path)


def check(page: Path, work: Path) -> None:
    """Run a page, and compare what it shows."""
    outcome = run_page(page, work)
    if outcome.status:
        block = max(
            (
                number
                for number, each in enumerate(pages.runnable(page))
                if each.line <= outcome.line
            ),
            default=0,
        )
        command = page.read_text().splitlines()[outcome.line - 1]
        pytest.fail(
            f"{title(page)}:{outcome.line}: exit status {outcome.status}: {command}\n"
            f"{outcome.outputs[block]}",
            pytrace=False,
        )
    for number, block_shown in pages.shown(page):
        compare(page, block_shown, outcome.outputs[number], work)
    left = put_away(work.parent)
    assert not left, f"{title(page)} leaves behind {', '.join(left)}"


def compare(page: Path, block: Block, output: str, work: Path) -> None:
    """Fail if the page shows something else than was printed."""
    if not pages.is_shown(block.text, output, work):
        printed = output.replace(str(work), pages.SHOWN_AT).splitlines()
        difference = difflib.unified_diff(
            block.text, printed, title(page), "printed", lineterm="", n=99
        )
        pytest.fail(
            "\n".join((f"{title(page)}:{block.line}: it prints something else", *difference)),
            pytrace=False,
        )


@pytest.mark.parametrize("page", RUNNABLE, ids=title)
def test_the_commands_of_a_page(page: Path, work: Path) -> None:
    check(page, work)


# No command is left out


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_block_says_what_it_is(page: Path) -> None:
    for line in pages.indented_blocks(page):
        pytest.fail(f"{title(page)}:{line}: use a fenced block, which says whether it is run")
    for block in pages.blocks(page):
        where = f"{title(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r} is none of the languages"
        if block.language == "usage":
            for form in block.text:
                assert re.search(r"\b[A-Z]{2,}|\[", form), f"{where}: {form!r} could be run"
    list(pages.shown(page))  # each has commands that print it


def test_what_is_not_run_here_is_run_elsewhere_or_has_a_reason() -> None:
    commands = {
        line
        for page in PAGES
        for block in pages.blocks(page)
        if block.language == "sh elsewhere"
        for line in (re.sub(" +#.*", "", each) for each in block.text)
    }
    assert commands == ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        assert (ROOT / place).exists() or " " in place


# The runner is tested


def a_page(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{text}")
    return page


def failure(page: Path, work: Path) -> str:
    with pytest.raises(pytest.fail.Exception) as caught:
        check(page, work)
    return str(caught.value)


def test_a_command_that_fails_is_named(tmp_path: Path, work: Path) -> None:
    page = a_page(
        tmp_path, "```sh\necho one\n```\n\nand\n\n```sh\necho two\nfalse | true\necho no\n```\n"
    )
    assert failure(page, work) == "page.md:11: exit status 1: false | true\ntwo\n"


@pytest.mark.parametrize("commands", ["echo $UNKNOWN", "exit 3", "if true; then (exit 3); fi"])
def test_other_ways_to_fail(tmp_path: Path, work: Path, commands: str) -> None:
    assert failure(a_page(tmp_path, f"```sh\n{commands}\n```\n"), work).startswith(
        "page.md:4: exit"
    )


def test_output_that_is_not_true_is_shown(tmp_path: Path, work: Path) -> None:
    page = a_page(tmp_path, "```sh\necho a new one\n```\n\n```text\nan old one\n```\n")
    told = failure(page, work)
    assert told.startswith("page.md:7: it prints something else")
    assert told.endswith("-an old one\n+a new one")


@pytest.mark.parametrize(
    ("shown", "true"),
    [
        ("NAME  SIZE\na     1G\n", True),
        ("NAME SIZE\n...\n", True),
        ("...\na 1G\n", True),
        ("NAME SIZE\na ...G\n", True),
        ("NAME SIZE\n", False),
        ("NAME SIZE\n...2G\n", False),
        ("NAME SIZE\na 1G\n\n", False),
    ],
)
def test_dots_stand_for_anything(shown: str, true: bool) -> None:
    printed = "NAME SIZE\na    1G\n"
    assert pages.is_shown(tuple(shown.splitlines()), printed, Path("/work")) is true


def test_what_differs_in_each_run_is_not_compared() -> None:
    shown = "/dev/loop0 /srv/a 2026-11-23T02:04:48Z e4c59e77-b98e-416e-b041-5daa5fc417d5"
    printed = "/dev/loop12 /work/a 2027-01-01T00:00:00Z 0b0b0b0b-b98e-416e-b041-5daa5fc417d5\n"
    assert pages.is_shown((shown,), printed, Path("/work"))
    assert not pages.is_shown((shown,), printed, Path("/elsewhere"))


def test_nothing_of_a_page_that_fails_half_way_is_left(tmp_path: Path, work: Path) -> None:
    page = a_page(
        tmp_path,
        """```sh
mkdir mnt disk
clonefs format meta --size 1M
clonefs mount meta mnt
clonefs add-group mnt payroll source.img --size 4M
loop=$(losetup --find --show mnt/payroll/source)
mkfs.ext4 -q $loop
mount $loop disk
echo $loop
```

```sh
sleep 1000 &
fsfreeze --freeze disk
false
```
""",
    )
    assert failure(page, work).startswith("page.md:17: exit status 1: false")
    (loop,) = Loop.all_below(work)
    assert mounts_below(work) == [work / "disk", work / "mnt"]
    assert put_away(tmp_path) == [str(work / "disk"), str(work / "mnt"), str(loop.path)]
    assert (mounts_below(work), Loop.all_below(work), daemons_below(work)) == ([], [], [])


def test_a_page_that_leaves_a_mount_behind_fails(tmp_path: Path, work: Path) -> None:
    page = a_page(tmp_path, "```sh\nmkdir mnt\nmount -t tmpfs none mnt\n```\n")
    with pytest.raises(AssertionError, match=r"leaves behind /.*/work/mnt"):
        check(page, work)


def test_code_that_is_only_indented_is_found(tmp_path: Path) -> None:
    page = a_page(tmp_path, "Do\n\n    rm file\n\n- a list\n  goes on\n\n```sh\n\n    true\n```\n")
    assert list(pages.indented_blocks(page)) == [5]
