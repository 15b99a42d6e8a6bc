"""Write the reference of the command line out of the commands' own help.

Knows Markdown and the commands; run it after every change of an option:

    python -m unclip.cli.reference > docs/guides/command-line.md
"""

import contextlib
import io
import os
from collections.abc import Iterator

import typer
from typer.core import TyperGroup

from unclip.cli.main import app

os.environ["UNCLIP_CONFIG"] = os.devnull  # the reference shows the built-in defaults
WIDTH = 78
"""What help uses of a terminal of 80 columns."""

HEAD = """\
# The command line

<!-- Written by `python -m unclip.cli.reference > docs/guides/command-line.md`; do not edit by hand. -->

```console
$ unclip generate "a red apple" --seed 42
a-red-apple-42.png
```

**What goes where.** Results (paths, tables, JSON) go to stdout, one a line; seeds, progress bars, warnings and errors
go to stderr. So `unclip generate … | xargs …` works, and `--json` gives one JSON object a picture.

**Files.** A picture is named after its prompt and its seed. A file that is there already is never replaced unless
`--overwrite` is given; a number is added to the name instead. Every file appears whole or not at all, and as soon as
its batch is done: whatever stops a long run, what was finished stays.

**Seeds.** Picture i of a run, counted from 0, has seed + i, and is the picture that a run of its own with that seed
makes (but for rounding, which may differ with the batch and the device). Each file holds the prompt,
the seed, the model and the settings as PNG texts, so a picture can be made again:

```python
from PIL import Image

print(Image.open("a-red-apple-42.png").text)
```

**Defaults of a model.** Steps and guidance scales that are not given come from `generation_defaults.json` in the
model's folder, if it has one: a JSON object with any of `prior_num_inference_steps`, `decoder_num_inference_steps`,
`super_res_num_inference_steps`, `prior_guidance_scale` and `decoder_guidance_scale`.

**Exit codes.**

| code | meaning |
|---|---|
| 0 | all is done |
| 1 | it did not work; the reason stands on stderr as `error: …` (`unclip --debug COMMAND …` shows where) |
| 2 | the command was not understood |
| 3 | some pictures were made, others failed |
| 130 | stopped with Ctrl-C; what was finished stays |
| 141 | whoever read the output went away |
"""


def pages() -> Iterator[tuple[str, str]]:
    """Every command with its help, as on a terminal of 80 columns."""
    root = typer.main.get_command(app)
    yield from _pages(root, root, ())


def document() -> str:
    """The whole reference as Markdown."""
    parts = [HEAD]
    for name, text in pages():
        parts.append(f"## `{name}`\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


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
