"""Help: instant, plain, documented."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from unclip import __version__
from unclip.cli import options
from unclip.cli.main import app
from unclip.cli.reference import document, pages

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "command-line.md"
HEAVY = ("torch", "transformers", "numpy", "PIL", "accelerate", "huggingface_hub", "rich")
PROBE = f"""
import contextlib, io, sys
from unclip.cli.main import app
for path in {{paths!r}}:
    with contextlib.redirect_stdout(io.StringIO()):
        app([*path, "--help"], standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules])
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "unclip", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_loads_nothing_heavy():
    paths = [name.split()[1:] for name, _ in pages()]
    assert len(paths) >= 12
    done = subprocess.run([sys.executable, "-c", PROBE.format(paths=paths)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_instant():
    times = []
    for _ in range(3):
        start = os.times()
        assert run("--help").returncode == 0
        end = os.times()  # the processor's time: the clock's says how busy the machine is
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(times) < 0.5


def test_guide_is_the_real_help():
    again = "run: python -m unclip.cli.reference > docs/guides/command-line.md"
    assert GUIDE.read_text(encoding="utf-8") == document(), again


@pytest.mark.parametrize("columns", ["80", "200"])
def test_reference_does_not_depend_on_the_terminal(columns):
    pages_here = dict(pages())
    done = run("generate", "--help", COLUMNS=columns, FORCE_COLOR="1")
    assert done.stdout == pages_here["unclip generate"]


def test_every_command_has_examples():
    for name, text in pages():
        if "Commands:" not in text:
            assert f"Examples:\n    {name}" in text
        assert all(len(line) <= 80 for line in text.splitlines())


def test_every_option_has_a_help_text():
    groups, lacking = [typer.main.get_command(app)], []
    while groups:
        command = groups.pop()
        groups += getattr(command, "commands", {}).values()
        lacking += [(command.name, option.name) for option in command.params if not option.help]
    assert lacking == []


def test_version_and_module():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"unclip {__version__}\n")


def test_wrong_command(unclip):
    done = unclip("generat", "x")
    assert (done.code, done.out) == (2, "")
    assert "generate" in done.err


def test_no_command_shows_help(unclip):
    done = unclip()
    assert done.code == 2
    assert "Examples:" in done.out + done.err


@dataclass(frozen=True)
class Block:
    needed: Annotated[int, typer.Option(min=1)]
    count: Annotated[int, typer.Option("--count", "-c", max=9)] = 3
    hidden: str = "kept"


@dataclass(frozen=True)
class Other(Block):
    count: Annotated[int, typer.Option(max=99)] = 30


@pytest.mark.parametrize(("block", "arguments", "count"), [(Block, ["-c", "5"], 5), (Block, [], 3), (Other, [], 30)])
def test_the_fields_of_a_dataclass_are_options(block, arguments, count):
    got = []

    def command(*, name: str, block, flag: bool = False) -> None:
        """What it does."""
        got.append((name, block, flag))

    command.__annotations__["block"] = block
    group = typer.Typer()
    group.command()(options.expanded(command))
    assert CliRunner().invoke(group, ["a", "--needed", "2", "--flag", *arguments]).exit_code == 0
    assert got == [("a", block(needed=2, count=count), True)]
    help_text = CliRunner().invoke(group, ["--help"]).stdout
    assert "What it does." in help_text
    assert "hidden" not in help_text
    assert CliRunner().invoke(group, ["a", "--needed", "0"]).exit_code == 2
    assert CliRunner().invoke(group, ["a"]).exit_code == 2
