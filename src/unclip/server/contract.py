"""Requests and errors in the shapes of OpenAI's Images API, with the server's own fields."""

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from unclip.clip.encoders import check_prompt
from unclip.errors import ImageError, InputError, NonFiniteError, OutputError, UnclipError
from unclip.images import open_image
from unclip.numbers import shown
from unclip.pipelines.session import FASTER
from unclip.server.engine import ClosedError, MemoryExhaustedError, QueueFullError, ReplicaError
from unclip.settings import SAMPLERS, SETTINGS

MAX_PROMPT_CHARACTERS = 32_000
MAX_PICTURES = 10
MAX_FRAMES = 60
MAX_SIDE_PX = 4096
MAX_EMBEDDINGS = 100
MAX_FIELD_BYTES = 16 * 2**20
"""Size limit of a form field that is not a file."""

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""The JSON schema of every error's body."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
"""The OpenAPI document's description of errors."""
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
PICTURE = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "jpeg", "webp")}

T = TypeVar("T", bound=BaseModel)


class ApiError(UnclipError):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: what is wrong, the limit and the remedy.
        param: the field at fault.
        code: a short name for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if status >= 500 and status != 503:
            self.headers.setdefault("x-should-retry", "false")

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        if self.code == "insufficient_quota":
            kind = self.code
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """Any error as an answer; an unexpected one tells nothing of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        wait = str(error.retry_after_s)
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": wait})
    unavailable = {MemoryExhaustedError: "out_of_memory", ClosedError: "stopping", ReplicaError: "replica_unavailable"}
    if type(error) in unavailable:
        return ApiError(503, str(error), code=unavailable[type(error)], headers={"Retry-After": "10"})
    if isinstance(error, ImageError):
        return ApiError(400, str(error), param="image", code="invalid_image")
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, NonFiniteError):
        return ApiError(500, str(error), code="numerical_error")
    if isinstance(error, OutputError):
        return ApiError(500, "the result cannot be stored", code="storage_error")
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def _limited(name: str, field: str) -> Callable[[Any], Any]:
    """A check by a row of `SETTINGS`, with the request's name of the field in messages."""
    return lambda value: SETTINGS[name].check(value, field)


def _prompt(text: str) -> str:
    if not text.strip():
        raise InputError("the prompt is empty; describe the picture")
    return _caption(text)


def _caption(text: str) -> str:
    check_prompt(text)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"the text has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read")
    return text


def _size(text: str) -> str:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if text != "auto" and (not found or max(int(found[1]), int(found[2])) > MAX_SIDE_PX):
        raise InputError(f"size is {text!r:.40}; it must be 'auto' or WIDTHxHEIGHT up to {MAX_SIDE_PX}, as 1024x1024")
    return text


def _sampler(name: str) -> str:
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r:.40}; it must be one of {', '.join(SAMPLERS)}")
    return name


def _noise_level(value: Any) -> Any:
    raise InputError("noise_level: no model here decodes noisy embeddings; leave the field out")


def _first(value: Any) -> Any:
    """Some clients send a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _ends(texts: list[str]) -> list[str]:
    return [text if text.startswith("data:") else _prompt(text) for text in texts]


Prompt = Annotated[str, AfterValidator(_prompt)]
Caption = Annotated[str, AfterValidator(_caption)]
Count = Annotated[int, Field(ge=1, le=MAX_PICTURES)]


class PictureRequest(BaseModel):
    """Fields of all requests for pictures; None: the default. Unknown fields are ignored.

    `seed`, `steps`, `guidance`, `super_res_steps`, `sampler`, `preset`, `noise_level`, `negative_prompt` and `enlarge`
    are the server's own.
    """

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    model: str | None = None
    n: Count | None = None
    size: Annotated[str, AfterValidator(_size)] | None = None
    response_format: Annotated[Literal["url", "b64_json"], BeforeValidator(_first)] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    user: str | None = None

    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    steps: Annotated[int, AfterValidator(_limited("decoder_num_inference_steps", "steps"))] | None = None
    guidance: Annotated[float, AfterValidator(_limited("decoder_guidance_scale", "guidance"))] | None = None
    super_res_steps: (
        Annotated[int, AfterValidator(_limited("super_res_num_inference_steps", "super_res_steps"))] | None
    ) = None
    sampler: Annotated[str, AfterValidator(_sampler)] | None = None
    preset: str | None = None
    noise_level: Annotated[float, BeforeValidator(_noise_level)] | None = None
    negative_prompt: Caption | None = None
    enlarge: bool | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by the names of a call's arguments; None where not given."""
        return {
            "decoder_num_inference_steps": self.steps,
            "decoder_guidance_scale": self.guidance,
            "super_res_num_inference_steps": self.super_res_steps,
            **dict.fromkeys(FASTER),
        }

    @property
    def sides(self) -> tuple[int, int] | None:
        """The asked width and height; None for "auto"."""
        if self.size is None or self.size == "auto":
            return None
        width, height = self.size.split("x")
        return int(width), int(height)


class _PriorRequest(PictureRequest):
    """Requests whose captions go through the prior."""

    prior_steps: Annotated[int, AfterValidator(_limited("prior_num_inference_steps", "prior_steps"))] | None = None
    prior_guidance: Annotated[float, AfterValidator(_limited("prior_guidance_scale", "prior_guidance"))] | None = None
    candidates: Annotated[int, AfterValidator(_limited("num_prior_candidates", "candidates"))] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {
            "prior_num_inference_steps": self.prior_steps,
            "prior_guidance_scale": self.prior_guidance,
            "num_prior_candidates": self.candidates,
        }


class GenerationRequest(_PriorRequest):
    """POST /v1/images/generations."""

    prompt: Prompt
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None


class EditRequest(_PriorRequest):
    """POST /v1/images/edits: by a mask, by `strength` (image to image), or by a caption difference (`from`, `to`)."""

    prompt: Caption | None = None
    input_fidelity: Literal["high", "low"] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    source: Prompt | None = Field(None, alias="from")
    target: Prompt | None = Field(None, alias="to")


class VariationRequest(PictureRequest):
    """POST /v1/images/variations."""

    prompt: Caption | None = None


class InterpolationRequest(_PriorRequest):
    """A job of type "interpolation": `frames` pictures between two captions, or pictures as data URLs."""

    input: Annotated[list[str], Field(min_length=2, max_length=2), AfterValidator(_ends)]
    frames: Annotated[int, Field(ge=2, le=MAX_FRAMES)] | None = None

    @property
    def shown_input(self) -> list[str]:
        """The captions, and "picture" in the place of pictures."""
        return ["picture" if text.startswith("data:") else text for text in self.input]


class DecodeRequest(PictureRequest):
    """POST /v1/images/decode: pictures of image embeddings."""

    embeddings: Annotated[list[list[float]], Field(min_length=1, max_length=MAX_EMBEDDINGS)]
    prompt: Caption | None = None


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings: captions, and pictures as data URLs.

    `space` is "clip", or "prior" for the image embeddings that the prior samples for captions.
    """

    model_config = ConfigDict(extra="ignore")

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_EMBEDDINGS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    space: Literal["clip", "prior"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None


def parsed(kind: type[T], fields: Mapping[str, Any]) -> T:
    """The request of these fields. Raises: ApiError that names the first wrong field."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        raise ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    own = first.get("ctx", {}).get("error")
    message = str(own) if own is not None else f"{param} is {shown(first['input'])}: {first['msg']}"
    if param is not None and param not in message:
        message = f"{param}: {message}"
    raise ApiError(400, message, param=param, code="invalid_value")


async def read_fields(request: Request) -> dict[str, Any]:
    """The fields of a JSON or a form body: texts, numbers, lists, and files as bytes.

    Fields whose names end in [] become lists.

    Raises: ApiError for another body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields: dict[str, Any] = {}
        async with request.form(max_files=32, max_fields=200, max_part_size=MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                content = await value.read() if isinstance(value, UploadFile) else value
                if name.endswith("[]"):
                    fields.setdefault(name[:-2], []).append(content)
                elif name in fields:
                    known = fields[name]
                    fields[name] = [*(known if isinstance(known, list) else [known]), content]
                else:
                    fields[name] = content
        return fields
    try:
        found = json.loads(await request.body() or b"null")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:200], code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object, or a form", code="invalid_json")
    return found


def pictures(value: object, param: str, most: int = 1) -> list[Image.Image]:
    """The pictures of files' contents, or of data URLs; in RGBA where they have transparency.

    Raises: ApiError for more than `most` pictures, another URL, or what is not a picture.
    """
    given = value if isinstance(value, list) else [value]
    if len(given) > most:
        raise ApiError(
            400, f"{param} has {len(given)} pictures; at most {most} can be sent", param=param, code="too_many_images"
        )
    return [found for each in given if (found := _picture(each, param)) is not None]


def _picture(value: object, param: str) -> Image.Image | None:
    if isinstance(value, dict):  # {"image_url": "data:…"}
        value = value.get("image_url")
    if value is None or value == "" or value == b"":
        return None
    content = data_of(value, param) if isinstance(value, str) else value
    if not isinstance(content, bytes):
        raise ApiError(400, f"{param} must be a file or a data URL", param=param, code="invalid_image")
    try:
        return open_image(io.BytesIO(content), param, keep_alpha=True)
    except ImageError as error:
        raise ApiError(400, str(error), param=param, code="invalid_image") from None


def data_of(url: str, param: str) -> bytes:
    """The content of a data URL, or of plain base64. Raises: ApiError for another URL."""
    head, comma, rest = url.partition(",")
    if re.match(r"https?:", head[:10], re.IGNORECASE):
        raise ApiError(
            400, f"{param} is a URL, and the server fetches none: send the file", param=param, code="unsupported_url"
        )
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, f"{param} is not a data URL with base64", param=param, code="invalid_image")
    try:
        return base64.b64decode(rest if comma else head, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param} is not base64", param=param, code="invalid_image") from None
