"""`unclip vary`: pictures that are like given ones.

Knows picture files and options; the batches, the files and the model are other modules' affair.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.checkpoints.tensor_file import PROMPT
from unclip.cli import options
from unclip.cli.inputs import check_can_vary, opened, plain
from unclip.cli.output import Album, Wish, chosen_seed, cut, finish, make_all, picture_seed, slug
from unclip.cli.provenance import MADE_WITH, made_with
from unclip.pipelines.session import (
    Machine,
    call_settings,
    decoder_settings,
    find_model,
    load,
    model_name,
    sampler_name,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.stages.manipulation import BipartiteLatent

EXAMPLES = options.examples(
    "unclip vary photo.jpg",
    "unclip vary apple.png pear.png -n 4 --grid --out variations",
    'unclip vary cat.png --prompt "a cat with a hat" --seed 7',
    "unclip vary cat.png --keep-structure --eta 0.5 -n 4",
)


DEFAULT_ETA = 0.7
"""Of --keep-structure: outlines and colours stay, details differ."""


def vary(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="A picture file; one or several.")],
    model: options.Model = "unclip-emoji",
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Variations of each picture.")
    ] = 1,
    seed: options.Seed = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A caption that the decoder sees beside the picture.")
    ] = None,
    negative: options.Negative = None,
    keep_structure: Annotated[
        bool, typer.Option("--keep-structure", help="Start from the picture's own noise, found by inversion.")
    ] = False,
    eta: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="With --keep-structure: fresh noise a step, from 0 (the picture again) to 1.",
            show_default=str(DEFAULT_ETA),
        ),
    ] = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
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
    """Make variations of pictures.

    A variation shows what the given picture shows, drawn anew. Each becomes a PNG file named after the given file and
    the seed. With --keep-structure its outlines stay too; a file of `unclip invert` may then stand for a picture. The
    paths are printed on stdout, one a line.
    """
    if eta is not None and not keep_structure:
        raise typer.BadParameter("--eta goes with --keep-structure")
    if keep_structure and (negative is not None or sampler is not None):
        raise typer.BadParameter("--keep-structure samples by DDIM, and has no --negative and no other --sampler")
    sides = options.sides(size, height, width)
    if keep_structure and sides:
        raise typer.BadParameter(
            "--keep-structure makes pictures of the model's own size: leave out --size, --height, --width"
        )
    from unclip.cli.inputs import is_latent
    from unclip.cli.latents import NO_GUIDANCE, Keeper, recorded, recorded_tile, records
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
    from unclip.pipelines.manipulation import Manipulator

    folder, index = find_model(model, quiet=quiet)
    check_can_vary(model, index)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    failed: list[Path] = []
    prompt, negative = (None if text is None else plain(text) for text in (prompt, negative))
    if keep_structure:
        found = records((path for path in images if is_latent(path)), failed)
        tile = recorded_tile(found, tile)
        known = {"decoder_guidance_scale": NO_GUIDANCE, **recorded(found, {**given, PROMPT: prompt})}
        prompt = known.get(PROMPT) if prompt is None else prompt
        given = {name: known.get(name) if value is None else value for name, value in given.items()}
    settings = call_settings(UnCLIPImageVariationPipeline, folder, given)
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=len(images) * num_images + grid)
    seed = chosen_seed(seed, album, quiet=quiet)

    machine = Machine(dtype, device, cpu_offload, quiet, tile)

    @cache
    def loaded() -> UnCLIPImageVariationPipeline:
        return load(UnCLIPImageVariationPipeline, folder, machine, sampler)

    def latent(path: Path) -> "BipartiteLatent":
        return Manipulator(loaded()).load(path)[0]

    def wishes() -> Iterator[Wish]:
        for one in opened(images, failed, latent if keep_structure else None):
            facts = {"image": plain(one.path.name)} | ({} if one.row is None else {"row": one.row})
            for copy in range(num_images):
                name = f"{slug(plain(one.path.stem))}-variation"
                yield Wish(one.given, picture_seed(seed, one.place * num_images + copy), name, facts, one.row or 0)

    batches = cut(wishes(), batch_size)
    first = next(batches, None)  # broken files are found before the weights are read
    if first is not None:
        pipe = loaded()
        about = {
            "prompt": prompt,
            "negative": negative,
            "model": model_name(model),
            "settings": {**settings, **sides, "sampler": sampler_name(pipe), **machine.facts},
            MADE_WITH: made_with(pipe),
        }

        if keep_structure:
            about["eta"] = DEFAULT_ETA if eta is None else eta
            about["settings"]["sampler"] = "ddim"
            keeper = Keeper(Manipulator(pipe), settings, prompt)

        def draw(batch: list[Wish]) -> "list[Image]":
            pictures, seeds = [wish.given for wish in batch], [wish.seed for wish in batch]
            if keep_structure:
                return keeper.vary(pictures, seeds, about["eta"])
            return pipe(pictures, prompt=prompt, negative_prompt=negative, seed=seeds, **sides, **settings).images  # type: ignore[arg-type, union-attr, return-value]

        make_all(_chain(first, batches), draw, album, about)
        if grid:
            name = slug(plain(images[0].stem)) if len(images) == 1 else "pictures"
            columns = num_images if len(images) > 1 and num_images > 1 else None
            used = ", ".join(plain(path.name) for path in images if path not in failed)
            album.save_sheet(f"{name}-variation-{seed}", {"image": used, **about, "seed": seed}, columns=columns)
    finish(album, len(failed))


def _chain(first: list[Wish], rest: Iterator[list[Wish]]) -> Iterator[list[Wish]]:
    yield first
    yield from rest
