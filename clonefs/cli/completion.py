"""completion: what bash, zsh and fish need to complete the words of clonefs.

click knows which word is to be completed; the types of arguments know what it may become; the
scripts in mount-helpers/completion put that into the shell's words. Between them goes one line for
each: its kind, the word, and what it is, with tabs between them. The kinds are `plain`, `path` (of a
tree), and `file` and `dir`, which the shell completes by itself. A word that ends in `/`, `=` or `,`
goes on.
"""

from __future__ import annotations

import os
from typing import ClassVar

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)

from clonefs.cli.installing import helpers

_CURSOR = "\x1f"  # no word ends in it, so the word with it is the one that is being typed


class _Shell(ShellComplete):
    """What zsh and fish send: the words before, one a line, and what is typed of the next."""

    def source(self) -> str:
        return (helpers() / "completion" / f"clonefs.{self.name}").read_text()

    def get_completion_args(self) -> tuple[list[str], str]:
        return os.environ["CLONEFS_WORDS"].split("\n")[1:], os.environ["CLONEFS_WORD"]

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Whole words: click leaves out the option in --option=value."""
        option, equals, _ = incomplete.partition("=")
        before = option + equals if equals and option.startswith("--") else ""
        items = super().get_completions(args, incomplete)
        return [CompletionItem(before + each.value, each.type, each.help) for each in items]

    def format_completion(self, item: CompletionItem[str]) -> str:
        told = (item.type, item.value, " ".join((item.help or "").split()))
        return "\t".join(told) if item.value.isprintable() else ""


@add_completion_class
class _Bash(_Shell):
    """bash breaks words at = and : too, and replaces only what stands behind."""

    name: ClassVar[str] = "bash"

    def get_completion_args(self) -> tuple[list[str], str]:
        *words, last = split_arg_string(os.environ["CLONEFS_LINE"] + _CURSOR)
        return words[1:], last.removesuffix(_CURSOR)

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        kept = _before(incomplete, os.environ["CLONEFS_WORD"])
        items = super().get_completions(args, incomplete)
        return [CompletionItem(each.value.removeprefix(kept), each.type) for each in items]


def _before(incomplete: str, word: str) -> str:
    """What of `incomplete` stands before bash's `word`, which may be quoted."""
    for tail in (word, "".join(split_arg_string(word))):
        if incomplete.endswith(tail):
            return incomplete[: len(incomplete) - len(tail)]
    return ""


@add_completion_class
class _Zsh(_Shell):
    name: ClassVar[str] = "zsh"


@add_completion_class
class _Fish(_Shell):
    name: ClassVar[str] = "fish"


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete the words of clonefs.

    It completes commands, options, states, and the paths of mounts, groups and clones. `clonefs
    install` puts it where the shells look for it; this is for those who cannot.

    \b
    Example, in ~/.bashrc, in ~/.zshrc after compinit, and in ~/.config/fish/config.fish:
      eval "$(clonefs completion bash)"
      eval "$(clonefs completion zsh)"
      clonefs completion fish | source
    """
    click.echo(SHELLS[shell](ctx.find_root().command, {}, "clonefs", "").source(), nl=False)
