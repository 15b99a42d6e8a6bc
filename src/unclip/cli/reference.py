"""Write the reference of the command line from the commands' own help.

Run it after every change of an option:

    python -m unclip.cli.reference > docs/guides/command-line.md
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperGroup

from unclip.cli.main import app

os.environ["UNCLIP_CONFIG"] = os.devnull  # the reference shows the built-in defaults
WIDTH = 78
"""The width of the help on a terminal of 80 columns."""


def pages() -> Iterator[tuple[str, str]]:
    """Every command with its help, as on a terminal of 80 columns."""
    root = typer.main.get_command(app)
    yield from _pages(root, root, ())


def document() -> str:
    """The whole reference as Markdown: `reference.md`, and the help of every command."""
    head = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return "\n".join([head, *(f"## `{name}`\n\n```text\n{text.strip()}\n```\n" for name, text in pages())])


def _pages(root, command, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        root.main([*path, "--help"], prog_name="unclip", standalone_mode=False, terminal_width=WIDTH)
    yield " ".join(["unclip", *path]), page.getvalue()
    if isinstance(command, TyperGroup):
        for name, sub in command.commands.items():
            yield from _pages(root, sub, (*path, name))


if __name__ == "__main__":
    print(document(), end="")
