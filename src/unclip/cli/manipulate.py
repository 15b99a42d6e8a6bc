"""`unclip interpolate`, `edit`, `blend` and `invert`: pictures and captions as points in latent space."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli import options
from unclip.cli.inputs import Part, no_file, opened, plain, read_part
from unclip.cli.latents import NO_GUIDANCE, ManipulationRun, one_row
from unclip.cli.messages import note
from unclip.cli.options import argument, flag, option, shared
from unclip.cli.output import Film, Job, PictureWriter, check_free, slug, within_memory
from unclip.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class Spacing(StrEnum):
    """The spacing of the frames of a path."""

    jumps = "jumps"
    turns = "turns"


@dataclass(frozen=True)
class PathDecoding(options.Decoding):
    """Settings of the decoder and of super-resolution, with the defaults of `unclip interpolate`."""

    decoder_guidance: Annotated[
        float | None, options.setting("decoder_guidance_scale", "SCALE", default="1; for captions the model's own")
    ] = None


def interpolate(
    *,
    parts: Annotated[list[str], argument("A B …")],
    caption: options.Caption = False,
    model: options.Model = "unclip-emoji",
    frames: Annotated[int, option("N", min=1, max=1000)] = 8,
    one_noise: Annotated[bool, flag("--one-noise")] = False,
    spacing: Annotated[Spacing, option("HOW")] = Spacing.jumps,
    super_res: Annotated[bool, flag("--super-res")] = False,
    seed: Annotated[int, option("N", min=0, max=options.MAX_SEED)] = 0,
    prior: options.PriorChoice,
    decoding: PathDecoding,
    film: Film,
    common: options.Common,
) -> None:
    """Interpolate between pictures and captions.

    Pictures are inverted, so the first and the last frame reconstruct the given ones; the embedding and the noise are
    both interpolated by angle. Captions have the embeddings that `generate` samples with the same seed, and share the
    decoder's noise. A film plays forwards and backwards. The paths are printed to stdout, one on each line.

    Args:
        parts: Two or more files of pictures or latents, or captions.
        frames: Frames for each step from one input to the next, not counting the next input.
        one_noise: Keep the noise of the first input, so that only the content changes.
        spacing: jumps: neighbouring frames differ equally, which takes two extra passes of the decoder; turns: equal
            steps of the angle.
        super_res: Also invert super-resolution, to reconstruct the ends in detail.
        seed: Seed of the noise that all frames share.

    Examples:
        unclip interpolate cat.png dog.png --grid
        unclip interpolate "a red apple" "a pear" "a lemon" --frames 12 --film gif
        unclip interpolate cat.png dog.png --one-noise --film webp --out film
        unclip interpolate cat.png dog.png --frames 3 --spacing turns --grid
    """
    read = [read_part(text, caption=caption) for text in parts]
    if len(read) < 2 and read[0].kind != "latent":
        raise typer.BadParameter("name two or more pictures or captions")
    film.check()
    stem = slug("-to-".join(part.stem for part in read))
    num_pictures = (len(read) - 1) * frames + 1  # or more: a file of latents may have several rows
    writer = PictureWriter(common, num_pictures, seed=seed, film=film.film is not None)
    run = ManipulationRun.open(
        model,
        common,
        decoding.given(),
        prior=prior.given(),
        parts=read,
        guidance=None if {part.kind for part in read} == {"caption"} else NO_GUIDANCE,
        more={"one_noise": one_noise, "super_res": super_res, "spacing": spacing.value},
    )

    from unclip.stages.manipulation import NUM_DRAWINGS, even_places, path_at

    first, *others = latents = [run.latent(part, seed=seed, super_res=super_res) for part in read]
    points = first.join(*others)
    if spacing is Spacing.jumps and frames > 1 and not common.quiet:
        note("the decoder runs twice over the path, in small, to place the frames")
    batch_size, num_drawings = common.output.batch_size, NUM_DRAWINGS if spacing is Spacing.jumps else 0
    with within_memory(batch_size):
        more = {"one_noise": one_noise, "num_drawings": num_drawings, "batch_size": batch_size}
        places = even_places(points, frames - 1, run.decode_small, **more)
    latent = path_at(points, places, one_noise=one_noise)
    read = [part for part, rows in zip(read, latents, strict=True) for _ in range(len(rows))]
    run.decode_rows(latent, _frame_facts(read, places), stem, writer, _ends(read), film=film)


def _frame_facts(read: list[Part], places: Sequence[float]) -> list[dict[str, object]]:
    """The two inputs that each frame is between, and its share of the angle from the first to the second."""
    legs = [min(int(place), len(read) - 2) for place in places]
    return [
        {"from": read[leg].name, "to": read[leg + 1].name, "share": round(place - leg, 4)}
        for leg, place in zip(legs, places, strict=True)
    ]


def _ends(read: list[Part]) -> dict[str, str]:
    """The inputs, for the metadata of the sheet and the film."""
    first, *between, last = [part.name for part in read]
    return {"from": first, **({"through": "; ".join(between)} if between else {}), "to": last}


@dataclass(frozen=True)
class EditPriorChoice(options.PriorChoice):
    """How the prior chooses among its samples, with the defaults of `unclip edit`."""

    candidates: Annotated[
        int | None,
        options.setting(
            "num_prior_candidates",
            help="Image embeddings that the prior samples for each caption. Both captions keep the same one.",
            default="1",
        ),
    ] = None


def edit(
    *,
    image: Annotated[str, argument("IMAGE")],
    source: Annotated[str, option("TEXT", "--from")],
    target: Annotated[str, option("TEXT", "--to")],
    model: options.Model = "unclip-emoji",
    strength: Annotated[float, option("SHARE", min=0, max=1)] = 0.5,
    sweep: Annotated[int, option("N", min=1, max=100)] = 1,
    text_space: Annotated[bool, flag("--text-space")] = False,
    seed: Annotated[int, option("N", min=0, max=options.MAX_SEED)] = 0,
    prior: EditPriorChoice,
    decoding: options.InversionDecoding,
    film: Film,
    common: options.Common,
) -> None:
    """Change a picture by the difference of two captions.

    The picture is inverted. Its embedding moves in the direction from one caption to the other and its noise stays, so
    everything else keeps its place. The prior samples the embeddings of both captions from the same noise, and takes
    the same candidate for both, so they differ only in meaning. The paths are printed to stdout, one on each
    line.

    Args:
        image: A picture file, or a file of `unclip invert`.
        source: What the picture shows.
        target: What it should show instead.
        strength: Size of the change, from 0 (none) to 1 (all of it).
        sweep: Make N pictures, from no change to the strength.
        text_space: Use the difference of the text embeddings, as in the paper, without the prior.
        seed: Seed of super-resolution and the prior.

    Examples:
        unclip edit cat.png --from "a cat" --to "a lion" --strength 0.5
        unclip edit cat.png --from "a cat" --to "a dog" --sweep 7 --grid
        unclip edit face.png --from "happy face" --to "sad face" --text-space
    """
    film.check()
    source, target = plain(source), plain(target)
    if source.split() == target.split():
        raise InputError(f"--from and --to are both {source!r:.100}, so their difference is zero")
    part = read_part(image, caption=True)
    if part.kind == "caption":
        raise InputError(f"{no_file(image)}; give a picture to edit")
    filmed = film.film is not None
    writer = PictureWriter(common, sweep + filmed, seed=seed, film=filmed)
    prior_settings = prior.given()
    if prior.candidates is None and not text_space:
        prior_settings["num_prior_candidates"] = 1  # not the model's own number: see `caption_difference`
    more = {"prior": prior_settings, "captions": not text_space, "more": {"text_space": text_space}}
    run = ManipulationRun.open(model, common, decoding.given(), parts=[part], **more)

    from unclip.stages.manipulation import edit as edited

    difference = run.manipulator.caption_difference
    direction = difference(target, source, through_prior=not text_space, seed=seed, **run.prior_settings)
    strengths = [strength] if sweep == 1 else [strength * place / (sweep - 1) for place in range(sweep)]
    latent = edited(one_row(run.latent(part, seed=seed), part), direction, strengths)
    about = {"image": part.name, "from": source, "to": target}
    facts = [{**about, "strength": round(each, 4)} for each in strengths]
    whole, labels = {**about, "strength": strength, "sweep": sweep}, [f"{each:.3g}" for each in strengths]
    run.decode_rows(latent, facts, f"{part.stem}-to-{slug(target)}", writer, whole, film=film, labels=labels)


def blend(
    *,
    parts: Annotated[list[str], argument("PART[:WEIGHT] …")],
    caption: options.Caption = False,
    model: options.Model = "unclip-emoji",
    num_images: options.NumImages = 1,
    seed: options.Seed = None,
    prior: options.PriorChoice,
    decoding: options.Decoding,
    common: options.Common,
) -> None:
    """Mix the content of several pictures and captions, with weights.

    Pictures have their image embeddings, captions those that `generate` samples with the same seed. Only
    the weights matter, not the norms of the embeddings. A caption that ends in a colon and a number needs a weight too.
    The paths are printed to stdout, one on each line.

    Args:
        parts: Files of pictures or latents, or captions, each with an optional weight after a colon (default 1). A
            negative weight subtracts.

    Examples:
        unclip blend cat.png dog.png
        unclip blend cat.png:0.6 "a red heart:0.4" -n 4 --grid
        unclip blend lion.png "an orange:-0.5" "a blue sky:0.5"
    """
    read = [read_part(text, weighted=True, caption=caption) for text in parts]
    writer = PictureWriter(common, num_images, seed=seed)
    captions = any(part.kind == "caption" for part in read)
    # Without `parts`: nothing is reconstructed, so the recorded settings of latents do not matter.
    run = ManipulationRun.open(model, common, decoding.given(), prior=prior.given(), captions=captions, guidance=None)

    import torch

    from unclip.stages.arithmetic import blend as mixed

    weights = [part.weight for part in read]
    embeddings = {part: run.embedding(part, seed=writer.seed) for part in read if part.kind != "caption"}

    def draw(batch: list[Job]) -> "list[Image]":
        seeds = [job.seed for job in batch]
        known = {part: row.expand(len(seeds), -1) for part, row in embeddings.items()}
        each = [known[part] if part in known else run.caption(part, seeds) for part in read]
        rows = torch.stack([mixed(row, weights) for row in torch.stack(each, dim=1)])
        return run.manipulator.variation(image_embeddings=rows, seed=seeds, **run.settings).images  # type: ignore[union-attr, return-value]

    about: dict[str, Any] = {"blend": "; ".join(f"{part.name}:{part.weight:g}" for part in read), **run.metadata}
    stem = slug("-and-".join(part.stem for part in read))
    writer.make((Job(None, writer.seed_of(copy), stem, {}) for copy in range(num_images)), draw, about)
    writer.save_sheet(stem, about)


def invert(
    *,
    images: Annotated[list[Path], argument("IMAGE")],
    model: options.Model = "unclip-emoji",
    super_res: Annotated[bool, flag("--super-res")] = False,
    check: Annotated[bool, flag("--check")] = False,
    decoding: options.InversionDecoding,
    out: Annotated[Path, shared("PATH", "--out", "-o")] = Path("."),
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    as_json: options.Json = False,
    compute: options.Compute,
    quiet: options.Quiet = False,
) -> None:
    """Find the noise from which the decoder makes a picture.

    Each picture becomes a small file of two latents: its image embedding, and the noise from which the decoder
    reconstructs it. `vary --keep-structure`, `interpolate`, `edit`, `blend` and `probe show` accept such a file instead
    of a picture. If pictures have the same name, a number is added to the names of the later files. The paths are
    printed to stdout, one on each line.

    Args:
        images: One or more picture files.
        super_res: Also invert super-resolution, to reconstruct fine detail.
        check: Also write the reconstructed picture, and print its PSNR.
        out: Folder for the latents, or a .safetensors file for a single one.
        overwrite: Replace existing files.

    Examples:
        unclip invert cat.png
        unclip invert cat.png dog.png --super-res --out latents
        unclip vary latents/cat.safetensors --keep-structure -n 4
    """
    failed: list[Path] = []
    common = options.Common(options.Output(out, overwrite=overwrite, as_json=as_json), compute, quiet)
    writer = PictureWriter(common, len(images), seed=0, suffix=SUFFIX)
    pictures = list(opened(images, failed))
    files = [writer.file] if writer.file else _files(writer.folder, [one.path for one in pictures])
    if pictures:
        check_free(*files, overwrite=overwrite)
        run = ManipulationRun.open(model, common, decoding.given(), more={"super_res": super_res})
        kept = {**run.settings, **compute.tile_fact}
        for one, file in zip(pictures, files, strict=True):
            latent = run.manipulator.invert(one.given, super_res=super_res, **run.settings)
            about = {"model": run.metadata["model"], "image": plain(one.path.name)}
            run.manipulator.save(latent, file, settings=kept, about=about, overwrite=overwrite)
            writer.num_saved += 1
            facts = {"image": about["image"], **run.metadata}
            reconstruction = None
            if check:
                made: Any = run.manipulator.decode(latent, return_intermediates=True, **run.settings)
                facts["psnr_db"] = round(psnr_db(one.given, made.small_images[0]), 2)
                if not quiet:
                    note(f"{facts['image']}: {facts['psnr_db']:.1f} dB")
                reconstruction = writer.save(made.images[0], f"{file.stem}-reconstruction", facts)
            writer.announce(file, facts)
            if reconstruction is not None:
                writer.announce(reconstruction, facts)
    writer.exit_if_failed(len(failed))


def _files(out: Path, images: list[Path]) -> list[Path]:
    """The file of each picture's latents, named after it; a number is added to a name that is taken."""
    stems: list[str] = []
    for image in images:
        name = slug(plain(image.stem))
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        stems.append(next(name for name in names if name not in stems))
    return [out / f"{stem}{SUFFIX}" for stem in stems]


def psnr_db(image: "Image", other: "Image") -> float:
    """The peak signal-to-noise ratio of `other`, relative to `image` in its size; 99 for equal pictures."""
    from unclip.images import to_square, to_tensor

    error = float(((to_square(image, other.width) - to_tensor(other)) / 2).square().mean())
    return min(99.0, -10 * math.log10(max(error, 1e-12)))
