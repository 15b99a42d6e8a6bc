"""The application: routes, keys, limits, health, metrics and logs; and the function that serves it."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unclip import __version__
from unclip.checkpoints.hub import resolve
from unclip.errors import ConfigError, MissingDependencyError, UnclipError
from unclip.pipelines.session import Compute, model_name, pick_device
from unclip.server import api, jobs, site
from unclip.server.contract import ERRORS, ApiError, as_api_error
from unclip.server.engine import Engine
from unclip.server.models import Models
from unclip.server.results import Results
from unclip.server.settings import ServerSettings, is_local

log = logging.getLogger("unclip.server")

OPEN_PATHS = re.compile(r"/(healthz|readyz|page\.css|page\.js)?|/v1/files/[^/]+")
"""Paths that need no key; the URLs of files are signed."""
NO_KEY = "everybody"
"""The owner of jobs on a server without keys."""
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients reuse one, or a request may meet a closed connection."""
SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """Prometheus metrics of one application."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "unclip_requests", "Answered requests.", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "unclip_request_seconds",
            "Time to the end of an answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.pictures = Counter("unclip_pictures", "Computed pictures.", registry=self.registry)
        self.batches = Histogram(
            "unclip_batch_size", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.busy = Counter("unclip_compute_seconds", "Time spent computing.", registry=self.registry)
        pending = Gauge("unclip_queue_pictures", "Pictures that wait or are computed.", registry=self.registry)
        pending.set_function(lambda: engine.num_pending)
        engine.on_batch = self._batch

    def _batch(self, size: int, seconds: float) -> None:
        self.pictures.inc(size)
        self.batches.observe(size)
        self.busy.inc(seconds)


class Front:
    """What happens to every request before its route: an id, a key, limits; and after it: metrics and a line of log."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._open = not settings.keys
        self._local_only = self._open and is_local(settings.host)
        self._origins = {*settings.cors_origins, *([settings.public_url.rstrip("/")] if settings.public_url else [])}
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._max_bytes = int(settings.max_upload_mb * 1e6)
        self._rate = settings.rate_per_minute
        self._recent: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status, started = 500, False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        num_bytes = 0

        async def read() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope, headers, state)
            await self._app(scope, read, answer)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a request failed")
            if started:
                raise
            refusal = as_api_error(error)
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - start
            self._metrics.requests.labels(route, scope["method"] if route != "other" else "any", status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log.info("request", extra={"facts": {**facts, "ms": round(seconds * 1000), **state.get("logged", {})}})

    def _check(self, scope: Scope, headers: dict[str, str], state: dict[str, Any]) -> None:
        """Raises: ApiError for a page of another site, a wrong key, a large body, or too many requests."""
        state["owner"] = NO_KEY
        if self._open:
            self._check_site(scope["method"], headers)
        client = (scope.get("client") or ("unknown",))[0]
        if OPEN_PATHS.fullmatch(scope["path"]) or scope["method"] == "OPTIONS":
            return
        if self._keys:
            kind, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            found = [hmac.compare_digest(digest, known) for known in self._keys]
            if kind.lower() != "bearer" or not any(found):
                raise ApiError(
                    401,
                    "the key is missing or wrong: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            state["owner"] = client = digest.hex()[:16]
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        if self._rate is not None and scope["method"] == "POST":
            self._count(client, self._rate)

    def _check_site(self, method: str, headers: dict[str, str]) -> None:
        """Raises: ApiError for a request that a page of another site makes a browser send.

        Without keys, such a page could use the server: by a form, or by a name that resolves to this machine (DNS
        rebinding).
        """
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._local_only and not is_local(name):
            raise ApiError(
                403,
                f"the host {host!r:.80} is not this machine: use localhost, or keys",
                code="wrong_host",
            )
        origin = headers.get("origin", "")
        foreign = (
            origin and urlsplit(origin).netloc != host and origin not in self._origins and "*" not in self._origins
        )
        if foreign and method not in ("GET", "HEAD", "OPTIONS"):
            raise ApiError(
                403, f"pages of {origin!r:.80} may not call this server: see --cors-origin", code="wrong_origin"
            )

    def _count(self, client: str, limit: int) -> None:
        now = time.monotonic()
        for name in [name for name, times in self._recent.items() if times[-1] < now - 60]:
            del self._recent[name]
        recent = self._recent.setdefault(client, deque(maxlen=limit))
        if len(recent) == limit and recent[0] > now - 60:
            wait = str(max(1, int(recent[0] + 60 - now) + 1))
            raise ApiError(
                429,
                f"this key may send {limit} requests a minute; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": wait},
            )
        recent.append(now)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request is larger than {self._max_bytes / 1e6:g} MB, the limit here", code="request_too_large"
        )


def make_app(settings: ServerSettings, *, start: bool = True) -> FastAPI:
    """The application, with an engine in `app.state.engine`.

    Args:
        settings: of the server.
        start: whether the workers start with the application.

    Raises: ConfigError for settings that do not fit, or a cluster that cannot be reached; CheckpointError for a model
        that cannot be used; InputError for a device that this machine does not have; OutputError for a folder that
        cannot be written; MissingDependencyError for `ray` without Ray Serve.
    """
    folders, replicas, models = model_folders(settings.models), None, Models
    computes = [Compute(dtype=settings.dtype, device=device) for device in settings.devices]
    results = Results(
        settings.folder, keep_s=settings.keep_s, quota_bytes=settings.quota_mb * 1e6, url_s=settings.url_s
    )
    if settings.ray is None:
        for device in settings.devices:
            pick_device(device)
    else:
        try:
            from unclip.server.cluster import Replicas
        except ModuleNotFoundError as error:
            raise MissingDependencyError(f"--ray needs {error.name}: pip install 'unclip[server,ray]'") from error
        replicas = Replicas(settings, folders, computes[0])
        computes, models = replicas.computes, replicas.models
    engine = Engine(
        folders,
        computes,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_model_bytes=None if settings.memory_mb is None else settings.memory_mb * 1e6,
        models=models,
    )
    service = api.Service(engine, results, settings)
    history = jobs.Jobs(service, settings.folder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if start:
            engine.start()
        yield
        await history.close(settings.drain_s)
        if replicas is not None:
            await asyncio.to_thread(replicas.close)

    app = FastAPI(
        title="unclip",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts of another site
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.engine, app.state.service, app.state.jobs = engine, service, history
    metrics = Metrics(engine)
    app.include_router(api.router(service))
    app.include_router(jobs.router(service, history))
    app.include_router(site.router(service))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Front, settings=settings, metrics=metrics)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/readyz", responses={503: {"content": {"application/json": {"schema": {"type": "object"}}}}})
    async def readyz() -> JSONResponse:
        if engine.is_ready if replicas is None else replicas.num_running and not engine.is_closed:
            return JSONResponse({"status": "ready"})
        reason = "stopping" if engine.is_closed else engine.load_error or "the model is being loaded"
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "1"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    described = app.openapi

    def describe() -> dict[str, Any]:
        document = described()
        for route in (route for path in document["paths"].values() for route in path.values()):
            route["responses"].pop("422", None)  # FastAPI's own refusal, which is a 400 here
        keys = {"type": "http", "scheme": "bearer"}
        return document | {"components": {"securitySchemes": {"key": keys}}, "security": [{}, {"key": []}]}

    app.openapi = describe

    @app.exception_handler(UnclipError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        answer = as_api_error(error)
        return JSONResponse(answer.body, answer.status, answer.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1]) if first["loc"] else None
        return await refused(request, ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = (
            f"the route {request.method} {request.url.path} does not exist"
            if error.status_code == 404
            else error.detail
        )
        headers = error.headers
        return await refused(
            request, ApiError(error.status_code, message, code=codes.get(error.status_code), headers=headers)
        )

    return app


def model_folders(models: Sequence[str]) -> dict[str, str]:
    """Folders by the models' names, from "name=folder" or "folder". Raises: ConfigError for a name given twice."""
    folders: dict[str, str] = {}
    for each in models:
        name, equals, folder = each.partition("=")
        name, folder = (name, folder) if equals and not Path(each).is_dir() else (model_name(each), each)
        if not name or not folder:
            raise ConfigError(f"the model {each!r} must be a folder, a hub id or a built-in name, or NAME=FOLDER")
        if name in folders:
            raise ConfigError(f"two models have the name {name!r}: give names, as in --model NAME=FOLDER")
        resolve(folder)
        folders[name] = folder
    return folders


class JsonLines(logging.Formatter):
    """Log records as JSON, one on each line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**facts, **getattr(record, "facts", {})})


class Server(uvicorn.Server):
    """A server that logs its address when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening", extra={"facts": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT, then finish the running requests. Raises: as `make_app`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("unclip.server", logging.INFO), ("uvicorn", logging.WARNING), ("ray", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    # Warnings about captions become fields of answers; printed, they would show prompts in the log.
    warnings.simplefilter("ignore", UserWarning)
    app = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        timeout_keep_alive=KEEP_ALIVE_S,
        server_header=False,
    )
    try:
        Server(config).run()
    except KeyboardInterrupt:  # uvicorn raises the signal again after a clean stop
        log.info("stopped")
