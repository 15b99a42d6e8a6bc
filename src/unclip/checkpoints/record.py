"""How a latent was found, as texts in its file: decoding it needs the same steps, guidance, prompt and tiles.

Knows settings and texts; knows neither latents nor models. Called by whatever writes or reads a latent's file.
"""

import json
from collections.abc import Mapping
from typing import Any

from unclip.checkpoints.recommended import check_recommended
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.numbers import whole

RECORDED = ("decoder_num_inference_steps", "super_res_num_inference_steps", "decoder_guidance_scale")
"""Numbers, by the names of a call's arguments, as JSON."""
TILE = "super_res_tile_px"
"""Side of super-resolution's tiles, as JSON; left out where it saw pictures as a whole."""
PROMPT = "prompt"
"""A caption that the decoder saw too, as it is; left out where it saw none."""


def record_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a latent's file has them; None is left out.

    Raises: InputError for a name that is none of the above, or a value of a wrong type.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    names = (*RECORDED, TILE, PROMPT)
    for name in given:
        if name not in names:
            raise InputError(f"settings have {name!r}; a latent is kept with {', '.join(names)}")
    prompt = given.pop(PROMPT, None)
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"the prompt is {prompt!r:.100}; it must be a text")
    try:
        numbers = _checked(given, "settings")
    except ConfigError as problem:
        raise InputError(str(problem)) from problem
    return {name: json.dumps(value) for name, value in numbers.items()} | ({PROMPT: prompt} if prompt else {})


def read_record(about: Mapping[str, str], where: str) -> dict[str, Any]:
    """The settings among the texts of a latent's file, by the names above; what it does not say is left out.

    Args:
        about: all texts of the file.
        where: how messages call it.

    Raises: CheckpointError for a text that is no number.
    """
    texts = {name: about[name] for name in (*RECORDED, TILE) if name in about}
    try:
        found = _checked({name: json.loads(text) for name, text in texts.items()}, where)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where} says it was inverted with {texts!s:.200}, which are no numbers") from problem
    return found | ({PROMPT: about[PROMPT]} if PROMPT in about else {})


def _checked(numbers: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, as Python's own numbers. Raises: ConfigError for a value of a wrong type."""
    tile = {TILE: whole(numbers[TILE], f"{where}: {TILE}", error=ConfigError)} if TILE in numbers else {}
    return check_recommended({name: value for name, value in numbers.items() if name != TILE}, where) | tile
