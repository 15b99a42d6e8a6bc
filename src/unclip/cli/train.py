"""`unclip data`, `unclip train` and `unclip assemble`: from pictures to a model.

Knows recipes and folders by name; the work is done in `unclip.data` and `unclip.training`.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options
from unclip.cli.memory import keep_freed_memory
from unclip.cli.messages import note

if TYPE_CHECKING:
    from unclip.training.recipe import Recipe
    from unclip.training.task import Task

INTERRUPTED = 130

DATA_EXAMPLES = options.examples(
    "unclip data emoji --out data/emoji", "unclip data emoji --out data/emoji --packages downloads"
)
TRAIN_EXAMPLES = options.examples(
    "unclip train recipes/emoji/clip.toml --out runs/clip",
    "unclip train recipes/emoji/prior.toml --out runs/prior",
    "unclip train recipes/emoji/clip.toml --out runs/trial --steps 20",
)
ASSEMBLE_EXAMPLES = options.examples(
    "unclip assemble --clip runs/clip --prior runs/prior --decoder runs/decoder \\",
    "  --super-res-first runs/super_res --super-res-last runs/super_res_last \\",
    "  --out models/mine",
    'unclip generate "a red apple" --model models/mine',
    "unclip assemble --clip old --prior old --decoder runs/decoder \\",
    "  --super-res-first old --super-res-last old --out new",
)

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def data_group() -> None:
    """Make a data set to train on."""


@data.command("emoji", epilog=DATA_EXAMPLES)
def emoji(
    out: options.NewFolder,
    packages: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the four source tarballs.", show_default="fetched with npm"),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Render the emoji data set: three open designs, with captions.

    Needs the extra packages of training; in a checkout: pip install '.[train]'
    """
    from tqdm import tqdm

    from unclip.data.emoji import build_emoji

    counts = build_emoji(out, packages=packages, progress=None if quiet else functools.partial(tqdm, disable=None))
    if not quiet:
        note(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    print(out, flush=True)


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file that describes the run.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="RUN", help="The run's folder; a run that is there already goes on.")
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Optimizer steps in all.", show_default="the recipe's")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Train one stage by a recipe: clip, prior, decoder or super_res.

    Ctrl-C saves and stops; the same command goes on from there. The run's folder gets metrics.jsonl, samples/ and
    model/, whose path is printed on stdout.
    """
    from tqdm import tqdm

    from unclip.cli.loading import silence
    from unclip.training.recipe import read_recipe
    from unclip.training.trainer import Trainer

    silence(downloads=True)
    keep_freed_memory()
    settings = read_recipe(recipe, steps=steps)
    trainer = Trainer(make_task(settings), settings, out)
    first = trainer.accelerator.is_main_process
    if trainer.step and first and not quiet:
        note(f"going on from step {trainer.step} of {settings.steps}")
    trainer.run(progress=functools.partial(tqdm, disable=None) if first and not quiet else None)
    if first and trainer.task.skipped:
        some = "; ".join(f"{name}: {why}" for name, why in list(trainer.task.skipped.items())[:3])
        note(f"{len(trainer.task.skipped)} samples or shards could not be read ({out / 'skipped.json'}): {some}")
    if trainer.step < settings.steps:
        if first:
            note(f"stopped and saved at step {trainer.step} of {settings.steps}; the same command goes on from there")
        raise typer.Exit(INTERRUPTED)
    if first:
        print(out / "model", flush=True)


def make_task(recipe: "Recipe") -> "Task":
    """What the recipe trains."""
    if recipe.stage == "clip":
        from unclip.training.clip import ClipTask

        return ClipTask(recipe)
    from unclip.training.diffusion import DecoderTask, PriorTask, SuperResTask

    if recipe.stage == "prior":
        return PriorTask(recipe)
    return DecoderTask(recipe) if recipe.stage == "decoder" else SuperResTask(recipe)


def assemble(
    clip: Annotated[Path, typer.Option(metavar="RUN", help="Run of stage clip.")],
    prior: Annotated[Path, typer.Option(metavar="RUN", help="Run of stage prior.")],
    decoder: Annotated[Path, typer.Option(metavar="RUN", help="Run of stage decoder.")],
    super_res_first: Annotated[Path, typer.Option(metavar="RUN", help="Run of super_res, for all steps but the last.")],
    out: options.NewFolder,
    super_res_last: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Run of super_res, for the last step.", show_default="the first's network does it too"
        ),
    ] = None,
    defaults: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON that becomes the model's generation_defaults.json.", show_default="none"
        ),
    ] = None,
    dtype: options.KeptDtype = None,
    overwrite: options.OverwriteFolder = False,
) -> None:
    """Put trained stages together into one model folder.

    Where a run is asked for, a model's folder does too: then its stage is taken as it is.
    The folder serves both `unclip generate` and `unclip vary`. Its path is printed on stdout.
    """
    import torch

    from unclip.checkpoints.files import read_json
    from unclip.training.assemble import assemble as put_together

    put_together(
        clip=clip,
        prior=prior,
        decoder=decoder,
        super_res_first=super_res_first,
        super_res_last=super_res_last,
        out=out,
        dtype=None if dtype is None else getattr(torch, dtype),
        defaults=None if defaults is None else read_json(defaults),
        overwrite=overwrite,
    )
    print(out, flush=True)
