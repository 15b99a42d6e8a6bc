"""Jobs: requests that are answered at once and computed later, with progress, cancellation and a history."""

import asyncio
import base64
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.responses import Response

from unclip.checkpoints.files import atomic_file
from unclip.server.contract import (
    EVENTS,
    ApiError,
    DecodeRequest,
    EditRequest,
    GenerationRequest,
    InterpolationRequest,
    PictureRequest,
    VariationRequest,
    as_api_error,
    parsed,
    read_fields,
)
from unclip.server.models import Step, Work
from unclip.server.service import Answer, Event, EventStream, Service, encoded, previews
from unclip.server.work import MAX_PICTURES, read_pictures

log = logging.getLogger(__name__)

KINDS: Mapping[str, type[PictureRequest]] = {
    "generation": GenerationRequest,
    "edit": EditRequest,
    "variation": VariationRequest,
    "decode": DecodeRequest,
    "interpolation": InterpolationRequest,
}
BODY = {
    "application/json": {
        "schema": {
            "anyOf": [
                kind.model_json_schema()
                | {"properties": {**kind.model_json_schema()["properties"], "type": {"const": name}}}
                for name, kind in KINDS.items()
            ],
            "description": "The fields of the route for this type (default: generation), with pictures as data URLs.",
        }
    }
}
"""The OpenAPI document's description of a job's body."""
FINAL = ("completed", "failed", "cancelled")
MAX_LISTED = 100
MAX_KEPT = 2000
"""Finished jobs, of which the oldest are removed."""
MAX_EVENTS = 1000
POLL_S = 1.0


@dataclass(eq=False)
class Job:
    """A request that is computed in the background.

    Attributes:
        id: random.
        type: a key of `KINDS`.
        owner: a digest of the key that posted it; only this key sees it.
        status: "queued", "running", "completed", "failed" or "cancelled".
        created: seconds since 1970.
        request: its fields without pictures.
        progress: the last step: {"stage", "step", "num_steps"}.
        result: the answer, with names of stored files as URLs.
        error: as in an error answer.
        work: None after a restart.
        preview: the last preview.
        listeners: of its events.
    """

    id: str
    type: str
    owner: str
    created: float
    request: dict[str, Any]
    status: str = "queued"
    progress: dict[str, Any] = field(default_factory=dict)
    result: Answer | None = None
    error: dict[str, Any] | None = None
    work: Work | None = field(default=None, repr=False)
    preview: dict[str, Any] | None = field(default=None, repr=False)
    listeners: set[asyncio.Queue[Event]] = field(default_factory=set, repr=False)

    def publish(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to all listeners; one that does not read loses events."""
        for listener in self.listeners:
            with contextlib.suppress(asyncio.QueueFull):
                listener.put_nowait(Event(name, data))

    @property
    def record(self) -> dict[str, Any]:
        """What is kept on disk."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}


class Jobs:
    """All jobs, and their records on disk.

    Args:
        service: computes them.
        folder: of the records. Jobs that a stop of the server interrupted become failed ones.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self._service, self._folder = service, folder / "jobs"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        for path in self._folder.glob("*.json"):
            try:
                job = Job(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                log.warning("the record of a job cannot be read: %s", path.name)
                continue
            if job.status not in FINAL:
                error = ApiError(500, "the server was stopped before this job was finished", code="interrupted")
                job.status, job.error = "failed", error.body["error"]
            self._jobs[job.id] = job
        self._jobs = dict(sorted(self._jobs.items(), key=lambda item: item[1].created))
        self._sweep()

    async def post(self, owner: str, kind: str, request: PictureRequest, work: Work) -> Job:
        """Queue a job. Raises: QueueFullError, ClosedError."""
        self._sweep()
        kept = request.model_dump(by_alias=True, exclude_none=True, exclude={"embeddings"})
        if isinstance(request, InterpolationRequest):
            kept["input"] = request.shown_input
        job = Job(secrets.token_hex(12), kind, owner, time.time(), kept, work=work)
        loop = asyncio.get_running_loop()
        preview = previews(
            3 if request.partial_images is None else request.partial_images,
            lambda row, index, image: loop.call_soon_threadsafe(self._show_preview, job, row, image),
        )
        work.on_step = self._progress(job, loop, preview)
        self._service.submit(work, owner)
        self._jobs[job.id] = job
        await asyncio.to_thread(self._write, job)
        task = loop.create_task(self._follow(job, request, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def get(self, owner: str, name: str) -> Job:
        """The job of an id. Raises: ApiError when this owner has none."""
        job = self._jobs.get(name)
        if job is None or job.owner != owner:
            raise ApiError(404, f"the job {name!r:.40} does not exist", param="id", code="not_found")
        return job

    def all(self, owner: str) -> list[Job]:
        """The owner's jobs, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    async def remove(self, job: Job) -> None:
        """Cancel a job that is not finished; remove a finished one and its pictures."""
        if job.status in FINAL:
            self._forget(job)
        elif job.work is not None:
            self._service.engine.cancel(job.work)
            while job.status not in FINAL:
                await asyncio.sleep(0.01)

    async def close(self, timeout_s: float) -> None:
        """Stop the engine, let running jobs finish within the time, and record what becomes of the others."""
        await asyncio.to_thread(self._service.engine.close, timeout_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)

    def shown(self, job: Job, url_of: Callable[[str], str]) -> Answer:
        """A job as an answer's body."""
        result = job.result
        if result is not None:
            data = [{**each, "url": url_of(each["url"])} for each in result["data"]]
            result = {**result, "data": data}
            if "film" in result:
                result["film"] = {"url": url_of(result["film"]["url"])}
        queued = job.status == "queued" and job.work is not None
        return {
            "id": job.id,
            "object": "job",
            "type": job.type,
            "status": job.status,
            "position": self._service.engine.position(job.work) if queued and job.work is not None else 0,
            "created_at": int(job.created),
            "request": job.request,
            "progress": job.progress,
            "result": result,
            "error": job.error,
        }

    def listen(self, job: Job, url_of: Callable[[str], str]) -> EventStream:
        """A stream of a job's events."""
        listener: asyncio.Queue[Event] = asyncio.Queue(MAX_EVENTS)
        job.listeners.add(listener)
        return EventStream(self._events(job, listener, url_of), lambda: job.listeners.discard(listener))

    async def _events(
        self, job: Job, listener: asyncio.Queue[Event], url_of: Callable[[str], str]
    ) -> AsyncIterator[str]:
        """A job's events: its state first, then progress and previews, and its state again at every change."""
        shown = self.shown(job, url_of)
        yield Event("job", shown).encode()
        if job.preview is not None and job.status not in FINAL:
            yield Event("preview", job.preview).encode()
        waited = 0.0
        while shown["status"] not in FINAL:
            event = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    event = await listener.get()
            if event is not None and event.name != "job":
                yield event.encode()
                continue
            now = self.shown(job, url_of)
            waited += POLL_S
            if (now["status"], now["position"]) != (shown["status"], shown["position"]):
                shown = now
                yield Event("job", shown).encode()
            elif waited >= 10 * POLL_S:
                waited = 0.0
                yield ": waiting\n\n"

    async def _follow(self, job: Job, request: PictureRequest, work: Work) -> None:
        """Wait for a job's pictures, and store them."""
        future = asyncio.wrap_future(work.future)
        try:
            await asyncio.wait({future})
            if work.cancelled or future.cancelled():
                job.status = "cancelled"
                if self._service.engine.is_closed:
                    error = ApiError(500, "the server was stopped before this job was finished", code="interrupted")
                    job.status, job.error = "failed", error.body["error"]
            else:
                made = future.result()
                stored = request.model_copy(update={"response_format": "url"})
                answer = await asyncio.to_thread(self._service.answer, stored, work.model, made, lambda name: name)
                job.result, job.status = answer, "completed"
        except Exception as error:
            job.status, job.error = "failed", as_api_error(error).body["error"]
        job.work = job.preview = None
        await asyncio.to_thread(self._write, job)
        job.publish("job", {})

    def _progress(
        self, job: Job, loop: asyncio.AbstractEventLoop, preview: Callable[[Step], None] | None
    ) -> Callable[[Step], None]:
        def on_step(step: Step) -> None:
            progress = {"stage": step.stage, "step": step.index + 1, "num_steps": step.num_steps}
            loop.call_soon_threadsafe(self._show_progress, job, progress)
            if preview is not None:
                preview(step)

        return on_step

    def _show_progress(self, job: Job, progress: dict[str, Any]) -> None:
        if job.status == "queued":
            job.status = "running"
            job.publish("job", {})
        job.progress = progress
        job.publish("progress", progress)

    def _show_preview(self, job: Job, row: int, image: Image.Image) -> None:
        content = encoded(image, GenerationRequest(prompt="preview"), {})
        job.preview = {"image_index": row, "b64_json": base64.b64encode(content).decode()}
        job.publish("preview", job.preview)

    def _write(self, job: Job) -> None:
        try:
            with atomic_file(self._folder / f"{job.id}.json") as draft:
                draft.write_text(json.dumps(job.record), encoding="utf-8")
        except OSError:
            log.exception("the record of a job cannot be written")

    def _forget(self, job: Job) -> None:
        result = job.result or {"data": []}
        for each in [*result["data"], *([result["film"]] if "film" in result else [])]:
            self._service.results.remove(each["url"])
        (self._folder / f"{job.id}.json").unlink(missing_ok=True)
        self._jobs.pop(job.id, None)

    def _sweep(self) -> None:
        """Remove the finished jobs that are too old or too many."""
        oldest = time.time() - self._service.settings.keep_s
        finished = [job for job in self._jobs.values() if job.status in FINAL]
        for place, job in enumerate(finished):
            if job.created < oldest or len(finished) - place > MAX_KEPT:
                self._forget(job)


def router(service: Service, jobs: Jobs) -> APIRouter:
    """The routes of jobs."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/jobs", status_code=202, openapi_extra={"requestBody": {"required": True, "content": BODY}})
    async def post(http: Request) -> Response:
        fields = await read_fields(http)
        kind = fields.pop("type", "generation")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ApiError(
                400, f"type is {kind!r:.40}; it must be one of {', '.join(KINDS)}", param="type", code="invalid_value"
            )
        request = parsed(KINDS[kind], fields)
        if isinstance(request, GenerationRequest):
            work = service.requests.generation(request)
        elif isinstance(request, EditRequest):
            images, mask = await asyncio.to_thread(read_pictures, fields, MAX_PICTURES)
            work = await asyncio.to_thread(service.requests.editing, request, images, mask)
        elif isinstance(request, VariationRequest):
            (image,), _ = await asyncio.to_thread(read_pictures, fields)
            work = service.requests.variation(request, image)
        elif isinstance(request, InterpolationRequest):
            work = await asyncio.to_thread(service.requests.interpolation, request)
        else:
            assert isinstance(request, DecodeRequest)
            work = service.requests.decoding(request)

        async def make(watched: Request | None) -> Answer:
            return jobs.shown(await jobs.post(http.state.owner, kind, request, work), service.url_of(http))

        return JSONResponse(await service.once(http, {**fields, "type": kind}, make), 202)

    @routes.get("/jobs")
    async def all_jobs(http: Request, limit: int = MAX_LISTED) -> Answer:
        found = jobs.all(http.state.owner)[: max(1, min(limit, MAX_LISTED))]
        return {"object": "list", "data": [jobs.shown(job, service.url_of(http)) for job in found]}

    @routes.get("/jobs/{name}")
    async def one(http: Request, name: str) -> Answer:
        return jobs.shown(jobs.get(http.state.owner, name), service.url_of(http))

    @routes.get("/jobs/{name}/events", response_class=Response, responses={200: {"content": EVENTS}})
    async def events(http: Request, name: str) -> Response:
        return jobs.listen(jobs.get(http.state.owner, name), service.url_of(http))

    @routes.delete("/jobs/{name}")
    async def delete(http: Request, name: str) -> Answer:
        job = jobs.get(http.state.owner, name)
        await jobs.remove(job)
        return jobs.shown(job, service.url_of(http))

    return routes
