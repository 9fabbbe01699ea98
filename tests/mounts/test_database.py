"""A real PostgreSQL under load: `docs/howto/restore-a-database.md`, followed line by line.

The commands are those of the page, in its order. Between them the test looks at more than the page
does: which rows were committed before and after the fracture, that the database is up while there is
something left to copy, and that two restores of the same clone give the same.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts.mount import DEADLINE_S, Loop, digest, mounts_below, run, wait_for

PAGE = Path(__file__).parents[2] / "docs/howto/restore-a-database.md"
TABLES = ("accounts", "branches", "history", "tellers")


def chapters() -> dict[str, list[str]]:
    """The commands of the page, block by block, by the headings."""
    found: dict[str, list[str]] = {}
    for chapter in re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, text = chapter.partition("\n")
        found[heading] = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


class Shell:
    """The one shell in which somebody follows the page."""

    def __init__(self, work: Path) -> None:
        self._output = work / "output"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-eu"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=work,
                text=True,
                env=os.environ | {"PATH": path},
            )
        self._count = 0

    def run(self, commands: str) -> str:
        """Run commands that must succeed; what they print."""
        self._count += 1
        assert self.process.stdin is not None
        begin, end = (f"--- {what} of {self._count}\n" for what in ("begin", "end"))
        self.process.stdin.write(
            f"printf -- '{begin[:-1]}\\n'\n{commands}printf -- '{end[:-1]}\\n'\n"
        )
        self.process.stdin.flush()
        wait_for(lambda: end in self._said() or self._is_over(), f"for: {commands}")
        said = self._said().partition(begin)[2]
        assert end in said, f"{commands}: {said}"
        return said.partition(end)[0]

    def _said(self) -> str:
        return self._output.read_text()

    def _is_over(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> int:
        """Nothing more is typed; the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(DEADLINE_S)


class Database:
    """What the page has set up, as the test looks at it."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.directory = Path(self._variable("DIR"))
        self._as = self._variable("AS").split()
        self._programs = Path(self._variable("BIN"))

    def _variable(self, name: str) -> str:
        return self.shell.run(f'echo "${name}"\n').strip()

    def ask(self, query: str) -> str:
        """What psql answers."""
        return run(*self._as, self._programs / "psql", "-At", "-c", query).strip()

    def history(self) -> Counter[str]:
        """What has been committed."""
        return Counter(self.ask("SELECT * FROM pgbench_history").splitlines())

    def wait_for_more(self, than: int) -> None:
        """Return when the load has committed 20 rows more than that."""
        count = "SELECT count(*) FROM pgbench_history"
        wait_for(lambda: int(self.ask(count)) >= than + 20, "for the load")

    def digests(self) -> list[str]:
        """What is in each table, whatever the order of the rows."""
        rows = "string_agg(t::text, ',' ORDER BY t::text)"
        return [self.ask(f"SELECT md5({rows}) FROM pgbench_{table} t") for table in TABLES]

    def check_sums(self) -> None:
        """Every balance is the sum of what the history says, as each transaction leaves it."""
        for table, key in (("accounts", "aid"), ("tellers", "tid"), ("branches", "bid")):
            balance = f"{key[0]}balance"
            wrong = self.ask(
                f"SELECT count(*) FROM pgbench_{table} t LEFT JOIN "
                f"(SELECT {key}, sum(delta) AS moved FROM pgbench_history GROUP BY {key}) h "
                f"USING ({key}) WHERE t.{balance} <> coalesce(moved, 0)"
            )
            assert wrong == "0", f"{wrong} balances of {table} are wrong"

    def pending(self) -> int:
        """How many extents the restore still has to copy; 0 if there is none."""
        report = json.loads((self.directory / "mnt/control/status.json").read_text())
        restore = report["groups"]["db"]["restore"]
        return 0 if restore is None else int(restore["pending"])

    def put_away(self) -> None:
        """Whatever a test that has failed has left behind."""
        if not self.directory.exists():
            return
        pid = self.directory / "db/data/postmaster.pid"
        if pid.exists():
            data = self.directory / "db/data"
            stop = [self._programs / "pg_ctl", "stop", "-m", "immediate", "-D", data]
            subprocess.run([*self._as, *map(str, stop)], check=False)
        for _ in range(2):  # the file system, the loop device, and then what that is on
            for place in mounts_below(self.directory):
                subprocess.run(["umount", place], check=False)
            Loop.take_away(Loop.all_below(self.directory))
        run("rm", "-r", "--one-file-system", self.directory)


@contextlib.contextmanager
def followed(work: Path) -> Iterator[Shell]:
    """A shell, which is ended with all that it has started."""
    shell = Shell(work)
    try:
        yield shell
    finally:
        shell.process.kill()
        shell.process.communicate()


@pytest.mark.parametrize("scale", [1, pytest.param(20, marks=pytest.mark.long)])
def test_the_page_that_restores_a_database(
    tmp_path: Path, cleanup: contextlib.ExitStack, scale: int
) -> None:
    page = chapters()
    shell = cleanup.enter_context(followed(tmp_path))
    begin, *rest = page.pop("Restore a database")
    assert rest == []
    assert "SCALE=1\n" in begin
    shell.run(begin.replace("SCALE=1\n", f"SCALE={scale}\n"))
    database = Database(shell)
    cleanup.callback(database.put_away)
    follow(shell, page.pop("The database on a Source"))

    load, fracture = page.pop("A clean copy under load")
    shell.run(load)
    before = database.history()
    assert " frozen for " in shell.run(fracture)
    fractured_by = database.ask("SELECT clock_timestamp()")
    database.wait_for_more(database.history().total())
    after = database.history()
    clone = database.directory / "nightly.img"
    as_fractured = digest(clone)

    follow(shell, page.pop("The accident"))
    assert database.ask("SELECT to_regclass('pgbench_accounts')") == ""

    restore, *use = page.pop("The restore")
    assert "echo 64K >" in restore
    shell.run(restore.replace("echo 64K >", "echo 1 >"))  # one extent, and then only what is needed
    print("pending when it is up:", database.pending())
    restored = database.history()
    assert before <= restored <= after
    late = f"SELECT count(*) FROM pgbench_history WHERE mtime > '{fractured_by}'"
    assert database.ask(late) == "0"
    database.check_sums()
    digests = database.digests()
    assert database.pending() > 0
    follow(shell, use)
    assert database.history().total() == restored.total() + 200
    print("pending after it has gone on:", database.pending())
    assert database.pending() > 0
    database.check_sums()

    (again,) = page.pop("Once more")
    shell.run(again)
    assert database.digests() == digests
    assert database.history() == restored
    shell.run('$AS "$BIN/pg_amcheck" --heapallindexed --parent-check\n')
    assert digest(clone) == as_fractured

    follow(shell, page.pop("Put everything away"))
    assert page == {}
    assert shell.end() == 0
    assert not database.directory.exists()


def follow(shell: Shell, blocks: list[str]) -> None:
    """Type all blocks of a chapter."""
    for block in blocks:
        shell.run(block)
