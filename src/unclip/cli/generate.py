"""`unclip generate`: pictures of captions.

Knows prompts and options; the batches, the files and the model are other modules' affair.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options
from unclip.cli.inputs import plain, read_prompts, usable
from unclip.cli.output import Album, Wish, chosen_seed, cut, finish, make_all, picture_seed, slug
from unclip.cli.provenance import MADE_WITH, made_with
from unclip.errors import CheckpointError
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
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="What the picture should show; one or several. - reads them from stdin, one a line."
        ),
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
    size: options.Size = None,
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
    texts = []
    for text in prompts or []:
        texts += read_prompts(Path("-")) if text == "-" else [plain(text)]
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
    sides = options.sides(size, height, width)
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=len(good) * num_images + grid)
    seed = chosen_seed(seed, album, quiet=quiet)
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    pipe = load(UnCLIPPipeline, folder, machine, sampler)
    negative = None if negative is None else plain(negative)

    def draw(batch: list[Wish]) -> "list[Image]":
        captions, seeds = [wish.given for wish in batch], [wish.seed for wish in batch]
        return pipe(captions, negative_prompt=negative, seed=seeds, **sides, **settings).images  # type: ignore[arg-type, union-attr, return-value]

    about = {
        "negative": negative,
        "model": model_name(model),
        "settings": {**settings, **sides, "sampler": sampler_name(pipe), **machine.facts},
        MADE_WITH: made_with(pipe),
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
        name = slug(texts[0]) if len(texts) == 1 else "pictures"
        labels = [text for text in good.values() for _ in range(num_images)]
        album.save_sheet(f"{name}-{seed}", facts, columns=columns, labels=labels)
    finish(album, len(texts) - len(good))
