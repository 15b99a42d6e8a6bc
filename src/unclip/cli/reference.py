"""Write the reference of the command line from the commands' own help.

Run it after every change of an option:

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

**Files.** A picture is named after its prompt and its seed. An existing file is never replaced unless `--overwrite` is
given; a number is added to the name instead. With a single picture to make, `--out cat.png` names its file. Every file
is written atomically as soon as its batch is done: whatever stops a long run, finished pictures stay.

**Seeds.** Picture i of a run, counted from 0, has seed + i, and is the picture that a run of its own with that seed
makes (but for rounding, which may differ with the batch and the device). Each file holds the prompt,
the seed, the model, the settings, the versions and the device as PNG texts, so a picture can be made again:

```console
$ unclip rerun a-red-apple-42.png --out again
```

The file is the same, byte for byte, if version, device and weights are; a warning names what differs. Options override
what the file says. `Image.open("a-red-apple-42.png").text` shows the texts in Python.

**Defaults of a person.** Options that several commands share take their defaults from environment variables and from a
TOML file, `config.toml` in the configuration folder (`~/.config/unclip` on Linux; `UNCLIP_CONFIG` names another file).
A variable is called `UNCLIP_` and the option's name: `UNCLIP_MODEL`, `UNCLIP_OUT`, `UNCLIP_BATCH_SIZE`. Keys of the
file are the options' names: `model = "models/mine"`, `decoder-steps = 20`. An option counts before a variable, a
variable before the file, and the file before the built-in default.

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
| 129, 143 | stopped by a signal (SIGHUP, SIGTERM); finished pictures stay |
| 130 | stopped with Ctrl-C; finished pictures stay |
| 141 | the reader of stdout closed it |
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
