"""The cascade of super-resolution stages: the components of each, whether they fit, and the sizes of pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from unclip.checkpoints.layout import FURTHER_SUPER_RES
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import ConfigError, InputError
from unclip.models.unet import UNet2DConditionModel, UNet2DModel
from unclip.models.unet_config import UNet2DConditionConfig, UNetConfig
from unclip.numbers import several, whole
from unclip.stages.stage import Size, size_px

STAGES = ("super_res", *FURTHER_SUPER_RES)
MAX_SIDE_PX = 8192

V = TypeVar("V")
Fact = tuple[str, object, str, object]
"""Two settings that must agree: a name and its value, and another name and the value that it requires."""


@dataclass(frozen=True)
class SuperResParts:
    """One super-resolution stage's components.

    Attributes:
        first: the network of every step except the last.
        last: the network of the last step. In a further stage without its own, this is the first network.
        scheduler: of both networks.
    """

    first: UNet2DModel
    last: UNet2DModel
    scheduler: Scheduler

    @property
    def multiple(self) -> int:
        """The number that divides the sides of every picture that both networks can halve."""
        return max(self.first.config.multiple, self.last.config.multiple)


def parts(components: Mapping[str, Any]) -> dict[str, SuperResParts]:
    """The stages in their order: "super_res", then "super_res_2" and so on.

    Raises: ConfigError for a stage without its network or its scheduler, or without the stage before it.
    """
    found = {}
    ended_at = ""
    for stage in STAGES:
        first, last, scheduler = (components.get(f"{stage}_{part}") for part in ("first", "last", "scheduler"))
        if first is None and last is None and scheduler is None:
            ended_at = ended_at or stage
            continue
        if first is None or scheduler is None:
            lacking = f"{stage}_first" if first is None else f"{stage}_scheduler"
            raise ConfigError(f"the components do not fit: {stage} has no {lacking}; give it, or omit the stage")
        if ended_at:
            raise ConfigError(f"the components do not fit: {stage} needs {ended_at}, which is missing")
        found[stage] = SuperResParts(first, first if last is None else last, scheduler)
    return found


def fits(decoder: UNet2DConditionConfig, stages: Mapping[str, SuperResParts]) -> list[Fact]:
    """The settings that must agree for super-resolution to enlarge the decoder's pictures.

    The first stage may keep their size; each further one must enlarge.

    Raises: ConfigError for a stage that shrinks, or a network without a size, or with one that it cannot halve.
    """
    facts: list[Fact] = []
    channels, small_px = decoder.in_channels, _own_px("decoder", decoder)
    for stage, part in stages.items():
        first, last = part.first.config, part.last.config
        size, words = _own_px(f"{stage}_first", first), "less" if stage == "super_res" else "no more"
        _own_px(f"{stage}_last", last)
        if size < small_px or (size == small_px and stage != "super_res"):
            raise ConfigError(
                f"the components do not fit: {stage}_first.sample_size is {size}, {words} than the {small_px} of the "
                "stage before"
            )
        small_px = size
        given = "the class embedding of super-resolution"
        facts += [
            (f"{stage}_first.in_channels", first.in_channels, "twice the decoder's", 2 * channels),
            (f"{stage}_last.in_channels", last.in_channels, f"{stage}_first.in_channels", first.in_channels),
            (f"{stage}_last.sample_size", last.sample_size, f"{stage}_first.sample_size", first.sample_size),
            (f"{stage}_first.class_embed_type", first.class_embed_type, given, None),
            (f"{stage}_last.class_embed_type", last.class_embed_type, given, None),
        ]
    return facts


def check_fits(facts: Sequence[Fact]) -> None:
    """Raises: ConfigError for the first pair of settings that do not agree."""
    for name, value, other, wanted in facts:
        if value != wanted:
            raise ConfigError(f"the components do not fit: {name} is {value}, but {other} is {wanted}")


def picture_sizes(
    decoder: UNet2DConditionModel, stages: Mapping[str, SuperResParts], height: int | None, width: int | None
) -> dict[str, Size]:
    """Height and width at "decoder" and at each super-resolution stage, for a result of this height and width.

    A side of None is that of the networks. Any other side must be a whole number of pixels at every stage, and the
    networks of the stage must be able to halve it.

    Raises: InputError with the nearest valid size.
    """
    own = _own_sizes(decoder, stages)
    result, multiple = list(own.values())[-1], side_multiple(decoder, stages)
    sides = [_side(name, side, result, multiple) for name, side in (("height", height), ("width", width))]
    return {stage: (sides[0] * size // result, sides[1] * size // result) for stage, size in own.items()}


def side_multiple(decoder: UNet2DConditionModel, stages: Mapping[str, SuperResParts]) -> int:
    """The number that must divide a result's height and width, unless they are the networks' own."""
    own = _own_sizes(decoder, stages)
    result = list(own.values())[-1]
    multiples = [decoder.config.multiple, *(part.multiple for part in stages.values())]
    needs = [multiple * result for multiple in multiples]
    return math.lcm(*(need // math.gcd(need, size) for need, size in zip(needs, own.values(), strict=True)))


def fitted_size(own_px: int, multiple: int, picture: Size) -> Size:
    """Height and width in multiples of `multiple`, with about own_px² pixels and about a picture's shape.

    The ratio of the sides is at most 4; longer pictures are squashed.
    """
    ratio = min(4.0, max(0.25, picture[1] / picture[0]))
    height, width = own_px / math.sqrt(ratio), own_px * math.sqrt(ratio)
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


def per_stage(value: V | Sequence[V], count: int, name: str) -> list[V]:
    """A value for each of `count` stages, from one for all of them or a sequence.

    Raises: InputError for another number of values.
    """
    each = several(value)
    if each is None:
        return [value] * count  # type: ignore[list-item]
    if len(each) != count:
        raise InputError(
            f"{name} has {len(each)} values for {count} super-resolution stages; give one, or one for each stage"
        )
    return each


def _own_px(name: str, config: UNetConfig) -> int:
    """The side of a network's pictures. Raises: ConfigError unless the network can halve it."""
    if (size := size_px(config.sample_size)) % config.multiple:
        found = f"{name}.sample_size is {size}, but its {config.num_levels} levels need a multiple of {config.multiple}"
        raise ConfigError(f"the components do not fit: {found}")
    return size


def _own_sizes(decoder: UNet2DConditionModel, stages: Mapping[str, SuperResParts]) -> dict[str, int]:
    networks = {"decoder": decoder, **{stage: part.first for stage, part in stages.items()}}
    return {stage: size_px(network.config.sample_size) for stage, network in networks.items()}


def _side(name: str, given: object, own_px: int, multiple: int) -> int:
    if given is None:
        return own_px
    side = whole(given, name, 1, MAX_SIDE_PX, unit="whole number of pixels")
    if side != own_px and side % multiple:
        near = max(1, round(side / multiple)) * multiple
        raise InputError(f"{name} is {side}; for this model it must be a multiple of {multiple}, such as {near}")
    return side
