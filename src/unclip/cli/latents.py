"""What the manipulating commands share: a loaded model, pictures and captions as latents, latents as files.

Knows picture files, captions and a `Manipulator`; knows no command. Called by `invert`, `vary`, `interpolate`, `edit`,
`blend` and `probe`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.recommended import Recommended
from unclip.checkpoints.tensor_file import PROMPT, TILE, read_record
from unclip.cli.inputs import Part, open_picture
from unclip.cli.messages import error
from unclip.cli.output import Album, FilmKind, Wish, cut, film_writer, make_all
from unclip.cli.provenance import MADE_WITH, made_with
from unclip.errors import CheckpointError, InputError
from unclip.pipelines.session import Machine, call_settings, find_model, load, model_name, refuse_drawing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unclip.pipelines.manipulation import Manipulator
    from unclip.stages.manipulation import BipartiteLatent

OPTIONS = {
    "decoder_num_inference_steps": "--decoder-steps",
    "super_res_num_inference_steps": "--super-res-steps",
    "decoder_guidance_scale": "--decoder-guidance",
}
"""The options that say what a latent's file says otherwise."""
NO_GUIDANCE = 1.0
"""Of inverting and decoding: a picture comes back most exactly without."""


@dataclass(frozen=True)
class Record:
    """How a latent was found, as its file says.

    Attributes:
        path: the file.
        settings: steps, guidance and prompt, by the names of a call's arguments.
        tile: side of super-resolution's tiles; None: it saw pictures as a whole.
        side_px: of the largest super-resolution noise that is kept; 0 where none is.
    """

    path: Path
    settings: dict[str, Any]
    tile: int | None
    side_px: int

    def tiles(self, tile: int | None) -> str:
        """How a tile has super-resolution see this picture; one as large as the picture changes nothing."""
        return "as a whole" if tile is None or tile >= self.side_px else f"in tiles of {tile} px"


def records(latents: Iterable[Path], failed: list[Path] | None = None) -> list[Record]:
    """What files of latents say.

    Args:
        latents: the files.
        failed: those that cannot be read are told of and put here; None: they are raised.

    Raises: as `BipartiteLatent.load`, and CheckpointError for a text that is no number.
    """
    found = []
    for path in latents:
        try:
            found.append(_record(path))
        except CheckpointError as problem:
            if failed is None:
                raise
            error(problem)
            failed.append(path)
    return found


def recorded(found: Iterable[Record], given: Mapping[str, Any]) -> dict[str, Any]:
    """The steps, the guidance and the prompt that latents were inverted with: decoding them needs the same.

    What is given, the files are not asked for. Raises: InputError for files that differ.
    """
    known: dict[str, tuple[Any, Path]] = {}
    for record in found:
        for name, value in record.settings.items():
            if given.get(name) is not None:
                continue
            first, other = known.setdefault(name, (value, record.path))
            if first != value:
                instead = f", or give {OPTIONS[name]}" if name in OPTIONS else ""
                raise InputError(
                    f"{other} was inverted with {name} {first} and {record.path} with {value}, and one command decodes "
                    f"all alike: name them in two commands{instead}"
                )
    return {name: value for name, (value, _) in known.items()}


def recorded_tile(found: Sequence[Record], given: int | None) -> int | None:
    """The tile to decode latents with: as given, else as they were inverted with.

    Raises: InputError where a latent that keeps super-resolution's noise was inverted with another, for that noise
        leads to its picture in no other.
    """
    keeping = [record for record in found if record.side_px]
    first = next((record for record in keeping or found if record.tile is not None), None)
    tile = given if given is not None else first and first.tile
    for record in keeping:
        then, now = record.tiles(record.tile), record.tiles(tile)
        if then != now and given is not None:
            raise InputError(
                f"{record.path} was inverted with super-resolution {then}, and would be decoded {now}: leave out "
                f"--tile {given}, or invert the picture again with it"
            )
        if then != now and first is not None:
            raise InputError(
                f"{first.path} was inverted with super-resolution {first.tiles(first.tile)} and {record.path} {then}, "
                "and one command decodes all alike: name them in two commands"
            )
    return tile


def _record(path: Path) -> Record:
    from unclip.stages.manipulation import BipartiteLatent

    latent, about = BipartiteLatent.load(path)
    side_px = max((noise.shape[-1] for noise in latent.super_res_noise), default=0)
    settings = read_record(about, str(path))
    return Record(path, settings, settings.pop(TILE, None), side_px)


@dataclass(frozen=True)
class Workbench:
    """A loaded model, and the settings that all pictures of one command are made with.

    Attributes:
        tool: the model; it has a prior only when captions were announced.
        settings: arguments of `invert` and `decode`.
        drawing: how the prior draws: arguments of `embed_captions` and `caption_difference`.
        about: what every file says.
    """

    tool: "Manipulator"
    settings: dict[str, Recommended]
    drawing: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def open(
        cls,
        model: str,
        machine: Machine,
        given: Mapping[str, Recommended | None],
        *,
        drawing: Mapping[str, Recommended | None] | None = None,
        parts: Sequence[Part] = (),
        captions: bool | None = None,
        guidance: float | None,
        ways: Mapping[str, bool | str] | None = None,
    ) -> "Workbench":
        """Load what is needed, and no prior for pictures alone.

        Args:
            model: a folder, a hub id or a built-in name.
            machine: how it is loaded; without a tile, the one that latents among the parts were inverted with is taken.
            given: steps and guidance as asked for.
            drawing: how the prior draws, as asked for.
            parts: what was named; a latent among them says what it was inverted with, where `given` does not.
            captions: whether the prior is needed; by default for a caption among the parts.
            guidance: of the decoder where neither says it; None is the model's own.
            ways: what else changes pictures, and files are to say beside the settings.

        Raises: CheckpointError for a model without an image encoder, or a prior that is needed; InputError for ways to
            draw where no prior is, and as `recorded` and `recorded_tile`.
        """
        from unclip.cli.inputs import check_can_vary
        from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
        from unclip.pipelines.manipulation import Manipulator
        from unclip.pipelines.text_to_image import UnCLIPPipeline

        folder, index = find_model(model, quiet=machine.quiet)
        check_can_vary(model, index)
        if captions is None:
            captions = any(part.kind == "caption" for part in parts)
        if captions and "prior" not in index:
            raise CheckpointError(f"{model} has no prior, so it cannot read captions: give pictures")
        if not captions:
            refuse_drawing(drawing or {})
        found = records(Path(part.text) for part in parts if part.kind == "latent")
        machine = replace(machine, tile=recorded_tile(found, machine.tile))
        own = {"decoder_guidance_scale": guidance, **recorded(found, given)}
        given = {name: own.get(name) if value is None else value for name, value in given.items()}
        settings = call_settings(UnCLIPImageVariationPipeline, folder, given)
        settings |= {PROMPT: own[PROMPT]} if PROMPT in own else {}
        variation = load(UnCLIPImageVariationPipeline, folder, machine, None)
        text, draws = None, {}
        if captions:
            draws = call_settings(UnCLIPPipeline, folder, {}, drawing)
            shared = {name: part for name, part in variation.components.items() if name in UnCLIPPipeline.COMPONENTS}
            text = UnCLIPPipeline.from_pretrained(folder, torch_dtype=variation.dtype, own_clip=True, **shared)
            if machine.cpu_offload:
                text.enable_model_cpu_offload(device=variation.device)  # anew, with the prior among them
            else:
                text.prior.to(variation.device)
            text.set_progress_bar_config(**variation._progress)
        how = {**settings, **draws, **(ways or {}), **machine.facts}
        about = {"model": model_name(model), "settings": how, MADE_WITH: made_with(variation)}
        return cls(Manipulator(variation, text), settings, draws, about)

    def latent(self, part: Part, *, seed: int, super_res: bool = False) -> "BipartiteLatent":
        """A picture inverted, all rows of a latent's file, or a caption's embedding with noise of the seed."""
        if part.kind == "latent":
            return self.tool.load(part.text)[0]
        if part.kind == "caption":
            return self.tool.fresh(self.embedding(part, seed=seed), seed)
        return self.tool.invert(open_picture(part.text), super_res=super_res, **self.settings)  # type: ignore[arg-type]

    def embedding(self, part: Part, *, seed: int) -> "Tensor":
        """One row [1, embedding_dim], without any inversion. Raises: InputError for a latent's file of several."""
        if part.kind == "latent":
            return one_row(self.tool.load(part.text)[0], part).image_embedding
        if part.kind == "caption":
            return self.caption(part, [seed])
        return self.tool.embed_images(open_picture(part.text)).cpu()

    def caption(self, part: Part, seeds: Sequence[int]) -> "Tensor":
        """A caption's embedding by each of the seeds [len(seeds), embedding_dim]."""
        return self.tool.embed_captions([part.text] * len(seeds), seed=seeds, **self.drawing)

    def decode_small(self, latent: "BipartiteLatent") -> "Tensor":
        """The decoder's pictures of latents, with the command's settings, before super-resolution."""
        own = {name: value for name, value in self.settings.items() if not name.startswith("super_res")}
        return self.tool.decode_small(latent, **own)  # type: ignore[arg-type]

    def draw(
        self,
        latent: "BipartiteLatent",
        facts: Sequence[Mapping[str, Any]],
        album: Album,
        stem: str,
        *,
        seed: int,
        batch_size: int,
        film: FilmKind | None = None,
        fps: float = 10.0,
        sheet: bool = False,
        whole: Mapping[str, Any],
        labels: Sequence[str] | None = None,
    ) -> None:
        """Decode every row with the same noise, save each with its own facts; then the sheet and the film.

        Args:
            latent: a row a picture.
            facts: of each row.
            album, stem: where to, and under which names.
            seed: of all other noise.
            batch_size: rows decoded at once.
            film, fps, sheet: what is written besides.
            whole: the facts of sheet and film.
            labels: what the sheet says below each picture.
        """
        several = len(latent) > 1
        wishes = (
            Wish(row, seed, f"{stem}-{row:03d}" if several else stem, facts[row], row) for row in range(len(latent))
        )

        def decode(batch: list[Wish]) -> Any:
            rows = latent.select([wish.given for wish in batch])
            return self.tool.decode(rows, seed=seed, **self.settings).images  # type: ignore[arg-type]

        make_all(cut(wishes, batch_size), decode, album, self.about)
        about = {**whole, **self.about, "seed": seed}
        if sheet:
            columns = len(latent) if len(latent) <= 10 else None
            album.save_sheet(f"{stem}-{seed}", about, columns=columns, labels=labels)
        if film is not None and album.kept:
            path = album.write(f"{stem}-{seed}", f".{film.value}", film_writer(film, album.kept, fps))
            album.tell(path, {**about, "frames": len(latent), "fps": fps})


class Keeper:
    """Variations that keep a picture's own noise; a picture is inverted once, however many are made of it.

    Args:
        tool: the model.
        settings: arguments of `invert` and `decode`.
        prompt: a caption that the decoder sees too.
    """

    def __init__(self, tool: "Manipulator", settings: Mapping[str, Recommended], prompt: str | None) -> None:
        self._tool, self._settings, self._prompt = tool, settings, prompt
        self._last: tuple[Any, BipartiteLatent] | None = None

    def vary(self, given: Sequence[Any], seeds: Sequence[int], eta: float) -> "list[Image]":
        """One picture for each of these, which are pictures, or latents of one row.

        Latents that keep the noise of more stages than others are decoded apart, for together they would lose it.
        """
        latents = [self._latent(each) for each in given]
        alike: dict[int, list[int]] = {}
        for place, latent in enumerate(latents):
            alike.setdefault(len(latent.super_res_noise), []).append(place)
        images: dict[int, Image] = {}
        for places in alike.values():
            first, *others = [latents[place] for place in places]
            output = self._tool.decode(
                first.join(*others),
                eta=eta,
                seed=[seeds[place] for place in places],
                prompt=self._prompt,
                **self._settings,  # type: ignore[arg-type]
            )
            images |= zip(places, output.images, strict=True)  # type: ignore[arg-type]
        return [images[place] for place in range(len(latents))]

    def _latent(self, given: Any) -> "BipartiteLatent":
        from unclip.stages.manipulation import BipartiteLatent

        if isinstance(given, BipartiteLatent):
            return given
        if self._last is None or self._last[0] is not given:
            latent = self._tool.invert(given, prompt=self._prompt, **self._settings)  # type: ignore[arg-type]
            self._last = (given, latent)
        return self._last[1]


def one_row(latent: "BipartiteLatent", part: Part) -> "BipartiteLatent":
    """The same latent. Raises: InputError when it has several rows."""
    if len(latent) > 1:
        raise InputError(f"{part.text} holds {len(latent)} latents, and one is needed here: save it alone")
    return latent
