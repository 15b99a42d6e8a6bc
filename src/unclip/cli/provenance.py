"""How a picture was made: the command, its options, the model and the machine, in one text of its file.

`unclip rerun` reads it. Inputs are recorded by name, without their folders.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from unclip import __version__
from unclip.cli.messages import warn

if TYPE_CHECKING:
    from unclip.pipelines.pipeline import Pipeline

MADE_WITH = "made_with"
"""The name of the text."""
ELSEWHERE = {
    "prompts", "prompts_file", "num_images", "seed", "model", "images", "image",
    "prior_steps", "decoder_steps", "super_res_steps", "prior_guidance", "decoder_guidance",
    "candidates", "prior_temperature", "prior_top_p", "sampler", "size", "height", "width", "tile", "dtype",
    "out", "grid", "film", "fps", "overwrite", "as_json", "batch_size", "device", "cpu_offload", "quiet",
}  # fmt: skip
"""Options that other texts of the file record, or that change no picture."""
LABELS = {
    "unclip": "version of unclip",
    "torch": "version of PyTorch",
    "device": "device",
    "model_fingerprint": "weights of the model",
}


@dataclass
class Again:
    """A picture that is made again.

    Attributes:
        before: what its file says of how it was made.
        index: of the picture, among those that the command makes.
        place, size: of the picture in its batch, for arithmetic in batches differs in the last digits.
        only: whether to make this picture alone.
    """

    before: Mapping[str, Any]
    index: int = 0
    place: int = 0
    size: int = 1
    only: bool = True


@dataclass
class _Call:
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)


_call: ContextVar[_Call | None] = ContextVar("_call", default=None)
_again: ContextVar[Again | None] = ContextVar("_again", default=None)


class Recorded(TyperCommand):
    """A command whose pictures say with which options they were made."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        given = {}
        for option in self.params:
            source = ctx.get_parameter_source(option.name)
            if option.name not in ELSEWHERE and source is not None and source.name != "DEFAULT":
                given[option.name] = _plain(ctx.params[option.name])
        name = ctx.command_path.partition(" ")[2]
        token = _call.set(_Call(name, given))
        try:
            return super().invoke(ctx)
        finally:
            _call.reset(token)


def again() -> Again | None:
    """The picture that `unclip rerun` makes; None in every other command."""
    return _again.get()


@contextmanager
def making_again(what: Again) -> Iterator[None]:
    """Within it, the command that runs makes this picture."""
    token = _again.set(what)
    try:
        yield
    finally:
        _again.reset(token)


def made_with(pipe: "Pipeline") -> dict[str, Any]:
    """What pictures of this call say of how they were made; warns of what differs when one is made again."""
    import torch

    call = _call.get() or _Call()
    now = {
        "command": call.command,
        "options": call.options,
        "unclip": __version__,
        "torch": torch.__version__,
        "device": _device(pipe),
        "model_fingerprint": _fingerprint(pipe),
    }
    picture = again()
    for name, label in LABELS.items() if picture is not None else ():
        before = picture.before.get(name) if picture is not None else None
        if before is not None and before != now[name] and (name != "model_fingerprint" or (before and now[name])):
            warn(f"the {label} was {before} and is now {now[name]}; the picture may differ")
    return now


def read_texts(path: Path) -> dict[str, Any]:
    """The texts of a picture's file, with JSON where it is JSON.

    Raises: ImageError as `open_image`.
    """
    from PIL import Image

    from unclip.cli.inputs import open_picture

    open_picture(path)
    with Image.open(path) as image:
        texts: dict[str, Any] = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    for name in ("settings", MADE_WITH):
        if name in texts:
            try:
                texts[name] = json.loads(texts[name])
            except (ValueError, RecursionError):
                del texts[name]
    return texts


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, paths to files by their names."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return _text(value.name)
    if isinstance(value, str):
        whole, (head, _, _) = value, value.rpartition(":")  # with a weight after the colon
        is_file = any(text and len(text) < 1000 and "\0" not in text and Path(text).is_file() for text in (whole, head))
        return _text(Path(value).name if is_file else str(value))
    return value


def _text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _device(pipe: "Pipeline") -> str:
    import torch

    device = pipe.device
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def _fingerprint(pipe: "Pipeline") -> str:
    """Of the denoising networks."""
    from torch import nn

    from unclip.checkpoints.tensor_file import fingerprint

    names = sorted(name for name in pipe.components if "encoder" not in name)
    parts = [pipe.components[name] for name in names]
    return fingerprint(part.state_dict() for part in parts if isinstance(part, nn.Module))
