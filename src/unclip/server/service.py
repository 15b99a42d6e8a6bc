"""Answers to requests: waiting for work, streams, repeated requests, and pictures as files."""

import asyncio
import base64
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unclip.images import rgb
from unclip.pipelines.session import png_texts
from unclip.server.contract import (
    ApiError,
    InterpolationRequest,
    PictureRequest,
    as_api_error,
)
from unclip.server.engine import ClosedError, Engine
from unclip.server.models import Made, Step, Work
from unclip.server.results import Results
from unclip.server.settings import ServerSettings
from unclip.server.work import Requests

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
        self.requests = Requests(engine)
        self._spent: Counter[tuple[str | None, int]] = Counter()
        self._remembered: dict[tuple[str, str], tuple[str, float, asyncio.Task[Answer]]] = {}

    def submit(self, work: Work, owner: str | None) -> None:
        """Queue a request of a key; without an owner it is not counted.

        Raises: ApiError above the key's quota; QueueFullError, ClosedError.
        """
        day, seconds = divmod(int(time.time()), 86_400)
        count, quota = work.num_made or len(work.rows), self.settings.quota
        spent = self._spent[owner, day]
        if quota is not None and owner is not None and spent + count > quota:
            raise ApiError(
                429,
                f"this key may make {quota} pictures a day, and has {max(0, quota - spent)} left; this request is for "
                f"{count}",
                code="insufficient_quota",
                headers={"Retry-After": str(86_400 - seconds), "x-should-retry": "false"},
            )
        self.engine.submit(work)
        self._spent = Counter({key: number for key, number in self._spent.items() if key[1] == day})
        self._spent[owner, day] += count

    async def wait(self, work: Work, owner: str | None, request: Request | None = None) -> Any:
        """The result of work that is queued here. It is cancelled when the client leaves or the deadline passes."""
        self.submit(work, owner)
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
        self, request: PictureRequest, work: Work, http: Request | None, *, owner: str, url_of: Callable[[str], str]
    ) -> Answer:
        """The answer to a request for pictures."""
        made = await self.wait(work, owner, http)
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

    async def stream(self, request: PictureRequest, work: Work, prefix: str, owner: str) -> Response:
        """Pictures as server-sent events: previews of the decoder, then the finished ones."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int, Image.Image] | None]()
        work.on_step = previews(
            request.partial_images or 0, lambda *found: loop.call_soon_threadsafe(queue.put_nowait, found)
        )
        self.submit(work, owner)
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


def _digest(path: str, fields: Mapping[str, Any]) -> str:
    def plain(value: object) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)

    return hashlib.sha256((path + json.dumps(fields, sort_keys=True, default=plain)).encode()).hexdigest()


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
