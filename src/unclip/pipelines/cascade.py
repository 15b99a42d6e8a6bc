"""The cascade of super-resolution: which stages a pipeline has, whether they fit, and the sizes of their pictures.

Knows components' names and configurations; knows not how a stage runs. Called by `generation.py`.
"""

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
"""What must agree: a setting's name and value, and another's name and the value that is wanted."""


@dataclass(frozen=True)
class SuperResParts:
    """One super-resolution stage's components.

    Attributes:
        first: the network of every step but the last.
        last: the network of the last step; a further stage without one has the first here.
        scheduler: how steps are taken.
    """

    first: UNet2DModel
    last: UNet2DModel
    scheduler: Scheduler

    @property
    def multiple(self) -> int:
        """What a picture's sides must be multiples of, for both networks to halve them."""
        return max(_multiple(self.first.config), _multiple(self.last.config))


def parts(components: Mapping[str, Any]) -> dict[str, SuperResParts]:
    """The stages in the order in which they enlarge: "super_res", then "super_res_2" and so on, as far as they go.

    Raises: ConfigError for a stage without its network or its scheduler, or one whose forerunner is not there.
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
            raise ConfigError(f"the components do not fit: {stage} has no {lacking}; give it, or leave the stage out")
        if ended_at:
            raise ConfigError(f"the components do not fit: there is a {stage}, but no {ended_at} before it")
        found[stage] = SuperResParts(first, first if last is None else last, scheduler)
    return found


def fits(decoder: UNet2DConditionConfig, stages: Mapping[str, SuperResParts]) -> list[Fact]:
    """What must agree for super-resolution to go on from the decoder's pictures.

    The first stage may keep their size, and only redraw them; each further one must enlarge.

    Raises: ConfigError for a stage that shrinks, or a network that does not say its size or cannot halve it.
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
        given = "what super-resolution gives its networks"
        facts += [
            (f"{stage}_first.in_channels", first.in_channels, "twice the decoder's", 2 * channels),
            (f"{stage}_last.in_channels", last.in_channels, f"{stage}_first.in_channels", first.in_channels),
            (f"{stage}_last.sample_size", last.sample_size, f"{stage}_first.sample_size", first.sample_size),
            (f"{stage}_first.class_embed_type", first.class_embed_type, given, None),
            (f"{stage}_last.class_embed_type", last.class_embed_type, given, None),
        ]
    return facts


def picture_sizes(
    decoder: UNet2DConditionModel, stages: Mapping[str, SuperResParts], height: int | None, width: int | None
) -> dict[str, Size]:
    """Height and width at "decoder" and at each super-resolution stage, for a result of this height and width.

    A side that is None is the networks' own. Any other must come out whole at every stage, and halve as often as that
    stage's network halves it.

    Raises: InputError, naming the nearest that would do.
    """
    own = _own_sizes(decoder, stages)
    result, multiple = list(own.values())[-1], side_multiple(decoder, stages)
    sides = [_side(name, side, result, multiple) for name, side in (("height", height), ("width", width))]
    return {stage: (sides[0] * size // result, sides[1] * size // result) for stage, size in own.items()}


def side_multiple(decoder: UNet2DConditionModel, stages: Mapping[str, SuperResParts]) -> int:
    """What a result's height and width must be multiples of, unless they are the networks' own."""
    own = _own_sizes(decoder, stages)
    result = list(own.values())[-1]
    multiples = [_multiple(decoder.config), *(part.multiple for part in stages.values())]
    needs = [multiple * result for multiple in multiples]
    return math.lcm(*(need // math.gcd(need, size) for need, size in zip(needs, own.values(), strict=True)))


def fitted_size(own_px: int, multiple: int, picture: Size) -> Size:
    """Height and width in multiples of `multiple`, of about own_px² pixels, as near to a picture's shape as these go.

    The shape is kept within a ratio of 4: what is longer is squashed.
    """
    ratio = min(4.0, max(0.25, picture[1] / picture[0]))
    height, width = own_px / math.sqrt(ratio), own_px * math.sqrt(ratio)
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


def per_stage(value: V | Sequence[V], stages: Sequence[str], name: str) -> dict[str, V]:
    """One value for every stage, or one for each.

    Raises: InputError for another number of values.
    """
    each = several(value)
    if each is None:
        return dict.fromkeys(stages, value)  # type: ignore[arg-type]
    if len(each) != len(stages):
        raise InputError(
            f"{name} has {len(each)} values for {len(stages)} super-resolution stages; give one, or one for each"
        )
    return dict(zip(stages, each, strict=True))


def _multiple(config: UNetConfig) -> int:
    return 2 ** (config.num_levels - 1)


def _own_px(name: str, config: UNetConfig) -> int:
    """The side of the pictures that a network says it makes. Raises: ConfigError unless it can halve it as it does."""
    size, multiple = size_px(config.sample_size), _multiple(config)
    if size % multiple:
        raise ConfigError(
            f"the components do not fit: {name}.sample_size is {size}, but a network of {config.num_levels} levels "
            f"needs a multiple of {multiple}"
        )
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
        raise InputError(f"{name} is {side}; this model's pictures need a multiple of {multiple}, such as {near}")
    return side
