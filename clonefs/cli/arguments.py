"""Types of arguments that several commands share.

click.Path is not used: it looks at the file itself, and a look at a dead mount, or at one of
another user, is an error that the commands have better words for.
"""

from pathlib import Path

import click


def path(text: str) -> Path:
    """A path as it was typed; an empty one is wrong usage, for Path would make it the directory."""
    if not text:
        raise click.BadParameter("the path is empty")
    return Path(text)
