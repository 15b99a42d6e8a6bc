"""The web page, and what it shows besides jobs: the concepts that a model knows, and the settings of a PNG."""

import asyncio
import io
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from unclip.clip.concepts import Concepts
from unclip.pipelines.session import MADE_WITH, read_texts
from unclip.server.contract import PICTURE, ApiError, DecodeRequest, data_of, read_fields
from unclip.server.models import Made, Model
from unclip.server.service import Answer, Service, encoded

PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
"""The paths of the page's files, and their media types."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PNG_BODY = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "properties": {"image": {"type": "string", "format": "binary"}},
        }
    }
}
"""The OpenAPI document's description of a PNG as the field "image"."""
MAX_CONCEPTS = 200
"""Concepts in one answer."""
PICTURE_STEPS = 8
"""Denoising steps of a concept's picture."""
KIND_OF_COMMAND = {"generate": "generation", "vary": "variation", "inpaint": "edit"}
FIELD_OF_TEXT = {"prompt": "prompt", "negative": "negative_prompt", "from": "from", "to": "to"}
FIELD_OF_SETTING = {
    "decoder_num_inference_steps": "steps",
    "decoder_guidance_scale": "guidance",
    "super_res_num_inference_steps": "super_res_steps",
    "prior_num_inference_steps": "prior_steps",
    "prior_guidance_scale": "prior_guidance",
    "num_prior_candidates": "candidates",
    "sampler": "sampler",
}


def router(service: Service) -> APIRouter:
    """The routes of the page."""
    routes = APIRouter()
    known: dict[str, Concepts | None] = {}
    pictures: dict[tuple[str, int], bytes] = {}

    async def concepts_of(model: Model) -> Concepts | None:
        if model.name not in known:
            known[model.name] = await asyncio.to_thread(Concepts.read, model.session.folder)
        return known[model.name]

    def add_file(name: str, media_type: str) -> None:
        content = (files("unclip.server") / "page" / (name or "index.html")).read_bytes()

        @routes.get(f"/{name}", include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    for name, media_type in PAGE.items():
        add_file(name, media_type)

    @routes.get("/v1/concepts")
    async def concepts(model: str | None = None, query: str = "", offset: int = 0, limit: int = MAX_CONCEPTS) -> Answer:
        found = await concepts_of(service.requests.model(model))
        places = [] if found is None else found.search(query[:100])
        offset, limit = max(0, offset), max(1, min(limit, MAX_CONCEPTS))
        data = [] if found is None else [_concept(found, place) for place in places[offset : offset + limit]]
        return {"object": "list", "data": data, "total": len(places)}

    @routes.get("/v1/concepts/{number}/picture", response_class=Response, responses={200: {"content": PICTURE}})
    async def concept_picture(http: Request, number: int, model: str | None = None) -> Response:
        about = service.requests.capable(model, "decode")
        found = await concepts_of(about)
        if found is None or not 0 <= number < len(found):
            raise ApiError(404, f"{about.name} has no concept {number}", param="number", code="not_found")
        key = about.name, number
        if key not in pictures:
            request = DecodeRequest(embeddings=[[0.0]], seed=0, steps=PICTURE_STEPS, sampler="ddim")
            work = service.requests.decoding(request, found.embeddings[number : number + 1].float())
            made: list[Made] = await service.wait(work, None, http)
            pictures[key] = await asyncio.to_thread(encoded, made[0].image, request, made[0].facts)
        return Response(pictures[key], media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @routes.post("/v1/settings", openapi_extra={"requestBody": {"required": True, "content": PNG_BODY}})
    async def settings(http: Request) -> Answer:
        given = (await read_fields(http)).get("image")
        content = data_of(given, "image") if isinstance(given, str) else given
        if not isinstance(content, bytes) or not content:
            raise ApiError(400, "image is missing", param="image", code="missing_required_parameter")
        return settings_of(await asyncio.to_thread(read_texts, io.BytesIO(content)))

    return routes


def settings_of(texts: Mapping[str, Any]) -> Answer:
    """The job that makes a picture like the one with these PNG texts.

    Returns: "type" of a job and its "fields" without pictures, the name of the "model", and the "software"; without
        fields when unclip did not make the picture.
    """
    software = str(texts.get("Software", ""))
    if not software.startswith("unclip"):
        return {"object": "settings", "software": None, "model": None, "type": None, "fields": {}}
    fields: dict[str, Any] = {FIELD_OF_TEXT[name]: text for name, text in texts.items() if name in FIELD_OF_TEXT}
    for name, number in (("seed", int), ("strength", float)):
        try:
            fields[name] = number(texts[name])
        except (KeyError, ValueError):
            continue
    used = texts.get("settings")
    for name, field in FIELD_OF_SETTING.items():
        value = used.get(name) if isinstance(used, Mapping) else None
        if isinstance(value, int | float | str):
            fields[field] = value
    made_with = texts.get(MADE_WITH)
    command = made_with.get("command") if isinstance(made_with, Mapping) else None
    kind = KIND_OF_COMMAND.get(str(command), "generation" if "prompt" in fields else "variation")
    if "from" in fields and "to" in fields:
        kind = "edit"
    return {"object": "settings", "software": software, "model": texts.get("model"), "type": kind, "fields": fields}


def _concept(found: Concepts, place: int) -> Answer:
    label, *others = found.names[place]
    return {"object": "concept", "id": place, "name": label, "other_names": others}
