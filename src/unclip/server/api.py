"""The routes of OpenAI's Images API, embeddings, and decoding of embeddings."""

import array
import asyncio
import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import FileResponse, Response

from unclip.server.contract import (
    EVENTS,
    PICTURE,
    ApiError,
    DecodeRequest,
    EditRequest,
    EmbeddingRequest,
    GenerationRequest,
    PictureRequest,
    VariationRequest,
    parsed,
    read_fields,
)
from unclip.server.models import KINDS, Model, Work
from unclip.server.results import MEDIA_TYPES
from unclip.server.service import Answer, Service
from unclip.server.work import MAX_PICTURES, embed, read_pictures

PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["created", "data", "model", "size"],
                    "properties": {"created": {"type": "integer"}, "data": {"type": "array"}},
                }
            },
            **EVENTS,
        }
    }
}
"""The OpenAPI document's description of pictures."""


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
            return await service.stream(request, work, prefix, http.state.owner)
        make = functools.partial(service.pictures, request, work, owner=http.state.owner, url_of=service.url_of(http))
        return JSONResponse(await service.once(http, fields, make))

    @routes.post("/images/generations", responses=PICTURES, openapi_extra=_body(GenerationRequest))
    async def generations(http: Request) -> Response:
        fields = await given(http)
        request = parsed(GenerationRequest, fields)
        return await respond(http, fields, request, service.requests.generation(request), "image_generation")

    @routes.post("/images/edits", responses=PICTURES, openapi_extra=_body(EditRequest, "image", "mask"))
    async def edits(http: Request) -> Response:
        fields = await given(http)
        request = parsed(EditRequest, fields)
        images, mask = await asyncio.to_thread(read_pictures, fields, MAX_PICTURES)
        work = await asyncio.to_thread(service.requests.editing, request, images, mask)
        return await respond(http, fields, request, work, "image_edit")

    @routes.post("/images/variations", responses=PICTURES, openapi_extra=_body(VariationRequest, "image"))
    async def variations(http: Request) -> Response:
        fields = await given(http)
        request = parsed(VariationRequest, fields)
        (image,), _ = await asyncio.to_thread(read_pictures, fields)
        return await respond(http, fields, request, service.requests.variation(request, image), "image_variation")

    @routes.post("/images/decode", responses=PICTURES, openapi_extra=_body(DecodeRequest))
    async def decode(http: Request) -> Response:
        fields = await given(http)
        request = parsed(DecodeRequest, fields)
        return await respond(http, fields, request, service.requests.decoding(request), "image_generation")

    @routes.post("/embeddings", openapi_extra=_body(EmbeddingRequest))
    async def embeddings(http: Request) -> Response:
        fields = await given(http)
        request = parsed(EmbeddingRequest, fields)
        texts = [request.input] if isinstance(request.input, str) else request.input
        kinds = ["decode"] if any(text.startswith("data:") for text in texts) else []
        model = service.requests.capable(request.model, *kinds, *(["generate"] if request.space == "prior" else []))
        function = await asyncio.to_thread(embed, request, model.prior_settings())

        async def make(watched: Request | None) -> Answer:
            rows, notes = await service.wait(Work(model.name, "embed", function=function), http.state.owner, watched)
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
        return _about(service.requests.model(name))

    @routes.get("/files/{name}", response_class=Response, responses={200: {"content": PICTURE}})
    async def file(name: str, expires: str = "", signature: str = "") -> Response:
        if not service.results.is_signed(name, expires, signature):
            raise ApiError(403, "this URL is not valid, or not any more", code="invalid_url")
        path = service.results.path(name)
        if path is None:
            raise ApiError(404, "this picture is not kept any more", code="not_found")
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix[1:]], headers=headers)

    return routes


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


def _numbers(row: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return list(row)
    return base64.b64encode(array.array("f", row).tobytes()).decode()
