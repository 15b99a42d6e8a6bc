"""`unclip vary`: make variations of pictures."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.checkpoints.tensor_file import PROMPT
from unclip.cli import options
from unclip.cli.inputs import check_can_vary, is_latent, opened, plain
from unclip.cli.options import argument, flag, option
from unclip.cli.output import Job, PictureWriter, slug
from unclip.cli.provenance import metadata
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import FASTER, Session

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.stages.manipulation import BipartiteLatent


DEFAULT_ETA = 0.7
"""Default of --eta: outlines and colours stay, details differ."""


def vary(
    *,
    images: Annotated[list[Path], argument("IMAGE")],
    model: options.Model = "unclip-emoji",
    num_images: options.NumImagesOfEach = 1,
    seed: options.Seed = None,
    prompt: Annotated[str | None, option("TEXT")] = None,
    negative: options.Negative = None,
    keep_structure: Annotated[bool, flag("--keep-structure")] = False,
    eta: Annotated[float | None, option("SHARE", default=str(DEFAULT_ETA), min=0, max=1)] = None,
    size: options.Size,
    sampler: options.Sampler = None,
    decoding: options.NoisyDecoding,
    common: options.Common,
) -> None:
    """Make variations of pictures.

    A variation shows the same content in a new picture. Each becomes a PNG file named after the given file and the
    seed. With --keep-structure the outlines stay too, and a file of `unclip invert` may be given instead of a picture.
    The paths are printed to stdout, one on each line.

    Args:
        images: One or more picture files.
        prompt: A caption for the decoder, in addition to the picture.
        keep_structure: Start from the picture's own noise, found by inversion.
        eta: With --keep-structure: fresh noise in each step, from 0 (the picture itself) to 1.

    Examples:
        unclip vary photo.jpg
        unclip vary apple.png pear.png -n 4 --grid --out variations
        unclip vary cat.png --prompt "a cat with a hat" --seed 7
        unclip vary cat.png --noise-level 300 -n 4
        unclip vary cat.png --keep-structure --eta 0.5 -n 4
    """
    if eta is not None and not keep_structure:
        raise typer.BadParameter("--eta needs --keep-structure")
    if keep_structure and (negative is not None or sampler is not None):
        raise typer.BadParameter("--keep-structure samples by DDIM: leave out --negative and --sampler")
    if keep_structure and decoding.noise_level:
        raise typer.BadParameter("--keep-structure keeps the picture's embedding: leave out --noise-level")
    if keep_structure and any(getattr(decoding, name) is not None for name in ("preset", *FASTER)):
        raise typer.BadParameter(
            "--keep-structure inverts every step: leave out --preset, --decoder-guidance-low, --decoder-guidance-high, "
            "--decoder-reuse, --super-res-reuse"
        )
    if keep_structure and size.sides:
        raise typer.BadParameter(
            "--keep-structure makes pictures of the model's own size: leave out --size, --height, --width"
        )
    from unclip.cli.latents import NO_GUIDANCE, StructureVariations, recorded, recorded_tile, records
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    given, compute = decoding.given(), common.compute
    failed: list[Path] = []
    prompt, negative = (None if text is None else plain(text) for text in (prompt, negative))
    if keep_structure:
        given = {name: value for name, value in given.items() if name not in FASTER}
        found = records((path for path in images if is_latent(path)), failed)
        compute = replace(compute, tile=recorded_tile(found, compute.tile))
        known = {"decoder_guidance_scale": NO_GUIDANCE, **recorded(found, {**given, PROMPT: prompt})}
        prompt = known.get(PROMPT) if prompt is None else prompt
        given = {name: known.get(name) if value is None else value for name, value in given.items()}
    session = Session(model, compute, sampler=sampler, preset=decoding.preset, progress=not common.quiet)
    check_can_vary(model, session.parts)
    settings = session.settings(UnCLIPImageVariationPipeline, given) | size.sides
    writer = PictureWriter(common, len(images) * num_images, seed=seed)

    def latent(path: Path) -> "BipartiteLatent":
        return session.manipulator().load(path)[0]

    def all_jobs() -> Iterator[Job]:
        for one in opened(images, failed, latent if keep_structure else None):
            facts = {"image": plain(one.path.name)} | ({} if one.row is None else {"row": one.row})
            for copy in range(num_images):
                name = f"{slug(plain(one.path.stem))}-variation"
                yield Job(one.given, writer.seed_of(one.place * num_images + copy), name, facts, one.row or 0)

    jobs = all_jobs()
    first = list(islice(jobs, common.output.batch_size))  # broken files are found before the weights are read
    if first:
        pipe = session.pipeline(UnCLIPImageVariationPipeline)
        sampled_by = "ddim" if keep_structure else sampler_name(pipe)
        about = {"prompt": prompt, "negative": negative}
        about |= metadata(session, pipe, {**settings, "sampler": sampled_by})
        if keep_structure:
            about["eta"] = DEFAULT_ETA if eta is None else eta
        variations = StructureVariations(session.manipulator(), settings, prompt)

        def draw(batch: list[Job]) -> "list[Image]":
            pictures, seeds = [job.given for job in batch], [job.seed for job in batch]
            if keep_structure:
                return variations.make(pictures, seeds, about["eta"])
            return pipe(pictures, prompt=prompt, negative_prompt=negative, seed=seeds, **settings).images  # type: ignore[union-attr, return-value]

        writer.make(chain(first, jobs), draw, about)
        name = slug(plain(images[0].stem)) if len(images) == 1 else "pictures"
        columns = num_images if len(images) > 1 and num_images > 1 else None
        used = ", ".join(plain(path.name) for path in images if path not in failed)
        writer.save_sheet(f"{name}-variation", {"image": used, **about}, columns=columns)
    writer.exit_if_failed(len(failed))
