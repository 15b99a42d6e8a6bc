"""The models of a server: what a request asks of them, and the pictures that they make."""

import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from unclip.images import WARNING_FILTERS
from unclip.pipelines import cascade
from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.inpaint import UnCLIPInpaintPipeline
from unclip.pipelines.samplers import sampler_name, sampler_switch
from unclip.pipelines.session import MADE_WITH, Compute, Session
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.stage import Size

log = logging.getLogger(__name__)

KINDS: Mapping[str, type[GenerationPipeline]] = {
    "generate": UnCLIPPipeline,
    "decode": UnCLIPImageVariationPipeline,
    "inpaint": UnCLIPInpaintPipeline,
}
"""The pipeline of each kind of request: pictures of captions, of embeddings (or pictures), and edits by a mask."""

PRIOR_SETTINGS = {
    "prior_num_inference_steps": "num_inference_steps",
    "prior_guidance_scale": "guidance_scale",
    "num_prior_candidates": "num_prior_candidates",
}
"""The names of the prior's settings in a call of the pipeline, and in `embed_captions`."""


@dataclass(frozen=True, eq=False)
class Row:
    """One picture to make.

    Attributes:
        seed: of the picture.
        prompt, negative: captions; None: the empty one.
        image: the picture to embed or to edit.
        mask: of the same size as the picture.
        embedding: float32 [embedding_dim], instead of a picture.
    """

    seed: int
    prompt: str | None = None
    negative: str | None = None
    image: Image.Image | None = None
    mask: Image.Image | None = None
    embedding: torch.Tensor | None = None


@dataclass(frozen=True)
class Made:
    """One finished picture.

    Attributes:
        image: the picture, in the size that the model makes.
        seed: of the picture.
        warnings: messages about its caption.
        facts: metadata for its file.
    """

    image: Image.Image
    seed: int
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One denoising step of a request's pictures.

    Attributes:
        stage: "prior", "decoder", "super_res" and so on.
        index: the step, from 0.
        num_steps: the steps of this run of the stage.
        rows: the request's pictures that took the step, by their numbers.
        previews: makes the predicted pictures of these rows; they are empty in the prior.
    """

    stage: str
    index: int
    num_steps: int
    rows: Sequence[int]
    previews: Callable[[], list[Image.Image]]


@dataclass(eq=False)
class Work:
    """One request: pictures to make, or a function to run with the model.

    Attributes:
        model: the model's name.
        kind: a key of `KINDS`; of a function any name.
        rows: the pictures; of a function none.
        settings: arguments of the pipeline's call.
        sampler: the name of a sampler; None: the model's own.
        shape: height and width whose ratio the pictures get; None: the model's own square.
        on_step: is called on the worker's thread after each step.
        function: is called with the model and a function that tells whether to stop, instead of making pictures.
        num_made: how many pictures a function makes.
        future: the list of `Made`, or the function's result.
    """

    model: str
    kind: str
    rows: Sequence[Row] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    shape: Size | None = None
    on_step: Callable[[Step], None] | None = None
    function: "Callable[[Model, Callable[..., Any]], Any] | None" = None
    num_made: int = 0
    future: "Future[Any]" = field(default_factory=Future)
    started: bool = False
    cancelled: bool = False
    made: dict[int, Made] = field(default_factory=dict)
    num_taken: int = 0
    key: str = ""

    def __post_init__(self) -> None:
        first = self.rows[0] if self.rows else None
        given: list[Any] = [self.model, self.kind, self.sampler, self.shape, dict(self.settings)]
        if self.kind == "inpaint" and first is not None and first.image is not None:
            given += [first.image.size, first.mask is None, first.prompt is None]
        if first is not None and first.embedding is not None:
            given.append(len(first.embedding))
        self.key = json.dumps(given, sort_keys=True) if first is not None else str(id(self))

    @property
    def size(self) -> int:
        """How many pictures the queue counts it as."""
        return max(1, len(self.rows))


class Model:
    """One model on one device, used by one thread.

    Args:
        name: the name in requests.
        folder: a folder, a hub id, or a built-in name.
        compute: device and precision.
    """

    def __init__(self, name: str, folder: str, compute: Compute) -> None:
        self.name = name
        self.session = Session(folder, compute, progress=False)
        self._loaded: dict[str, tuple[GenerationPipeline, str, Callable[[str], None]]] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def lacks(self, kind: str) -> list[str]:
        """The components that the model needs for a kind of request and does not have."""
        cls = KINDS[kind].class_for(self.session.index)
        return [name for name in cls.COMPONENTS if name not in self.session.parts and name not in cls.OPTIONAL]

    def load(self) -> None:
        """Read the weights for the first kind of request that the model can answer."""
        self.pipeline(next((kind for kind in KINDS if not self.lacks(kind)), "generate"))

    def pipeline(self, kind: str) -> Any:
        """The pipeline of a kind."""
        if kind not in self._loaded:
            pipe = self.session.pipeline(KINDS[kind])
            self._loaded[kind] = pipe, sampler_name(pipe), sampler_switch(pipe)
        return self._loaded[kind][0]

    def unload(self) -> None:
        """Free the weights; the next request reads them again."""
        self.session = Session(str(self.session.folder), self.session.compute, progress=False)
        self._loaded.clear()
        self._about.clear()

    @property
    def num_bytes(self) -> int:
        """The size of the loaded weights."""
        networks = {id(net): net for pipe, *_ in self._loaded.values() for net in pipe.networks.values()}
        return sum(p.numel() * p.element_size() for net in networks.values() for p in net.parameters())

    @contextmanager
    def sampled_by(self, kind: str, sampler: str | None) -> Iterator[Any]:
        """The pipeline of a kind, with a sampler until the end of the block. Raises: InputError for an unknown name."""
        pipe = self.pipeline(kind)
        _, own, switch = self._loaded[kind]
        if sampler is not None:
            switch(sampler)
        try:
            yield pipe
        finally:
            switch(own)

    def run(self, work: Work, rows: Sequence[Row], on_step: Callable[..., Any]) -> Any:
        """The result of the work's function, or the pictures of these rows."""
        return self.make(work, rows, on_step) if work.function is None else work.function(self, on_step)

    @torch.no_grad()
    def make(self, work: Work, rows: Sequence[Row], on_step: Callable[..., Any]) -> list[Made]:
        """Make pictures of several requests, whose settings are those of `work`. Raises: as the pipelines."""
        with self.sampled_by(work.kind, work.sampler) as pipe:
            call = dict(work.settings)
            if work.shape is not None and work.shape[0] != work.shape[1]:
                own = list(pipe.sizes().values())[-1][0]
                multiple = pipe.side_multiple
                call["height"], call["width"] = cascade.fitted_size(own, multiple, work.shape)
            about = self._facts(work.kind, pipe, call)
            call["negative_prompt"] = [row.negative or "" for row in rows]
            call["seed"] = [row.seed for row in rows]
            call["callback_on_step_end"] = on_step
            prompts: list[str] | None = [row.prompt or "" for row in rows]
            if work.kind == "decode":
                call["image_embeddings"] = self._embeddings(pipe, rows)
            elif work.kind == "inpaint":
                call["image"] = [row.image for row in rows]
                call["mask_image"] = None if rows[0].mask is None else [row.mask for row in rows]
                prompts = None if rows[0].prompt is None else prompts
            images = pipe(prompt=prompts, **call).images
            notes = {caption: self.notes(pipe, caption) for caption in {row.prompt for row in rows} if caption}
        made = []
        for place, (image, row) in enumerate(zip(images, rows, strict=True)):
            made_with = {**about[MADE_WITH], **_call(work.kind, rows, place)}
            texts = {"prompt": row.prompt, "negative": row.negative}
            facts = {**texts, **about, MADE_WITH: made_with, "seed": row.seed}
            made.append(Made(image, row.seed, notes.get(row.prompt or "", ()), facts))
        return made

    def notes(self, pipe: GenerationPipeline, caption: str) -> tuple[str, ...]:
        """Warnings about a caption: that it is unknown, or was cut off."""
        with WARNING_FILTERS, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.report_unknown([caption], pipe.caption_encoder.encode([caption], pipe.device))
        return tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning))

    def prior_settings(self, given: Mapping[str, Any] | None = None, preset: str | None = None) -> dict[str, Any]:
        """The arguments of `embed_captions`: given ones, else recommended ones, else defaults.

        Args:
            given: by the names of the pipeline's call.
            preset: of the model.
        """
        given = dict.fromkeys(PRIOR_SETTINGS) | {k: v for k, v in (given or {}).items() if k in PRIOR_SETTINGS}
        settings = self.session.settings(KINDS["generate"], given, preset)
        return {PRIOR_SETTINGS[name]: value for name, value in settings.items()}

    def _embeddings(self, pipe: UnCLIPImageVariationPipeline, rows: Sequence[Row]) -> torch.Tensor:
        pictures = {id(row.image): row.image for row in rows if row.image is not None}
        found: dict[int, torch.Tensor] = {}
        if pictures:
            embedded = pipe.embed_images(list(pictures.values()))
            pipe.maybe_free_model_hooks()
            found = dict(zip(pictures, embedded.float().cpu(), strict=True))
        return torch.stack([found[id(row.image)] if row.embedding is None else row.embedding for row in rows])

    def _facts(self, kind: str, pipe: GenerationPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of pictures; the fingerprint of the weights is computed once."""
        if kind not in self._about:
            self._about[kind] = self.session.metadata(pipe, {})
        about = self._about[kind]
        settings = {**call, "sampler": sampler_name(pipe), **about["settings"]}
        return {"model": about["model"], "settings": settings, MADE_WITH: about[MADE_WITH]}


class Models:
    """The models of one device: loaded when they are first asked for, and unloaded when memory is short."""

    def __init__(
        self,
        folders: Mapping[str, str],
        compute: Compute,
        max_bytes: float | None,
        make: Callable[[str, str, Compute], Model] = Model,
    ) -> None:
        self.each = {name: make(name, folder, compute) for name, folder in folders.items()}
        self._used: OrderedDict[str, Model] = OrderedDict()
        self._max_bytes = max_bytes

    def get(self, name: str) -> Model:
        """The model, as the one used last."""
        self._used[name] = self.each[name]
        self._used.move_to_end(name)
        return self._used[name]

    def make_room(self) -> None:
        """Unload the models used least recently until the rest fits the limit; the one used last stays."""
        if self._max_bytes is None:
            return
        while len(self._used) > 1 and sum(model.num_bytes for model in self._used.values()) > self._max_bytes:
            name, model = self._used.popitem(last=False)
            log.info("unloading model %s", name)
            model.unload()


def numbered(on_step: Callable[..., Any], rows: Sequence[int]) -> Callable[..., Any]:
    """A callback for a function's call of a pipeline, whose pictures get these numbers."""
    return lambda pipe, index, t, state: on_step(pipe, index, t, {**state, "rows": rows})


def _call(kind: str, rows: Sequence[Row], place: int) -> dict[str, Any]:
    """The command line that makes a picture again (`unclip rerun`); only those of captions need no other file."""
    negative = rows[place].negative
    options = {} if negative is None or kind != "generate" else {"negative": negative}
    command = "generate" if kind == "generate" else "serve"
    return {"command": command, "options": options, "index": 0, "batch": [place, len(rows)]}
