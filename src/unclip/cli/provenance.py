"""Records in each picture which command and options made it; inputs are recorded by name, without their folders."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from unclip.cli.messages import warn
from unclip.pipelines.session import MADE_WITH, Session

if TYPE_CHECKING:
    from unclip.pipelines.pipeline import Pipeline

ELSEWHERE = {
    "prompts", "prompts_file", "num_images", "seed", "model", "images", "image",
    "prior_steps", "decoder_steps", "super_res_steps", "prior_guidance", "decoder_guidance",
    "candidates", "prior_temperature", "prior_top_p", "noise_level", "sampler",
    "decoder_guidance_low", "decoder_guidance_high", "decoder_reuse", "super_res_reuse", "preset",
    "size", "height", "width", "tile", "dtype",
    "out", "grid", "film", "fps", "overwrite", "as_json", "batch_size", "device", "cpu_offload", "quiet",
    "table", "processes", "ray", "retry_failed", "bulk_format", "per_shard",
}  # fmt: skip
"""Options that other texts of the file record, or that do not change the picture."""
LABELS = {
    "unclip": "version of unclip",
    "torch": "version of PyTorch",
    "device": "device",
    "model_fingerprint": "weights of the model",
}


@dataclass
class Replay:
    """A picture that `unclip rerun` makes again.

    Attributes:
        before: the software and the device that its file records.
        index: number of the picture among those that the command makes.
        place: of the picture in its batch. Results depend on the batch in their last digits.
        size: of the batch.
        prompts: for each row of the batch, the first row with the same prompt; empty if all rows have one prompt.
        only: whether only this picture is made.
    """

    before: Mapping[str, Any]
    index: int = 0
    place: int = 0
    size: int = 1
    prompts: Sequence[int] = ()
    only: bool = True


@dataclass
class _Call:
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)


_call: ContextVar[_Call | None] = ContextVar("_call", default=None)
_replay: ContextVar[Replay | None] = ContextVar("_replay", default=None)


class RecordedCommand(TyperCommand):
    """A command that records its options in its pictures."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        given = {}
        for option in self.params:
            source = ctx.get_parameter_source(option.name)
            if option.name not in ELSEWHERE and source is not None and source.name != "DEFAULT":
                given[option.name] = _as_json(ctx.params[option.name])
        name = ctx.command_path.partition(" ")[2]
        token = _call.set(_Call(name, given))
        try:
            return super().invoke(ctx)
        finally:
            _call.reset(token)


def replay() -> Replay | None:
    """The picture that `unclip rerun` makes again; None in all other commands."""
    return _replay.get()


@contextmanager
def replaying(picture: Replay) -> Iterator[None]:
    """Within it, commands make this picture."""
    token = _replay.set(picture)
    try:
        yield
    finally:
        _replay.reset(token)


def metadata(session: Session, pipe: "Pipeline", settings: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of all pictures of the running command; arguments as in `Session.metadata`.

    It warns of what has changed when `unclip rerun` makes a picture again.
    """
    call = _call.get() or _Call()
    found = session.metadata(pipe, settings, {"command": call.command, "options": call.options})
    picture, now = replay(), found[MADE_WITH]
    for name, label in LABELS.items():
        before = picture.before.get(name) if picture is not None else None
        if before and now[name] and before != now[name]:
            warn(f"the {label} was {before} and is now {now[name]}; the picture may differ")
    return found


def _as_json(value: Any) -> Any:
    """A value for JSON; paths become file names."""
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, Path):
        return _text(value.name)
    if isinstance(value, str):
        whole, (head, _, _) = value, value.rpartition(":")  # with a weight after the colon
        is_file = any(text and len(text) < 1000 and "\0" not in text and Path(text).is_file() for text in (whole, head))
        return _text(Path(value).name if is_file else str(value))
    return value


def _text(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
