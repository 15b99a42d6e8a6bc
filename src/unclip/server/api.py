"""The routes of OpenAI's Images API, embeddings, and decoding of embeddings."""

import array
import asyncio
import base64
import functools
import hashlib
import io
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from unclip.diffusion.loop import following_seed
from unclip.images import rgb
from unclip.pipelines.masks import drawn_region
from unclip.pipelines.session import PRIOR_SAMPLING, png_texts, sampler_name
from unclip.server.contract import (
    ApiError,
    DecodeRequest,
    EditRequest,
    EmbeddingRequest,
    GenerationRequest,
    InterpolationRequest,
    PictureRequest,
    VariationRequest,
    as_api_error,
    data_of,
    parsed,
    picture,
    read_fields,
)
from unclip.server.engine import KINDS, ClosedError, Engine, Made, Model, Row, Step, Work, numbered
from unclip.server.results import MEDIA_TYPES, Results
from unclip.server.settings import ServerSettings
from unclip.stages.arithmetic import slerp_path
from unclip.stages.manipulation import edit as edited

HOSTED_NAMES = ("dall-e", "gpt-image", "text-embedding", "clip")
"""The starts of model names of the hosted API, which the first model answers to."""
PING_S = 10.0
FRAME_MS = 90
"""Time of a film's frame."""
MAX_REMEMBERED = 256
REMEMBER_S = 3600.0
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Clients need the field; nothing is counted here."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    data: Mapping[str, Any]

    def encode(self) -> str:
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n"


class Service:
    """What all routes share: the engine, the stored results, and the answers to repeated requests."""

    def __init__(self, engine: Engine, results: Results, settings: ServerSettings) -> None:
        self.engine, self.results, self.settings = engine, results, settings
        self._remembered: dict[tuple[str, str], tuple[str, float, asyncio.Task[Answer]]] = {}

    # ---- requests to work ----

    def model(self, name: str | None) -> Model:
        """The model of a name. Raises: ApiError for an unknown one."""
        models = self.engine.models
        if name is not None and name in models:
            return models[name]
        if not name or name.startswith(HOSTED_NAMES):
            return next(iter(models.values()))
        known = ", ".join(models)
        raise ApiError(404, f"there is no model {name!r:.80}; there is {known}", param="model", code="model_not_found")

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

    def variation(self, request: VariationRequest, image: Image.Image | None) -> Work:
        """The work of a request for variations: the picture's own embedding is decoded."""
        if image is None:
            raise ApiError(400, "image is missing", param="image", code="missing_required_parameter")
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
        names = {f"prior_{name}": name for name in ("num_inference_steps", "guidance_scale")}
        names["num_prior_candidates"] = "num_prior_candidates"
        settings = model.session.settings(
            KINDS["decode"], {name: value for name, value in request.settings.items() if name not in names}
        )
        asked = {name: request.settings[name] for name in names}
        of_prior = model.session.settings(KINDS["generate"], asked | {PRIOR_SAMPLING[0]: None}) if captions else {}
        of_prior = {names.get(name, name): value for name, value in of_prior.items()}
        seed, count, size = _seeds(request, 1)[0], request.frames or 9, self.engine.max_batch

        @torch.no_grad()
        def interpolate(model: Model, on_step: Callable[..., Any]) -> list[Made]:
            notes: tuple[str, ...] = ()
            with model.sampled_by("decode", request.sampler) as pipe:
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

        return Work(model.name, "interpolate", function=interpolate)

    def editing(self, request: EditRequest, image: Image.Image | None, mask: Image.Image | None) -> Work:
        """The work of an edit: by a mask or the picture's transparency, by strength, or by a caption difference."""
        if image is None:
            raise ApiError(400, "image is missing", param="image", code="missing_required_parameter")
        if request.source is not None or request.target is not None:
            return self._change(request, image, mask)
        if request.prompt is None or not request.prompt.strip():
            raise ApiError(400, "prompt is missing", param="prompt", code="missing_required_parameter")
        try:
            region = drawn_region(image, mask)
        except ValueError as error:
            raise ApiError(
                400, str(error), param="mask" if mask is not None else "image", code="invalid_mask"
            ) from None
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
        given = {**request.settings, **(more or {})}
        settings = model.session.settings(KINDS[kind], given)
        return Work(model.name, kind, rows, settings, request.sampler, shape)

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

        return Work(model.name, "change", function=change)

    # ---- work to answers ----

    async def wait(self, work: Work, request: Request | None = None) -> Any:
        """The result of work that is queued here. It is cancelled when the client leaves or the deadline passes."""
        self.engine.submit(work)
        future = asyncio.wrap_future(work.future)
        watch = None if request is None else asyncio.ensure_future(_left(request))
        try:
            waited = {future} if watch is None else {future, watch}
            done, _ = await asyncio.wait(waited, timeout=self.settings.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if future.cancelled():
                raise ClosedError("the server is stopping")
            if future in done:
                return future.result()
            if watch in done:
                raise ApiError(499, "the client closed the request", code="client_closed_request")
            raise ApiError(
                504,
                f"the pictures were not finished within {self.settings.deadline_s:g} s; use POST /v1/jobs",
                code="deadline_exceeded",
            )
        finally:
            if watch is not None:
                watch.cancel()
            if not future.done():
                self.engine.cancel(work)

    async def pictures(
        self, request: PictureRequest, work: Work, http: Request | None, *, url_of: Callable[[str], str]
    ) -> Answer:
        """The answer to a request for pictures."""
        made = await self.wait(work, http)
        return await asyncio.to_thread(self.answer, request, work.model, made, url_of)

    def answer(self, request: PictureRequest, model: str, made: Sequence[Made], url_of: Callable[[str], str]) -> Answer:
        """Pictures as an answer's body.

        Those of response_format "url" are stored; `url_of` makes a URL of the name of a stored file.
        """
        images = [finished(each.image, request) for each in made]
        data = []
        for each, image in zip(made, images, strict=True):
            content = encoded(image, request, each.facts)
            if request.response_format == "b64_json":
                item = {"b64_json": base64.b64encode(content).decode()}
            else:
                name = self.results.put(content, request.output_format or "png")
                item = {"url": url_of(name)}
            data.append({**item, "seed": each.seed})
        notes = list(dict.fromkeys(note for each in made for note in each.warnings))
        film = {}
        if isinstance(request, InterpolationRequest):
            film = {"film": {"url": url_of(self.results.put(film_of(images), "webp"))}}
        return {
            "created": int(time.time()),
            "data": data,
            "model": model,
            "background": "opaque",
            "output_format": request.output_format or "png",
            "quality": "auto",
            "size": f"{images[0].width}x{images[0].height}",
            "usage": USAGE,
            **({"warnings": notes} if notes else {}),
            **film,
        }

    def url_of(self, http: Request) -> Callable[[str], str]:
        """A function that makes a signed URL of the name of a stored file."""
        start = (self.settings.public_url or str(http.base_url)).rstrip("/")
        return lambda name: start + self.results.url(name)

    async def stream(self, request: PictureRequest, work: Work, prefix: str) -> Response:
        """Pictures as server-sent events: previews of the decoder, then the finished ones."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int, Image.Image] | None]()
        work.on_step = previews(
            request.partial_images or 0, lambda *found: loop.call_soon_threadsafe(queue.put_nowait, found)
        )
        self.engine.submit(work)
        future = asyncio.wrap_future(work.future)
        future.add_done_callback(lambda done: queue.put_nowait(None))

        def event(kind: str, image: Image.Image, content: bytes, **more: Any) -> Event:
            return Event(
                f"{prefix}.{kind}",
                {
                    "type": f"{prefix}.{kind}",
                    "b64_json": base64.b64encode(content).decode(),
                    "created_at": int(time.time()),
                    "size": f"{image.width}x{image.height}",
                    "quality": "auto",
                    "background": "opaque",
                    "output_format": request.output_format or "png",
                    **more,
                },
            )

        async def events() -> AsyncIterator[str]:
            end = loop.time() + self.settings.deadline_s
            try:
                while True:
                    try:
                        async with asyncio.timeout(min(PING_S, max(0.0, end - loop.time()))):
                            found = await queue.get()
                    except TimeoutError:
                        if loop.time() >= end:
                            raise ApiError(504, "the deadline has passed", code="deadline_exceeded") from None
                        yield f": {self.engine.position(work)} requests before this one\n\n"
                        continue
                    if found is None:
                        break
                    row, index, image = found
                    content = await asyncio.to_thread(encoded, image, request, {})
                    yield event("partial_image", image, content, partial_image_index=index, image_index=row).encode()
                if future.cancelled():
                    raise ClosedError("the server is stopping")
                for row, each in enumerate(future.result()):
                    image = finished(each.image, request)
                    content = await asyncio.to_thread(encoded, image, request, each.facts)
                    more = {"warnings": list(each.warnings)} if each.warnings else {}
                    yield event(
                        "completed", image, content, usage=USAGE, image_index=row, seed=each.seed, **more
                    ).encode()
            except Exception as error:
                yield Event("error", {"type": "error", **as_api_error(error).body}).encode()

        def close() -> None:
            if not future.done():
                self.engine.cancel(work)

        return EventStream(events(), close)

    async def once(
        self, http: Request, fields: Mapping[str, Any], make: Callable[[Request | None], Awaitable[Answer]]
    ) -> Answer:
        """The answer; of a repeated request with the same Idempotency-Key, the first one's.

        A request with a key is not cancelled when its client leaves, since the client can ask again.

        Raises: ApiError for a key that another request had.
        """
        name = http.headers.get("idempotency-key")
        if not name:
            return await make(http)
        key, digest = (http.state.owner, name[:256]), _digest(http.url.path, fields)
        now = time.monotonic()
        for old, (_, since, task) in list(self._remembered.items()):
            expired = now - since > REMEMBER_S or len(self._remembered) > MAX_REMEMBERED
            if task.done() and (task.cancelled() or task.exception() is not None or expired):
                del self._remembered[old]
        if key not in self._remembered:
            self._remembered[key] = digest, now, asyncio.ensure_future(make(None))
        known, _, task = self._remembered[key]
        if known != digest:
            raise ApiError(
                400, "this Idempotency-Key was used for another request: use a new one", code="idempotency_mismatch"
            )
        return await asyncio.shield(task)


class EventStream(StreamingResponse):
    """An answer of server-sent events, which proxies must not buffer.

    Args:
        events: encoded.
        close: is called at the end, also when the client leaves before the first event.
    """

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def previews(count: int, send: Callable[[int, int, Image.Image], Any]) -> Callable[[Step], None] | None:
    """A function for each step that sends `count` previews of each picture, evenly spaced over the decoder's steps."""
    if not count:
        return None

    def on_step(step: Step) -> None:
        if step.stage != "decoder":
            return
        wanted = list(dict.fromkeys((place + 1) * step.num_steps // count - 1 for place in range(count)))
        if step.index in wanted:
            for row, image in zip(step.rows, step.previews(), strict=True):
                send(row, wanted.index(step.index), image)

    return on_step


def finished(image: Image.Image, request: PictureRequest) -> Image.Image:
    """The picture, or with `enlarge` resampled into the asked size with its own shape."""
    sides = request.sides
    if not request.enlarge or sides is None:
        return image
    scale = min(sides[0] / image.width, sides[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, request: PictureRequest, facts: Mapping[str, Any]) -> bytes:
    """The picture as a file of the asked format; a PNG also says how it was made."""
    stream, kind = io.BytesIO(), request.output_format or "png"
    if kind == "png":
        image.save(stream, "PNG", pnginfo=png_texts(facts) if facts else None)
    else:
        quality = 100 if request.output_compression is None else request.output_compression
        (rgb(image) if kind == "jpeg" else image).save(stream, kind.upper(), quality=max(1, min(quality, 95)))
    return stream.getvalue()


def film_of(images: Sequence[Image.Image]) -> bytes:
    """The pictures there and back, as an animated WebP without losses that repeats."""
    stream = io.BytesIO()
    frames = [*images, *images[-2:0:-1]]
    pauses = [FRAME_MS * (8 if image is images[0] or image is images[-1] else 1) for image in frames]
    frames[0].save(
        stream, "WEBP", save_all=True, append_images=frames[1:], duration=pauses, loop=0, lossless=True, method=2
    )
    return stream.getvalue()


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
    found = picture(data_of(url, "input"), "input")
    if found is None:
        raise ApiError(400, "a picture is empty", param="input", code="invalid_image")
    return found


def router(service: Service) -> APIRouter:
    """The routes that answer at once."""
    routes = APIRouter(prefix="/v1")

    async def given(http: Request) -> dict[str, Any]:
        fields = await read_fields(http)
        if isinstance(fields.get("prompt"), str) and service.settings.log_prompts:
            http.state.logged = {"prompt": fields["prompt"]}
        return fields

    async def respond(
        http: Request, fields: Mapping[str, Any], request: PictureRequest, work: Work, prefix: str
    ) -> Response:
        if request.stream:
            return await service.stream(request, work, prefix)
        make = functools.partial(service.pictures, request, work, url_of=service.url_of(http))
        return JSONResponse(await service.once(http, fields, make))

    @routes.post("/images/generations", openapi_extra=_body(GenerationRequest))
    async def generations(http: Request) -> Response:
        fields = await given(http)
        request = parsed(GenerationRequest, fields)
        return await respond(http, fields, request, service.generation(request), "image_generation")

    @routes.post("/images/edits", openapi_extra=_body(EditRequest, "image", "mask"))
    async def edits(http: Request) -> Response:
        fields = await given(http)
        request = parsed(EditRequest, fields)
        image, mask = await asyncio.to_thread(read_pictures, fields)
        work = await asyncio.to_thread(service.editing, request, image, mask)
        return await respond(http, fields, request, work, "image_edit")

    @routes.post("/images/variations", openapi_extra=_body(VariationRequest, "image"))
    async def variations(http: Request) -> Response:
        fields = await given(http)
        request = parsed(VariationRequest, fields)
        image, _ = await asyncio.to_thread(read_pictures, fields)
        return await respond(http, fields, request, service.variation(request, image), "image_variation")

    @routes.post("/images/decode", openapi_extra=_body(DecodeRequest))
    async def decode(http: Request) -> Response:
        fields = await given(http)
        request = parsed(DecodeRequest, fields)
        return await respond(http, fields, request, service.decoding(request), "image_generation")

    @routes.post("/embeddings", openapi_extra=_body(EmbeddingRequest))
    async def embeddings(http: Request) -> Response:
        fields = await given(http)
        request = parsed(EmbeddingRequest, fields)
        texts = [request.input] if isinstance(request.input, str) else request.input
        kinds = ["decode"] if any(text.startswith("data:") for text in texts) else []
        model = service.capable(request.model, *kinds, *(["generate"] if request.space == "prior" else []))
        names = {"prior_num_inference_steps": "num_inference_steps", "prior_guidance_scale": "guidance_scale"}
        asked = dict.fromkeys([*names, PRIOR_SAMPLING[0]])
        default = model.session.settings(KINDS["generate"], asked)
        default = {names.get(name, name): value for name, value in default.items()}
        function = await asyncio.to_thread(embed, request, default)

        async def make(watched: Request | None) -> Answer:
            rows, notes = await service.wait(Work(model.name, "embed", function=function), watched)
            if request.dimensions is not None and request.dimensions != len(rows[0]):
                raise ApiError(
                    400, f"this model's embeddings have width {len(rows[0])}", param="dimensions", code="invalid_value"
                )
            data = [
                {"object": "embedding", "index": i, "embedding": _numbers(row, request.encoding_format)}
                for i, row in enumerate(rows)
            ]
            usage = {"prompt_tokens": 0, "total_tokens": 0}
            more = {"warnings": notes} if notes else {}
            return {"object": "list", "data": data, "model": model.name, "usage": usage, **more}

        return JSONResponse(await service.once(http, fields, make))

    @routes.get("/models")
    async def models() -> Answer:
        return {"object": "list", "data": [_about(model) for model in service.engine.models.values()]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> Answer:
        return _about(service.model(name))

    @routes.get("/files/{name}")
    async def file(name: str, expires: str = "", signature: str = "") -> Response:
        if not service.results.is_signed(name, expires, signature):
            raise ApiError(403, "this URL is not valid, or not any more", code="invalid_url")
        path = service.results.path(name)
        if path is None:
            raise ApiError(404, "this picture is not kept any more", code="not_found")
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix[1:]], headers=headers)

    return routes


def read_pictures(fields: Mapping[str, Any]) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture and the mask of a request. Raises: ApiError as `picture`."""
    return picture(fields.get("image", fields.get("images")), "image"), picture(fields.get("mask"), "mask")


def _about(model: Model) -> Answer:
    can = [kind for kind in KINDS if not model.lacks(kind)]
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "unclip", "can": can}


def _body(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """The OpenAPI document's description of a body."""
    schema = kind.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if files:
        properties = {**schema["properties"], **{name: {"type": "string", "format": "binary"} for name in files}}
        content["multipart/form-data"] = {"schema": {**schema, "properties": properties}}
    return {"requestBody": {"required": True, "content": content}}


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


def _numbers(row: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return list(row)
    return base64.b64encode(array.array("f", row).tobytes()).decode()


def _digest(path: str, fields: Mapping[str, Any]) -> str:
    def plain(value: object) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)

    return hashlib.sha256((path + json.dumps(fields, sort_keys=True, default=plain)).encode()).hexdigest()


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
