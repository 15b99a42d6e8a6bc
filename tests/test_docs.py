"""The documentation names what exists: the API pages, the navigation, the workflows, and the commands of the guides."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

import unclip
from unclip.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "command-line.md")
FENCE = re.compile(r"```(?:sh|console)\n(.*?)```", re.S)
INLINE = re.compile(r"`(unclip [a-z][^`]*)`")
SNIPPET = re.compile(r'^--8<-- "([^":]+)', re.M)


def navigation() -> dict:
    """mkdocs.yml."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(tree: object) -> Iterator[str]:
    """The files in a navigation tree."""
    if isinstance(tree, str):
        yield tree
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)


def invocations(text: str) -> Iterator[str]:
    """The `unclip …` commands in code blocks and in code spans."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line):
                words = command.removeprefix("$").split("  #")[0].strip()
                if match := re.search(r"(?:^|\s|/)(unclip .*)", words):
                    yield match[1]
    for span in INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.S)):
        yield " ".join(span.split())


def misnamed(invocation: str) -> str | None:
    """The first word of the command that is neither a command nor an option of it; None where all exist."""
    command = typer.main.get_command(app)
    words = shlex.split(invocation)[1:]
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            if (default := getattr(command, "default_command", None)) is None:
                return words[0]
            words.insert(0, default)
        command = command.commands[words.pop(0)]
    known = {"--help", "-h"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    options = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    return next((option for option in options if option not in known), None)


def test_every_public_name_is_on_an_api_page():
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    described = re.findall(r"^::: unclip\.(\w+)$", text, re.M)
    assert sorted(described) == sorted(name for name in unclip.__all__ if not name.startswith("__"))


def test_the_navigation_lists_every_page():
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(leaves(navigation()["nav"])) == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_included_files_exist(page):
    for name in SNIPPET.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_between_files_of_the_repository(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_workflows_run_parts_that_exist():
    flows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    named = set()
    for flow in flows:
        for job in yaml.safe_load(flow.read_text(encoding="utf-8"))["jobs"].values():
            values = job.get("strategy", {}).get("matrix", {}).get("part", [])
            for command in (step["run"] for step in job["steps"] if "run" in step):
                for part in (
                    command.removeprefix("bash .ci/run").replace("${{ matrix.part }}", " ".join(values)).split()
                ):
                    named.add(part)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z-]+)\(\) \{$", script, re.M)) - {"block"}
    assert named == defined


def test_an_unknown_part_is_refused():
    run = subprocess.run([str(ROOT / ".ci" / "run"), "lint", "nothing"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown part nothing" in run.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_commands_and_options_exist(page):
    text = page.read_text(encoding="utf-8")
    assert [(call, wrong) for call in invocations(text) if (wrong := misnamed(call))] == []


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("unclip generate cat --seed 1 -n 4", None),
        ("unclip evaluate report a.json --out b.html", None),
        ("unclip --version", None),
        ("unclip draw cat", "draw"),
        ("unclip data emojis", "emojis"),
        ("unclip generate cat --sede 1", "--sede"),
    ],
)
def test_what_the_check_of_commands_finds(call, wrong):
    assert misnamed(call) == wrong
