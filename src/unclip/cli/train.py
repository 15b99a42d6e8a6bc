"""`unclip train` and `unclip assemble`: train the stages of a model and combine them."""

import functools
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli import options
from unclip.cli.messages import bar, note
from unclip.cli.options import argument, command, flag, option
from unclip.cli.output import check_free
from unclip.errors import InputError
from unclip.pipelines.session import keep_freed_memory

if TYPE_CHECKING:
    from unclip.training.recipe import Recipe


class TrainGroup(TyperGroup):
    """The commands of `unclip train`; `unclip train FILE` is `unclip train recipe FILE`."""

    default_command = "recipe"

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)  # pyright: ignore[reportArgumentType]


train = typer.Typer(cls=TrainGroup, no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def train_group() -> None:
    """Train a stage of a model, or a translator between two CLIPs.

    `unclip train RECIPE --out RUN` is short for `unclip train recipe RECIPE --out RUN`.
    """


@command(train, TrainGroup.default_command)
def train_recipe(
    recipe: Annotated[Path, argument("RECIPE")],
    out: Annotated[Path | None, option("RUN", "--out", "-o")] = None,
    steps: Annotated[int | None, option("N", default="the recipe's", min=1)] = None,
    dry_run: Annotated[bool, flag("--dry-run")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Train one stage from a recipe: clip, prior, prior_autoregressive, decoder or
    super_res.

    Ctrl-C or SIGTERM saves and stops; the same command continues the run. The run's folder contains metrics.jsonl,
    samples/ and model/. The path of model/ is printed to stdout.

    Args:
        recipe: A TOML file with the settings of the run.
        out: The run's folder. An existing run is continued. Required without --dry-run.
        steps: Total number of optimizer steps.
        dry_run: Take a few steps, and print sizes, memory and time; write nothing.

    Examples:
        unclip train recipes/emoji/clip.toml --out runs/clip
        unclip train recipes/emoji/prior.toml --out runs/prior
        unclip train recipes/emoji/decoder.toml --dry-run
    """
    from unclip.pipelines.session import silence
    from unclip.training.recipe import read_recipe
    from unclip.training.sharding import requested_by_launcher
    from unclip.training.task import make_task, settled
    from unclip.training.trainer import Trainer

    if out is None and not dry_run:
        raise typer.BadParameter("name the run's folder with --out RUN, or give --dry-run")
    silence(downloads=True)
    keep_freed_memory()
    settings = settled(read_recipe(recipe, steps=steps, shard=requested_by_launcher() or None))
    if out is None or dry_run:
        tell_cost(settings)
        return
    first = is_first()
    is_verbose = first and not quiet
    progress = bar(quiet) if is_verbose else None
    trainer = Trainer(make_task(settings, progress, run=out), settings, out)
    if trainer.accelerator.mixed_precision != settings.precision and is_verbose:
        note("this CPU has no instructions for bfloat16: training in float32, which is faster here")
    if trainer.step and is_verbose:
        note(f"continuing from step {trainer.step} of {settings.steps}")
    lines = is_verbose and not (sys.stderr is not None and sys.stderr.isatty())  # on a terminal, a bar is shown instead
    trainer.run(progress=progress, on_log=functools.partial(tell_step, settings) if lines else None)
    if first and trainer.skipped:
        some = "; ".join(f"{name}: {why}" for name, why in list(trainer.skipped.items())[:3])
        note(f"{len(trainer.skipped)} samples or shards could not be read ({out / 'skipped.json'}): {some}")
    if trainer.step < settings.steps:
        if first:
            note(f"stopped and saved at step {trainer.step} of {settings.steps}; repeat the command to continue")
        raise typer.Exit(128 + (trainer.stopped_by or signal.SIGINT))
    if first:
        print(out / "model", flush=True)


@command(train, "translator")
def translator(
    *,
    source: Annotated[Path, argument("SOURCE")],
    target: Annotated[Path, argument("TARGET")],
    out: Annotated[Path, option("FILE", "--out", "-o")],
    held_out: Annotated[int | None, option("N", default="a tenth of the rows", min=0)] = None,
    hidden: Annotated[int, option("N", min=0, max=16_384)] = 0,
    steps: Annotated[int, option("N", min=50, max=1_000_000)] = 2000,
    seed: Annotated[int, option("N", min=0, max=options.MAX_SEED)] = 0,
    key: Annotated[str | None, option("NAME", default="image_embeds or embedding, else the only one")] = None,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Fit a translator from the image embeddings of one CLIP to those of another.

    SOURCE and TARGET are files with the embeddings of the same pictures in the same order, by the two CLIPs, as
    `unclip embed` writes them. The translator is a ridge regression, and with --hidden also a hidden layer. Its error
    on held-out pairs is stored in FILE and printed. The path of FILE is printed to stdout.

    Args:
        source: Embeddings to translate: .npy, .npz, .safetensors, .parquet, or a folder.
        target: Embeddings of the same pictures by the CLIP of the model that will decode them.
        out: The .safetensors file to write.
        held_out: The last N rows are not trained on; the error is measured on them.
        hidden: Width of a hidden layer. 0 is ridge regression alone.
        steps: Optimizer steps of the hidden layer.
        seed: Seed of the hidden layer and of the rows on which settings are chosen.
        key: The array of the files, or the column.
        overwrite: Replace an existing FILE.

    Examples:
        unclip train translator other.npy mine.npy --out translator.safetensors
        unclip decode more.npy --model models/mine \
          --translator translator.safetensors
    """
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out} must end in {SUFFIX}")
    check_free(out, overwrite=overwrite)
    import torch

    from unclip.data.embeddings import read_embeddings
    from unclip.pipelines.translator import Translator, check_pairs

    pairs = [read_embeddings(file, key) for file in (source, target)]
    check_pairs(*pairs)
    made = Translator.fit(
        *(torch.from_numpy(table[:]) for table in pairs),
        held_out=len(pairs[0]) // 10 if held_out is None else held_out,
        hidden=hidden,
        steps=steps,
        seed=seed,
        progress=bar(quiet),
    )
    made.write(out, overwrite=overwrite)
    if made.measured and not quiet:
        rows, found = int(made.measured["rows"]), made.measured
        note(
            f"on {rows:,} held-out pairs: {found['explained']:.1%} of the variance explained, mean cosine "
            f"{found['cosine']:.3f}, {found['top_1']:.1%} identified among at most 4,096"
        )
    print(out, flush=True)


def tell_step(recipe: "Recipe", step: int, row: Mapping[str, float]) -> None:
    """One line on a run's progress: step, loss, pictures per second, and the remaining time."""
    rate = row["pictures_per_s"]
    left = duration((recipe.steps - step) * recipe.batch_size / rate)
    note(f"step {step:,} of {recipe.steps:,}: loss {row['loss']:.4f}, {rate:.1f} pictures/s, {left} left")


def is_first() -> bool:
    """Whether this process prints messages; the launcher may have started several."""
    return os.environ.get("RANK", "0") == "0"


def tell_cost(recipe: "Recipe") -> None:
    """Print the cost of a run of this recipe. All processes must call it; the first one prints."""
    from unclip.training.dry_run import measure_cost
    from unclip.training.task import make_task

    cost = measure_cost(make_task(recipe), recipe)
    if not is_first():
        return
    whole = ", of all shards" if cost.is_sharded else ""
    rows = {f"parameters of {name}": f"{count:,}" for name, count in cost.parameters.items()}
    sizes = {"pictures read at": cost.read_px, "pictures in a batch": cost.trained_px}
    rows |= {name: ", ".join(f"{side}×{side} px" for side in sides) for name, sides in sizes.items() if sides}
    rows |= {
        "parameters trained": f"{cost.trained:,}",
        f"weights, gradients, optimizer, average{whole}": f"{cost.state_bytes / 2**20:,.0f} MiB",
        "peak memory of a step": f"{cost.peak_bytes / 2**20:,.0f} MiB",
        "a step": f"{cost.step_s:.3g} s, {cost.batch_size / cost.step_s:,.1f} pictures/s",
        "the run": f"{cost.steps:,} steps, {cost.steps * cost.batch_size:,} pictures, {duration(cost.total_s)}",
    }
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}", flush=True)


def duration(seconds: float) -> str:
    """Two units of time at most: "2 h 05 min"."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"


def assemble(
    clip: Annotated[Path, option("RUN")],
    prior: Annotated[Path, option("RUN")],
    decoder: Annotated[Path, option("RUN")],
    super_res_first: Annotated[Path, option("RUN")],
    out: options.NewFolder,
    super_res_last: Annotated[Path | None, option("RUN", default="the first network takes all steps")] = None,
    super_res_more: Annotated[list[str] | None, option("RUN[:SIZE]")] = None,
    defaults: Annotated[Path | None, option("FILE", default="none")] = None,
    dtype: options.KeptDtype = None,
    overwrite: options.OverwriteFolder = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Combine trained stages in one model folder.

    A model's folder or name can be given instead of a run; its stage is then used unchanged. The folder works with
    both `unclip generate` and `unclip vary`. Its path is printed to stdout.

    Args:
        clip: Run of the stage clip.
        prior: Run of the stage prior.
        decoder: Run of the stage decoder.
        super_res_first: Run of super_res, for all steps except the last.
        super_res_last: Run of super_res, for the last step.
        super_res_more: Run of super_res for a further stage, which enlarges the pictures again. SIZE is its output in
            pixels, if it differs from the training. May be given several times.
        defaults: JSON that becomes the model's generation_defaults.json.

    Examples:
        unclip assemble --clip runs/clip --prior runs/prior --decoder runs/decoder \
          --super-res-first runs/super_res --super-res-last runs/super_res_last \
          --out models/mine
        unclip generate "a red apple" --model models/mine
        unclip assemble --clip unclip-emoji --prior unclip-emoji \
          --decoder runs/decoder --super-res-first unclip-emoji --out new
    """
    import torch

    from unclip.checkpoints.files import read_json
    from unclip.pipelines.session import silence
    from unclip.training.assemble import assemble as put_together

    silence(downloads=quiet)
    put_together(
        clip=clip,
        prior=prior,
        decoder=decoder,
        super_res_first=super_res_first,
        super_res_last=super_res_last,
        super_res_more=[_sized(run) for run in super_res_more or []],
        out=out,
        dtype=None if dtype is None else getattr(torch, dtype),
        defaults=None if defaults is None else read_json(defaults),
        overwrite=overwrite,
    )
    print(out, flush=True)


def _sized(text: str) -> Path | tuple[Path, int]:
    """Parse `RUN` or `RUN:SIZE`; an existing folder with the whole name has precedence."""
    run, _, size = text.rpartition(":")
    if not (run and size.isdecimal()) or Path(text).is_dir():
        return Path(text)
    return Path(run), int(size)
