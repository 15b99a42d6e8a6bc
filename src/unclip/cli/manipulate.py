"""`unclip interpolate`: the way from one picture or caption to another.

Knows parts and options; the path itself is another module's affair.
"""

import itertools
import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.files import safe_join
from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli import options
from unclip.cli.inputs import Part, no_file, plain, read_part
from unclip.cli.latents import NO_GUIDANCE, Workbench, one_row
from unclip.cli.messages import note
from unclip.cli.output import (
    FPS,
    Album,
    Film,
    Wish,
    check_writer,
    chosen_seed,
    cut,
    finish,
    make_all,
    picture_seed,
    slug,
    within_memory,
)
from unclip.errors import InputError, OutputExistsError
from unclip.pipelines.session import Machine, decoder_settings, drawing_settings

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATE_EXAMPLES = options.examples(
    "unclip interpolate cat.png dog.png --grid",
    'unclip interpolate "a red apple" "a pear" "a lemon" --frames 12 --film gif',
    "unclip interpolate cat.png dog.png --one-noise --film webp --out film",
    "unclip interpolate cat.png dog.png --frames 3 --spacing turns --grid",
)


class Spacing(StrEnum):
    """Where the frames of a path stand."""

    jumps = "jumps"
    turns = "turns"


def interpolate(
    parts: Annotated[
        list[str], typer.Argument(metavar="A B …", help="Two or more: files of pictures or latents, or captions.")
    ],
    caption: options.Caption = False,
    model: options.Model = "unclip-emoji",
    frames: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="Frames from each to the next, without the next itself.")
    ] = 8,
    one_noise: Annotated[
        bool, typer.Option("--one-noise", help="Keep the first one's noise throughout: only what is shown changes.")
    ] = False,
    spacing: Annotated[
        Spacing,
        typer.Option(
            metavar="HOW",
            help="jumps: neighbouring pictures differ equally; the decoder draws the path twice to find out where. "
            "turns: equal steps of the angle.",
        ),
    ] = Spacing.jumps,
    super_res: Annotated[
        bool, typer.Option("--super-res", help="Also invert super-resolution, so that the ends come back in detail.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Of the noise that all frames share.")
    ] = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: Annotated[
        float | None,
        options.shared(
            *options.names_of("decoder-guidance"),
            metavar="SCALE",
            help="Guidance of the decoder; 1 or less: none.",
            show_default="1; of captions the model's",
        ),
    ] = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    film: Film = None,
    fps: FPS = 10,
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
    """Go from one picture or caption to another, step by step.

    Pictures are inverted, so the first and the last frame are the given ones again; what is shown and the noise both
    turn from the one's to the other's. Captions have the embeddings that `generate` draws for them with the same seed,
    and share the decoder's noise. A film goes there and back. The paths are printed on stdout, one a line.
    """
    read = [read_part(text, caption=caption) for text in parts]
    if len(read) < 2 and read[0].kind != "latent":
        raise typer.BadParameter("name two or more pictures or captions")
    check_writer(film)
    stem = slug("-to-".join(part.stem for part in read))
    num_files = (len(read) - 1) * frames + 1  # or more, of latents' files with several rows
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid or film is not None, num_files=num_files)
    kinds = {part.kind for part in read}
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    bench = Workbench.open(
        model,
        Machine(dtype, device, cpu_offload, quiet, tile),
        given,
        drawing=drawing,
        parts=read,
        guidance=None if kinds == {"caption"} else NO_GUIDANCE,
        ways={"one_noise": one_noise, "super_res": super_res, "spacing": spacing.value},
    )

    from unclip.stages.manipulation import NUM_DRAWINGS, even_places, path_at

    first, *others = latents = [bench.latent(part, seed=seed, super_res=super_res) for part in read]
    points = first.join(*others)
    if spacing is Spacing.jumps and frames > 1 and not quiet:
        note("the decoder draws the path twice in small, to place its frames")
    with within_memory(batch_size):
        places = even_places(
            points,
            frames - 1,
            bench.decode_small,
            one_noise=one_noise,
            num_drawings=NUM_DRAWINGS if spacing is Spacing.jumps else 0,
            batch_size=batch_size,
        )
    latent = path_at(points, places, one_noise=one_noise)
    read = [part for part, rows in zip(read, latents, strict=True) for _ in range(len(rows))]
    whole = _whole(read)
    bench.draw(
        latent,
        _facts(read, places),
        album,
        stem,
        seed=seed,
        batch_size=batch_size,
        film=film,
        fps=fps,
        sheet=grid,
        whole=whole,
    )


def _facts(read: list[Part], places: Sequence[float]) -> list[dict[str, object]]:
    """Between which two every frame stands, and at which share of the angle from the one to the other."""
    legs = [min(int(place), len(read) - 2) for place in places]
    return [
        {"from": read[leg].name, "to": read[leg + 1].name, "share": round(place - leg, 4)}
        for leg, place in zip(legs, places, strict=True)
    ]


def _whole(read: list[Part]) -> dict[str, str]:
    """What sheet and film say of the way."""
    first, *between, last = [part.name for part in read]
    return {"from": first, **({"through": "; ".join(between)} if between else {}), "to": last}


EDIT_EXAMPLES = options.examples(
    'unclip edit cat.png --from "a cat" --to "a lion" --strength 0.5',
    'unclip edit cat.png --from "a cat" --to "a dog" --sweep 7 --grid',
    'unclip edit face.png --from "happy face" --to "sad face" --text-space',
)


def edit(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, or a latent of: unclip invert.")],
    source: Annotated[str, typer.Option("--from", metavar="TEXT", help="What the picture shows.")],
    target: Annotated[str, typer.Option("--to", metavar="TEXT", help="What it should show instead.")],
    model: options.Model = "unclip-emoji",
    strength: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="How far to turn, from 0 (not) to 1 (all the way).")
    ] = 0.5,
    sweep: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Make N pictures, from no change to the strength.")
    ] = 1,
    text_space: Annotated[
        bool,
        typer.Option(
            "--text-space", help="The captions' own embeddings differ, as in the paper, not those the prior draws."
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Of super-resolution and the prior.")
    ] = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.KeptGuidance = None,
    candidates: Annotated[
        int | None,
        options.candidates("Ideas that the prior draws for each caption; both keep the same one.", default="1"),
    ] = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    film: Film = None,
    fps: FPS = 10,
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
    """Change a picture as one caption differs from another.

    The picture is inverted, and its embedding turned towards the difference of the two captions, while the noise stays:
    so what is changed changes and the rest stays where it was. The prior draws both captions' embeddings from the same
    noise, and of several candidates takes the same for both: what differs is what they say. The paths are printed on
    stdout, one a line.
    """
    check_writer(film)
    source, target = plain(source), plain(target)
    if source.split() == target.split():
        raise InputError(f"--from and --to are both {source!r:.100}; there is no difference to go by")
    part = read_part(image, caption=True)
    if part.kind == "caption":
        raise InputError(f"{no_file(image)}; an edit starts from a picture")
    filmed = film is not None
    num_files = sweep + grid + filmed
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid or filmed, num_files=num_files)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    if candidates is None and not text_space:
        candidates = 1  # and not as many as the model recommends: see `caption_difference`
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    bench = Workbench.open(
        model,
        machine,
        given,
        drawing=drawing,
        parts=[part],
        captions=not text_space,
        guidance=NO_GUIDANCE,
        ways={"text_space": text_space},
    )

    from unclip.stages.manipulation import edit as turn_to

    through_prior = not text_space
    direction = bench.tool.caption_difference(target, source, through_prior=through_prior, seed=seed, **bench.drawing)
    strengths = [strength] if sweep == 1 else [strength * place / (sweep - 1) for place in range(sweep)]
    latent = turn_to(one_row(bench.latent(part, seed=seed), part), direction, strengths)
    about = {"image": part.name, "from": source, "to": target}
    bench.draw(
        latent,
        [{**about, "strength": round(each, 4)} for each in strengths],
        album,
        f"{part.stem}-to-{slug(target)}",
        seed=seed,
        batch_size=batch_size,
        film=film,
        fps=fps,
        sheet=grid,
        whole={**about, "strength": strength, "sweep": sweep},
        labels=[f"{each:.3g}" for each in strengths],
    )


BLEND_EXAMPLES = options.examples(
    "unclip blend cat.png dog.png",
    'unclip blend cat.png:0.6 "a red heart:0.4" -n 4 --grid',
    'unclip blend lion.png "an orange:-0.5" "a blue sky:0.5"',
)


def blend(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART[:WEIGHT] …",
            help="Files of pictures or latents, or captions, each with its weight (1 by default) after a colon; a "
            "weight below 0 takes away.",
        ),
    ],
    caption: options.Caption = False,
    model: options.Model = "unclip-emoji",
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=100_000, metavar="N", help="Pictures.")
    ] = 1,
    seed: options.Seed = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
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
    """Mix what several pictures and captions show, with weights.

    Pictures count by their embeddings, captions by those that `generate` draws for them with the same seed; each by its
    direction, so only the weights say how much of it there is. A caption that ends in a colon and a number needs a
    weight after it. The paths are printed on stdout, one a line.
    """
    read = [read_part(text, weighted=True, caption=caption) for text in parts]
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=num_images + grid)
    seed = chosen_seed(seed, album, quiet=quiet)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    captions = any(part.kind == "caption" for part in read)  # a latent's steps are of no use here: nothing comes back
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    bench = Workbench.open(model, machine, given, drawing=drawing, captions=captions, guidance=None)

    import torch

    from unclip.stages.arithmetic import blend as mixed

    weights = [part.weight for part in read]
    seen = {part: bench.embedding(part, seed=seed) for part in read if part.kind != "caption"}

    def draw(batch: list[Wish]) -> "list[Image]":
        seeds = [wish.seed for wish in batch]
        each = [seen[part].expand(len(seeds), -1) if part in seen else bench.caption(part, seeds) for part in read]
        rows = torch.stack([mixed(embeddings, weights) for embeddings in torch.stack(each, dim=1)])
        output = bench.tool.variation(image_embeddings=rows, seed=seeds, **bench.settings)  # type: ignore[arg-type]
        return output.images  # type: ignore[union-attr, return-value]

    about: dict[str, Any] = {"blend": "; ".join(f"{part.name}:{part.weight:g}" for part in read), **bench.about}
    stem = slug("-and-".join(part.stem for part in read))
    wishes = (Wish(None, picture_seed(seed, copy), stem, {}) for copy in range(num_images))
    make_all(cut(wishes, batch_size), draw, album, about)
    if grid:
        album.save_sheet(f"{stem}-{seed}", {**about, "seed": seed})


INVERT_EXAMPLES = options.examples(
    "unclip invert cat.png",
    "unclip invert cat.png dog.png --super-res --out latents",
    "unclip vary latents/cat.safetensors --keep-structure -n 4",
)


def invert(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="A picture file; one or several.")],
    model: options.Model = "unclip-emoji",
    super_res: Annotated[
        bool, typer.Option("--super-res", help="Also invert super-resolution, to bring fine detail back.")
    ] = False,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.KeptGuidance = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also decode again: write the picture that comes back, and tell its PSNR.")
    ] = False,
    out: Annotated[
        Path,
        options.shared(
            "--out", "-o", metavar="PATH", help="Folder for the latents, or a .safetensors file for a single one."
        ),
    ] = Path("."),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
    as_json: options.Json = False,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    cpu_offload: options.CpuOffload = False,
    tile: options.Tile = None,
    quiet: options.Quiet = False,
) -> None:
    """Find the noise that leads to a picture.

    Each picture becomes a small file of two latents: what the picture shows (its embedding), and the noise from which
    the decoder draws it so and not otherwise. `vary --keep-structure`, `interpolate`, `edit`, `blend` and `probe show`
    take such a file in place of a picture. Of pictures with one name the later ones' files have a number. The paths are
    printed on stdout, one a line.
    """
    from unclip.cli.inputs import opened

    failed: list[Path] = []
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=False, num_files=len(images), suffix=SUFFIX)
    pictures = list(opened(images, failed))
    if pictures:
        files = [album.file] if album.file else _files(album.folder, [one.path for one in pictures])
        there = [str(file) for file in files if file.exists()]
        if there and not overwrite:
            raise OutputExistsError(_exists(there))
        given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
        machine = Machine(dtype, device, cpu_offload, quiet, tile)
        bench = Workbench.open(model, machine, given, guidance=NO_GUIDANCE, ways={"super_res": super_res})
        kept = {**bench.settings, **machine.tile_fact}
        for path, image, file in ((one.path, one.given, file) for one, file in zip(pictures, files, strict=True)):
            latent = bench.tool.invert(image, super_res=super_res, **bench.settings)  # type: ignore[arg-type]
            told = {"model": bench.about["model"], "image": plain(path.name)}
            try:
                bench.tool.save(latent, file, settings=kept, about=told, overwrite=overwrite)
            except OutputExistsError as problem:
                raise OutputExistsError(_exists([str(file)])) from problem
            album.num_saved += 1
            facts = {"image": plain(path.name), **bench.about}
            if check:
                output = bench.tool.decode(latent, return_intermediates=True, **bench.settings)  # type: ignore[arg-type]
                assert isinstance(output.images, list)
                assert isinstance(output.small_images, list)
                facts["psnr_db"] = round(psnr_db(image, output.small_images[0]), 2)
                if not quiet:
                    note(f"{facts['image']}: {facts['psnr_db']:.1f} dB")
                back = album.save(output.images[0], f"{file.stem}-reconstruction", facts)
                album.tell(file, facts)
                album.tell(back, facts)
            else:
                album.tell(file, facts)
    finish(album, len(failed))


def _files(out: Path, images: list[Path]) -> list[Path]:
    """A latent's file for each picture, named after it; of pictures with one name the later ones have a number."""
    stems: list[str] = []
    for image in images:
        name = slug(plain(image.stem))
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        stems.append(next(name for name in names if name not in stems))
    return [safe_join(out, f"{stem}{SUFFIX}") for stem in stems]


def _exists(files: list[str]) -> str:
    verb = "exists" if len(files) == 1 else "exist"
    return f"{', '.join(files)} {verb} already: use --overwrite, or another --out"


def psnr_db(image: "Image", other: "Image") -> float:
    """The peak signal-to-noise ratio of `other`, against `image` in its size; 99 for pictures that are equal."""
    from unclip.images import to_square, to_tensor

    error = float(((to_square(image, other.width) - to_tensor(other)) / 2).square().mean())
    return min(99.0, -10 * math.log10(max(error, 1e-12)))
