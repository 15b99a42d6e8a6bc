"""Latents for the manipulating commands: recorded settings of files, pictures and captions as latents, decoding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.recommended import Recommended
from unclip.checkpoints.tensor_file import PROMPT, TILE, read_record
from unclip.cli import options
from unclip.cli.inputs import Part, check_can_vary, open_picture
from unclip.cli.messages import error
from unclip.cli.output import Film, Job, PictureWriter
from unclip.cli.provenance import metadata
from unclip.errors import CheckpointError, InputError
from unclip.pipelines.session import Session
from unclip.settings import SETTINGS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unclip.pipelines.manipulation import Manipulator
    from unclip.stages.manipulation import BipartiteLatent

NO_GUIDANCE = 1.0
"""Guidance scale of inversion and decoding: pictures are reconstructed most exactly without guidance."""


@dataclass(frozen=True)
class Record:
    """The settings of an inversion, as the latent's file records them.

    Attributes:
        path: the file.
        settings: steps, guidance and prompt, by the names of a call's arguments.
        tile: side of super-resolution's tiles; None: no tiles.
        side_px: of the largest super-resolution noise in the file; 0 if it has none.
    """

    path: Path
    settings: dict[str, Any]
    tile: int | None
    side_px: int

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises: as `BipartiteLatent.load`, and CheckpointError for a setting that is not a number."""
        from unclip.stages.manipulation import BipartiteLatent

        latent, about = BipartiteLatent.load(path)
        settings = read_record(about, str(path))
        side_px = max((noise.shape[-1] for noise in latent.super_res_noise), default=0)
        return cls(path, settings, settings.pop(TILE, None), side_px)

    def tiles(self, tile: int | None) -> str:
        """How super-resolution processes this picture with a tile; a tile as large as the picture has no effect."""
        return "as a whole" if tile is None or tile >= self.side_px else f"in tiles of {tile} px"


def records(latents: Iterable[Path], failed: list[Path]) -> list[Record]:
    """The records of files with latents; errors are printed, and the files are added to `failed`."""
    found = []
    for path in latents:
        try:
            found.append(Record.read(path))
        except CheckpointError as problem:
            error(problem)
            failed.append(path)
    return found


def recorded(found: Iterable[Record], given: Mapping[str, Any]) -> dict[str, Any]:
    """The steps, the guidance and the prompt of inversions, which decoding needs too.

    Given settings are not read from the files. Raises: InputError for files with different settings.
    """
    known: dict[str, tuple[Any, Path]] = {}
    for record in found:
        for name, value in record.settings.items():
            if given.get(name) is not None:
                continue
            first, other = known.setdefault(name, (value, record.path))
            if first != value:
                instead = f", or give {SETTINGS[name].option}" if name in SETTINGS else ""
                raise InputError(
                    f"{other} was inverted with {name} {first}, but {record.path} with {value}: use a separate "
                    f"command for each{instead}"
                )
    return {name: value for name, (value, _) in known.items()}


def recorded_tile(found: Sequence[Record], given: int | None) -> int | None:
    """The tile for decoding: the given one, or else that of the inversions.

    Raises: InputError for a latent with super-resolution noise that was inverted with another tile, because that noise
        only leads to its picture with the same tile.
    """
    keeping = [record for record in found if record.side_px]
    first = next((record for record in keeping or found if record.tile is not None), None)
    tile = given if given is not None else first and first.tile
    for record in keeping:
        then, now = record.tiles(record.tile), record.tiles(tile)
        if then != now and given is not None:
            raise InputError(
                f"{record.path} was inverted with super-resolution {then}, but would be decoded {now}: leave out "
                f"--tile {given}, or invert the picture again with it"
            )
        if then != now and first is not None:
            raise InputError(
                f"{first.path} was inverted with super-resolution {first.tiles(first.tile)}, but {record.path} {then}: "
                "use a separate command for each"
            )
    return tile


@dataclass(frozen=True)
class ManipulationRun:
    """A loaded model and the settings of one command.

    Attributes:
        manipulator: the model; it has a prior only when captions were announced.
        settings: arguments of `invert` and `decode`.
        prior_settings: arguments of `embed_captions` and `caption_difference`.
        metadata: of all files.
    """

    manipulator: "Manipulator"
    settings: dict[str, Any]
    prior_settings: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def open(
        cls,
        model: str,
        common: options.Common,
        decoding: Mapping[str, Recommended | None],
        *,
        prior: Mapping[str, Recommended | None] | None = None,
        parts: Sequence[Part] = (),
        captions: bool | None = None,
        guidance: float | None = NO_GUIDANCE,
        more: Mapping[str, bool | str] | None = None,
    ) -> "ManipulationRun":
        """Load the model, with its prior only if captions need it.

        Args:
            model: a folder, a hub id or a built-in name.
            common: the command's options; without a tile, that of the latents among the parts is used.
            decoding: given settings of the decoder and super-resolution.
            prior: given settings of the prior.
            parts: the command's inputs; latents among them record settings, which are used where none are given.
            captions: whether the prior is needed; by default if there is a caption among the parts.
            guidance: the decoder's scale where it is neither given nor recorded; None: the model's own.
            more: further settings for the metadata.

        Raises: CheckpointError for a model without an image encoder or a prior that is needed; InputError for settings
            of the prior where it does not run, and as `Record.read`, `recorded` and `recorded_tile`.
        """
        if captions is None:
            captions = any(part.kind == "caption" for part in parts)
        found = [Record.read(Path(part.text)) for part in parts if part.kind == "latent"]
        compute = replace(common.compute, tile=recorded_tile(found, common.compute.tile))
        session = Session(model, compute, progress=not common.quiet)
        check_can_vary(model, session.parts)
        if captions and "prior" not in session.parts:
            raise CheckpointError(f"{model} has no prior, so it cannot use captions: give pictures")
        if not captions:
            options.refuse_prior_choice(prior or {}, "no caption becomes an image embedding")

        from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
        from unclip.pipelines.text_to_image import UnCLIPPipeline

        own = {"decoder_guidance_scale": guidance, **recorded(found, decoding)}
        decoding = {name: own.get(name) if value is None else value for name, value in decoding.items()}
        settings = session.settings(UnCLIPImageVariationPipeline, decoding)
        settings |= {PROMPT: own[PROMPT]} if PROMPT in own else {}
        prior_settings = session.settings(UnCLIPPipeline, prior or {}) if captions else {}
        manipulator = session.manipulator(captions=captions)
        about = metadata(session, manipulator.variation, {**settings, **prior_settings, **(more or {})})
        return cls(manipulator, settings, prior_settings, about)

    def latent(self, part: Part, *, seed: int, super_res: bool = False) -> "BipartiteLatent":
        """A picture inverted, all rows of a latent's file, or a caption's embedding with noise of the seed."""
        if part.kind == "latent":
            return self.manipulator.load(part.text)[0]
        if part.kind == "caption":
            return self.manipulator.fresh(self.embedding(part, seed=seed), seed)
        return self.manipulator.invert(open_picture(part.text), super_res=super_res, **self.settings)

    def embedding(self, part: Part, *, seed: int) -> "Tensor":
        """One row [1, embedding_dim], without inversion. Raises: InputError for a file of several latents."""
        if part.kind == "latent":
            return one_row(self.manipulator.load(part.text)[0], part).image_embedding
        if part.kind == "caption":
            return self.caption(part, [seed])
        return self.manipulator.embed_images(open_picture(part.text)).cpu()

    def caption(self, part: Part, seeds: Sequence[int]) -> "Tensor":
        """A caption's image embedding for each of the seeds [len(seeds), embedding_dim]."""
        return self.manipulator.embed_captions([part.text] * len(seeds), seed=seeds, **self.prior_settings)

    def decode_small(self, latent: "BipartiteLatent") -> "Tensor":
        """The decoder's pictures of latents, before super-resolution."""
        own = {name: value for name, value in self.settings.items() if not name.startswith("super_res")}
        return self.manipulator.decode_small(latent, **own)

    def decode_rows(
        self,
        latent: "BipartiteLatent",
        facts: Sequence[Mapping[str, Any]],
        stem: str,
        writer: PictureWriter,
        whole: Mapping[str, Any],
        *,
        film: Film | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Decode and save every row with the same noise, then write the sheet and the film.

        Args:
            latent: one row for each picture.
            facts: metadata of each row.
            stem: the first part of the file names.
            writer: saves the files; its seed is that of all noise that the latent does not have.
            whole: metadata of the sheet and the film.
            film: options of the film.
            labels: captions on the sheet, one below each picture.
        """
        several, seed = len(latent) > 1, writer.seed
        jobs = (Job(row, seed, f"{stem}-{row:03d}" if several else stem, facts[row], row) for row in range(len(latent)))

        def decode(batch: list[Job]) -> Any:
            rows = latent.select([job.given for job in batch])
            return self.manipulator.decode(rows, seed=seed, **self.settings).images

        writer.make(jobs, decode, self.metadata)
        about = {**whole, **self.metadata}
        writer.save_sheet(stem, about, columns=len(latent) if len(latent) <= 10 else None, labels=labels)
        if film is not None and film.film is not None and (frames := writer.kept):
            path = writer.write(f"{stem}-{seed}", f".{film.film}", lambda draft: film.save(draft, frames))
            writer.announce(path, {**about, "seed": seed, "frames": len(latent), "fps": film.fps})


class StructureVariations:
    """Variations that keep the noise of a picture, which is inverted once for all of them.

    Args:
        manipulator: the model.
        settings: arguments of `invert` and `decode`.
        prompt: a caption for the decoder.
    """

    def __init__(self, manipulator: "Manipulator", settings: Mapping[str, Any], prompt: str | None) -> None:
        self._manipulator, self._settings, self._prompt = manipulator, settings, prompt
        self._last: tuple[Any, BipartiteLatent] | None = None

    def make(self, given: Sequence[Any], seeds: Sequence[int], eta: float) -> "list[Image]":
        """One variation of each picture, or latent of one row.

        Latents with noise of different numbers of stages are decoded separately: joined, they would lose some of it.
        """
        latents = [self._latent(each) for each in given]
        alike: dict[int, list[int]] = {}
        for place, latent in enumerate(latents):
            alike.setdefault(len(latent.super_res_noise), []).append(place)
        images: dict[int, Image] = {}
        for places in alike.values():
            first, *others = [latents[place] for place in places]
            settings = {**self._settings, "seed": [seeds[place] for place in places], "prompt": self._prompt}
            made = self._manipulator.decode(first.join(*others), eta=eta, **settings).images
            images |= zip(places, made, strict=True)  # type: ignore[arg-type]
        return [images[place] for place in range(len(latents))]

    def _latent(self, given: Any) -> "BipartiteLatent":
        from unclip.stages.manipulation import BipartiteLatent

        if isinstance(given, BipartiteLatent):
            return given
        if self._last is None or self._last[0] is not given:
            self._last = (given, self._manipulator.invert(given, prompt=self._prompt, **self._settings))
        return self._last[1]


def one_row(latent: "BipartiteLatent", part: Part) -> "BipartiteLatent":
    """The same latent. Raises: InputError when it has several rows."""
    if len(latent) > 1:
        raise InputError(f"{part.text} contains {len(latent)} latents, but this command needs a file with one")
    return latent
