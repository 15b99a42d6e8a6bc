"""`unclip generate`: pictures of captions.

Knows prompts and options; the batches, the files and the model are other modules' affair.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options
from unclip.cli.messages import error
from unclip.cli.output import Album, Wish, chosen_seed, cut, finish, make_all, picture_seed, slug
from unclip.errors import CheckpointError, InputError
from unclip.pipelines.session import (
    Machine,
    call_settings,
    drawing_settings,
    find_model,
    load,
    model_name,
    sampler_name,
    stage_settings,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS_LIMIT_BYTES = 16 * 2**20
"""The most that is read of a file of prompts: some 300,000 captions."""

EXAMPLES = options.examples(
    'unclip generate "a red apple"',
    'unclip generate "a cat" "a dog" -n 4 --seed 1 --grid --out pictures',
    'unclip generate "a castle" --negative "people" --decoder-guidance 6',
    'unclip generate "a boat" --sampler dpm --decoder-steps 12',
    'unclip generate "a lion" --candidates 4',
    "unclip generate --prompts-file captions.txt --json > made.jsonl",
)


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What the picture should show; one or several.")
    ] = None,
    model: options.Model = "unclip-emoji",
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Pictures of each prompt.")
    ] = 1,
    seed: options.Seed = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read more prompts, one a line; - is stdin.", allow_dash=True),
    ] = None,
    negative: options.Negative = None,
    prior_steps: Annotated[int | None, options.steps("prior", "of the prior, which turns words into an idea")] = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: Annotated[float | None, options.guidance("prior", "idea is pushed towards the caption")] = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    height: options.Height = None,
    width: options.Width = None,
    out: options.OutFolder = Path("."),
    grid: options.Grid = False,
    overwrite: options.OverwritePictures = False,
    as_json: options.Json = False,
    batch_size: options.BatchSize = 8,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    cpu_offload: options.CpuOffload = False,
    tile: options.Tile = None,
    quiet: options.Quiet = False,
) -> None:
    """Make pictures of captions.

    Each picture becomes a PNG file named after its prompt and seed. The file also says how it was made, so that it can
    be made again. The paths are printed on stdout, one a line.
    """
    texts = [plain(text) for text in prompts or []]
    if prompts_file is not None:
        texts += read_prompts(prompts_file)
    if not texts:
        raise typer.BadParameter('give a prompt, as in: unclip generate "a red apple"; or --prompts-file')

    good = usable(texts)
    if not good:
        raise typer.Exit(1)
    folder, index = find_model(model, quiet=quiet)
    if "prior" not in index:
        raise CheckpointError(f"{model} has no prior, so it only makes variations: unclip vary IMAGE --model {model}")

    from unclip.pipelines.text_to_image import UnCLIPPipeline

    given = stage_settings(prior_steps, decoder_steps, super_res_steps, prior_guidance, decoder_guidance)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    settings = call_settings(UnCLIPPipeline, folder, given, drawing)
    size = {name: side for name, side in (("height", height), ("width", width)) if side is not None}
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid)
    seed = chosen_seed(seed, quiet=quiet)
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    pipe = load(UnCLIPPipeline, folder, machine, sampler)
    negative = None if negative is None else plain(negative)

    def draw(batch: list[Wish]) -> "list[Image]":
        captions, seeds = [wish.given for wish in batch], [wish.seed for wish in batch]
        return pipe(captions, negative_prompt=negative, seed=seeds, **size, **settings).images  # type: ignore[arg-type, union-attr, return-value]

    about = {
        "negative": negative,
        "model": model_name(model),
        "settings": {**settings, **size, "sampler": sampler_name(pipe), **machine.facts},
    }
    wishes = (
        Wish(text, picture_seed(seed, place * num_images + copy), slug(text), {"prompt": text})
        for place, text in good.items()
        for copy in range(num_images)
    )
    make_all(cut(wishes, batch_size), draw, album, about)
    if grid:
        facts = {"prompt": "\n".join(good.values()), **about, "seed": seed}
        columns = num_images if len(good) > 1 and num_images > 1 else None
        album.save_sheet(f"{slug(texts[0]) if len(texts) == 1 else 'pictures'}-{seed}", facts, columns=columns)
    finish(album, len(texts) - len(good))


def read_prompts(path: Path) -> list[str]:
    """The lines of a file (or of stdin, for "-") that are not blank.

    Raises: InputError when it cannot be read, is no UTF-8 text, or is larger than 16 MiB; no more than that is read.
    """
    shown = "stdin" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(PROMPTS_LIMIT_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise InputError(f"{shown} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(data) > PROMPTS_LIMIT_BYTES:
        raise InputError(
            f"{shown} has more than {PROMPTS_LIMIT_BYTES:,} bytes, the limit of a file of prompts; "
            "if it is the right file, split it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(f"{shown} is no UTF-8 text (at byte {problem.start}); save it as UTF-8") from problem
    if "\0" in text:
        raise InputError(f"{shown} is no text: it has NUL characters in it; give one prompt a line, as UTF-8")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def plain(text: str) -> str:
    """`text` as valid Unicode: bytes from the command line that were none become replacement characters."""
    return text.encode("utf-8", "surrogateescape" if _escaped(text) else "replace").decode("utf-8", "replace")


def usable(texts: list[str]) -> dict[int, str]:
    """The prompts that can be used, by their place; each of the others is told of."""
    from unclip.clip.encoders import check_prompt

    good = {}
    for place, text in enumerate(texts):
        try:
            check_prompt(text)
            good[place] = text
        except InputError as problem:
            error(f"prompt {place + 1} of {len(texts)}: {problem}")
    return good


def _escaped(text: str) -> bool:
    """Whether every lone surrogate of `text` stands for a byte, as Python has it on the command line."""
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in text)
