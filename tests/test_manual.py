"""The manual pages: made from what the code and the pages of docs say now, and sound."""

import subprocess
from pathlib import Path

import click
import pytest

from clonefs.cli import main
from tests import manual
from tests.mounts.mount import run

PAGES = sorted(manual.pages())


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_it_is_made_from(name: str) -> None:
    assert {path.name for path in manual.MAN.iterdir()} == set(PAGES)
    assert (manual.MAN / name).read_text() == manual.pages()[name], "run python -m tests.manual"


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_and_man_have_nothing_to_say(name: str, tmp_path: Path) -> None:
    assert run("mandoc", "-T", "lint", manual.MAN / name) == ""
    for width in ("80", "120"):
        done = subprocess.run(
            ["man", "--warnings", "--local-file", manual.MAN / name],
            env={"MANWIDTH": width, "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        shown = done.stdout.splitlines()
        assert "NAME" in shown
        assert "SEE ALSO" in shown


def test_every_command_and_option_is_shown() -> None:
    shown = run("mandoc", "-T", "ascii", "-O", "width=300", manual.MAN / "clonefs.1")
    plain = "".join(char for at, char in enumerate(shown) if "\b" not in shown[at : at + 2])
    for name, command in main.commands.items():
        assert f"clonefs {name} " in plain
        ctx = click.Context(command, help_option_names=[])
        for option in (each for each in command.params if isinstance(each, click.Option)):
            names, _ = option.get_help_record(ctx) or ("", "")
            assert f" [{names}]" in plain, (name, names)
            assert f"\n{' ' * 14}{names}" in plain, (name, names)
