"""Requests as work for the engine."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from unclip.diffusion.loop import following_seed
from unclip.errors import InputError
from unclip.images import rgb
from unclip.pipelines.masks import drawn_region
from unclip.pipelines.samplers import sampler_name
from unclip.server.contract import (
    ApiError,
    DecodeRequest,
    EditRequest,
    EmbeddingRequest,
    GenerationRequest,
    InterpolationRequest,
    PictureRequest,
    VariationRequest,
    data_of,
    parsed,
    pictures,
)
from unclip.server.engine import Engine
from unclip.server.models import KINDS, PRIOR_SETTINGS, Made, Model, Row, Work, numbered
from unclip.stages.arithmetic import blend, slerp_path
from unclip.stages.manipulation import edit as edited

MAX_PICTURES = 16
"""Pictures of one edit, as in the hosted API."""
HOSTED_NAMES = ("dall-e", "gpt-image", "text-embedding", "clip")
"""The starts of model names of the hosted API, which the first model answers to."""


class Requests:
    """Turns requests into work for the engine.

    Args:
        engine: has the models.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def model(self, name: str | None) -> Model:
        """The model of a name. Raises: ApiError for an unknown one."""
        models = self.engine.models
        if name is not None and name in models:
            return models[name]
        if not name or name.startswith(HOSTED_NAMES):
            return next(iter(models.values()))
        known = ", ".join(models)
        raise ApiError(
            404, f"the model {name!r:.80} does not exist; available: {known}", param="model", code="model_not_found"
        )

    def capable(self, name: str | None, *kinds: str) -> Model:
        """The model of a name that can answer a kind of request. Raises: ApiError."""
        model = self.model(name)
        for kind in kinds:
            if lacking := model.lacks(kind):
                raise ApiError(
                    400,
                    f"the model {model.name} has no {', '.join(lacking)}, which this request needs",
                    param="model",
                    code="unsupported_model",
                )
        return model

    def generation(self, request: GenerationRequest) -> Work:
        """The work of a request for pictures of a caption."""
        rows = [Row(seed, request.prompt, request.negative_prompt) for seed in _seeds(request)]
        return self._pictures(request, "generate", rows, shape=_shape(request))

    def variation(self, request: VariationRequest, image: Image.Image) -> Work:
        """The work of a request for variations: the picture's own embedding is decoded."""
        rows = [Row(seed, request.prompt, request.negative_prompt, image) for seed in _seeds(request)]
        return self._pictures(request, "decode", rows, shape=_shape(request))

    def decoding(self, request: DecodeRequest, embeddings: torch.Tensor | None = None) -> Work:
        """The work of a request for pictures of its embeddings, or of others in their place."""
        if embeddings is None and len({len(each) for each in request.embeddings}) == 1:
            embeddings = torch.tensor(request.embeddings)
        if embeddings is None or not embeddings.isfinite().all():
            raise ApiError(
                400,
                "the embeddings must be of one width, and finite float32 numbers",
                param="embeddings",
                code="invalid_value",
            )
        count = request.n or 1
        seeds = _seeds(request, count * len(embeddings))
        rows = [
            Row(seed, request.prompt, request.negative_prompt, embedding=embeddings[place // count])
            for place, seed in enumerate(seeds)
        ]
        return self._pictures(request, "decode", rows, shape=_shape(request))

    def interpolation(self, request: InterpolationRequest) -> Work:
        """The work of a request for pictures between two captions or pictures, which share their noise."""
        ends = [_picture_of(text) if text.startswith("data:") else text for text in request.input]
        captions = [end for end in ends if isinstance(end, str)]
        model = self.capable(request.model, "decode", *(["generate"] if captions else []))
        preset = _preset(request, model)
        given = {name: value for name, value in request.settings.items() if name not in PRIOR_SETTINGS}
        settings = model.session.settings(KINDS["decode"], given, preset)
        sampler = request.sampler or model.session.sampler_of(preset)
        of_prior = model.prior_settings(request.settings, preset) if captions else {}
        seed, count, size = _seeds(request, 1)[0], request.frames or 9, self.engine.max_batch

        @torch.no_grad()
        def interpolate(model: Model, on_step: Callable[..., Any]) -> list[Made]:
            notes: tuple[str, ...] = ()
            with model.sampled_by("decode", sampler) as pipe:
                rows: list[torch.Tensor] = []
                for end in ends:
                    if isinstance(end, str):
                        text = model.pipeline("generate")
                        rows.append(text.embed_captions([end], seed=[seed], **of_prior).float().cpu())
                        notes += model.notes(text, end)
                    else:
                        rows.append(pipe.embed_images([end]).float().cpu())
                path = slerp_path(torch.cat(rows), [place / (count - 1) for place in range(count)])
                images: list[Image.Image] = []
                for first in range(0, count, size):
                    part = path[first : first + size]
                    images += pipe(
                        image_embeddings=part,
                        seed=[seed] * len(part),
                        negative_prompt=[request.negative_prompt or ""] * len(part),
                        callback_on_step_end=numbered(on_step, range(first, first + len(part))),
                        **settings,
                    ).images
                about = model.session.metadata(pipe, {**settings, "sampler": sampler_name(pipe)})
            facts = {"between": " | ".join(request.shown_input), **about, "seed": seed}
            return [Made(each, seed, notes, {**facts, "place": i / (count - 1)}) for i, each in enumerate(images)]

        return Work(model.name, "interpolate", function=interpolate, num_made=count)

    def editing(self, request: EditRequest, images: Sequence[Image.Image], mask: Image.Image | None) -> Work:
        """The work of an edit: by a mask or the picture's transparency, by strength, or by a caption difference.

        Further pictures say what the result shows, together with the prompt.
        """
        image, *others = images
        if request.source is not None or request.target is not None:
            if others:
                message = f"a caption difference edits one picture; image has {len(images)}"
                raise ApiError(400, message, param="image", code="too_many_images")
            return self._change(request, image, mask)
        if request.prompt is None or not request.prompt.strip():
            raise ApiError(400, "prompt is missing", param="prompt", code="missing_required_parameter")
        try:
            region = drawn_region(image, mask)
        except ValueError as error:
            raise ApiError(
                400, str(error), param="mask" if mask is not None else "image", code="invalid_mask"
            ) from None
        if others:
            return self._combination(request, images, mask, drawn=region is not None or request.strength is not None)
        if region is None and (request.strength is None or request.strength == 1):
            raise ApiError(
                400,
                "nothing marks the part to edit: send a mask, or a picture that is transparent there, or strength "
                "below 1 to redraw all of it, or from and to for a caption difference",
                param="mask",
                code="missing_required_parameter",
            )
        rows = [Row(seed, request.prompt, request.negative_prompt, image, mask) for seed in _seeds(request)]
        return self._pictures(request, "inpaint", rows, more={"strength": request.strength})

    def _pictures(
        self,
        request: PictureRequest,
        kind: str,
        rows: Sequence[Row],
        *,
        shape: tuple[int, int] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Work:
        model = self.capable(request.model, kind)
        given, preset = {**request.settings, **(more or {})}, _preset(request, model)
        settings = model.session.settings(KINDS[kind], given, preset)
        return Work(model.name, kind, rows, settings, request.sampler or model.session.sampler_of(preset), shape)

    def _combination(
        self, request: EditRequest, images: Sequence[Image.Image], mask: Image.Image | None, *, drawn: bool
    ) -> Work:
        """An edit with several pictures: the mean of their embeddings and the prompt's is decoded.

        If `drawn`, the first picture is edited by the others. Else all of them are combined to a new picture.
        """
        kind = "inpaint" if drawn else "decode"
        model = self.capable(request.model, kind, "decode", "generate")
        own = {name: value for name, value in request.settings.items() if name not in PRIOR_SETTINGS}
        settings = model.session.settings(KINDS[kind], {**own, **({"strength": request.strength} if drawn else {})})
        of_prior, seeds, size = model.prior_settings(request.settings), _seeds(request), self.engine.max_batch
        shown = [rgb(image) for image in (images[1:] if drawn else images)]

        @torch.no_grad()
        def combine(model: Model, on_step: Callable[..., Any]) -> list[Made]:
            pictured = model.pipeline("decode").embed_images(shown).float().cpu()
            text, prompt = model.pipeline("generate"), request.prompt or ""
            told = text.embed_captions([prompt] * len(seeds), seed=seeds, **of_prior).float().cpu()
            weights = [1.0] * (len(shown) + 1)
            mixed = torch.stack([blend(torch.cat([pictured, row[None]]), weights) for row in told])
            results: list[Image.Image] = []
            with model.sampled_by(kind, request.sampler) as pipe:
                for first in range(0, len(seeds), size):
                    part = range(first, min(first + size, len(seeds)))
                    given: dict[str, Any] = {"image": images[0], "mask_image": mask} if drawn else {}
                    results += pipe(
                        **given,
                        image_embeddings=mixed[part.start : part.stop],
                        seed=seeds[part.start : part.stop],
                        negative_prompt=[request.negative_prompt or ""] * len(part),
                        callback_on_step_end=numbered(on_step, part),
                        **settings,
                    ).images
                about = model.session.metadata(pipe, {**settings, "sampler": sampler_name(pipe)})
            facts = {"prompt": prompt, "pictures": str(len(images)), **about}
            notes = model.notes(text, prompt)
            return [Made(each, seed, notes, {**facts, "seed": seed}) for each, seed in zip(results, seeds, strict=True)]

        return Work(model.name, "combine", function=combine, num_made=len(seeds))

    def _change(self, request: EditRequest, image: Image.Image, mask: Image.Image | None) -> Work:
        """An edit by the difference of two captions; n pictures go from little change to all of it."""
        source, target = request.source, request.target
        if source is None or target is None:
            lacking = "from" if source is None else "to"
            raise ApiError(400, "from and to belong together", param=lacking, code="missing_required_parameter")
        if source.split() == target.split():
            raise ApiError(400, "from and to are the same text", param="to", code="invalid_value")
        if mask is not None:
            raise ApiError(400, "a caption difference takes no mask", param="mask", code="invalid_value")
        model = self.capable(request.model, "decode", "generate")
        count, strength, seed = request.n or 1, request.strength or 0.5, _seeds(request)[0]
        guidance = 1.0 if request.guidance is None else request.guidance

        def change(model: Model, on_step: Callable[..., Any]) -> list[Made]:
            pipe = model.pipeline("decode")
            model.pipeline("generate")
            tool = model.session.manipulator(captions=True)
            settings: dict[str, Any] = {
                "decoder_num_inference_steps": request.steps,
                "decoder_guidance_scale": guidance,
            }
            direction = tool.caption_difference(target, source, seed=seed, num_prior_candidates=request.candidates or 1)
            latent = tool.invert([rgb(image)], callback_on_step_end=on_step, **settings)
            strengths = [strength * (place + 1) / count for place in range(count)]
            settings["super_res_num_inference_steps"] = request.super_res_steps
            turned = edited(latent, direction, strengths)
            on_step = numbered(on_step, range(count))
            images: Any = tool.decode(turned, seed=seed, callback_on_step_end=on_step, **settings).images
            notes = tuple(note for caption in (source, target) for note in model.notes(pipe, caption))
            facts = {"from": source, "to": target, **model.session.metadata(pipe, settings), "seed": seed}
            return [
                Made(each, seed, notes, {**facts, "strength": share})
                for each, share in zip(images, strengths, strict=True)
            ]

        return Work(model.name, "change", function=change, num_made=count)


def embed(request: EmbeddingRequest, default: Mapping[str, Any]) -> Callable[[Model, Callable[..., Any]], Any]:
    """A function that embeds a request's captions and pictures: (embeddings, warnings)."""
    given = [request.input] if isinstance(request.input, str) else request.input
    pictures = {i: _picture_of(text) for i, text in enumerate(given) if text.startswith("data:")}
    captions = {i: text for i, text in enumerate(given) if i not in pictures}
    if any(not text.strip() for text in captions.values()):
        raise ApiError(400, "an input is empty", param="input", code="invalid_value")
    for text in captions.values():
        parsed(GenerationRequest, {"prompt": text})

    @torch.no_grad()
    def run(model: Model, on_step: Callable[..., Any]) -> tuple[list[list[float]], list[str]]:
        found: dict[int, torch.Tensor] = {}
        if pictures:
            pipe = model.pipeline("decode")
            found |= zip(pictures, pipe.embed_images(list(pictures.values())).float().cpu(), strict=True)
        notes: list[str] = []
        if captions:
            pipe = model.pipeline("generate" if request.space == "prior" or not pictures else "decode")
            texts = list(captions.values())
            if request.space == "prior":
                rows = pipe.embed_captions(texts, seed=[request.seed or 0] * len(texts), **default)
            else:
                rows = pipe.caption_encoder.encode(texts, pipe.device).embeds
            found |= zip(captions, rows.float().cpu(), strict=True)
            notes = [note for text in texts for note in model.notes(pipe, text)]
            pipe.maybe_free_model_hooks()
        return [found[i].tolist() for i in range(len(given))], notes

    return run


def _picture_of(url: str) -> Image.Image:
    found = pictures(data_of(url, "input"), "input")
    if not found:
        raise ApiError(400, "a picture is empty", param="input", code="invalid_image")
    return found[0]


def read_pictures(fields: Mapping[str, Any], most: int = 1) -> tuple[list[Image.Image], Image.Image | None]:
    """The pictures and the mask of a request. Raises: ApiError as `pictures`, and without a picture."""
    images = pictures(fields.get("image", fields.get("images")), "image", most)
    if not images:
        raise ApiError(400, "image is missing", param="image", code="missing_required_parameter")
    return images, next(iter(pictures(fields.get("mask"), "mask")), None)


def _preset(request: PictureRequest, model: Model) -> str | None:
    """The request's preset; "default" is the model's own settings. Raises: ApiError for one that it does not have."""
    if request.preset in (None, "default"):
        return None
    try:
        model.session.sampler_of(request.preset)
    except InputError as error:
        raise ApiError(400, str(error), param="preset", code="invalid_value") from None
    return request.preset


def _seeds(request: PictureRequest, count: int | None = None) -> list[int]:
    """A seed for each picture: consecutive ones from the given or a random one."""
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    return [following_seed(first, place) for place in range(count or request.n or 1)]


def _shape(request: PictureRequest) -> tuple[int, int] | None:
    """Height and width whose ratio the pictures get; None for squares."""
    if request.sides is None or request.sides[0] == request.sides[1]:
        return None
    width, height = request.sides
    return height, width
