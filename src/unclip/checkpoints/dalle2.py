"""Files of DALLE2-pytorch's and MindEye's priors: safe reading, and the settings that names and shapes tell."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unclip.checkpoints.files import file_size, read_json
from unclip.checkpoints.weights import check_finite, read_header, read_tensors
from unclip.errors import ConfigError, InputError, UnsafeFileError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

ARITHMETICS = ("0.15", "0.16.2", "0.23.1", "0.23.3", "1.4.3", "1.9", "1.10.5")
"""The first versions of DALLE2-pytorch whose networks compute something new; see `models.prior_dalle2.ARITHMETIC`."""
PROJECTS = ("dalle2-pytorch", "mindeye1", "mindeye2")
Project = Literal["dalle2-pytorch", "mindeye1", "mindeye2"]
MARK = "causal_transformer.rel_pos_bias.relative_attention_bias.weight"
"""A weight that every such network has."""

READ_AS_NOTHING = ("packaging.version.", "packaging._structures.", "torch.optim.", "pytorch_warmup.", "numpy.")
"""Classes of objects in trainer files that carry no weights. An inert object takes their place; nothing is imported."""
NOTHING_ELSE = ("collections.defaultdict", "_codecs.encode", "builtins.dict", "__builtin__.dict", "builtins.list")


@dataclass(frozen=True)
class PriorFile:
    """What a file contains.

    Attributes:
        state: the network's tensors by their names below `net.`.
        betas: float32 [timesteps] of the diffusion process; None where the file does not have it.
        version: of DALLE2-pytorch, from the file.
        source: where in the file the network is, such as "ema_model".
    """

    state: dict[str, Tensor]
    betas: Tensor | None
    version: tuple[int, ...] | None
    source: str


class _Inert:
    """Takes the place of an object that is not needed. Creating and filling it runs nothing but this class."""

    def __new__(cls, *contents: Any, **_: Any) -> _Inert:
        made = super().__new__(cls)
        made.contents = list(contents)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.contents: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.contents.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def read_prior_file(path: Path, *, weights: Literal["ema", "online"] = "ema") -> PriorFile:
    """Read a trainer's file (.pth, .pt) or a state dict (.pth, .safetensors); nothing in it is run.

    Args:
        path: the file. Of a pickle, torch's restricted reader takes only tensors, numbers and containers. The version
            of the package, optimizers and schedulers become inert objects; any other object is refused.
        weights: the moving average of a trainer's file, or the weights that were trained. Files with one network have
            only that.

    Raises:
        UnsafeFileError: a pickle with other objects, or in the format before torch 1.6.
        WeightsError: a damaged file, or one without such a prior.
        MissingFileError: the file does not exist.
    """
    if path.suffix == ".safetensors":
        tensors: Any = dict(read_tensors(read_header(path)))
    else:
        tensors = _read_pickle(path)
    networks = dict(_networks(tensors, ""))
    if not networks:
        raise WeightsError(f"{path} has no prior of DALLE2-pytorch or of MindEye: no tensor's name ends with {MARK}")
    is_average = {place: "ema" in place for place in networks}
    wanted = [place for place, average in is_average.items() if average == (weights == "ema")] or list(networks)
    place = min(wanted, key=lambda name: ("online_model" in name, "ema_model." in name, len(name)))
    state = {name: tensor for name, tensor in networks[place].items() if not name.startswith("noise_scheduler.")}
    for name, tensor in state.items():
        check_finite(tensor, name, str(path))
    version = _release(tensors.get("version")) if isinstance(tensors, Mapping) else None
    return PriorFile(state, networks[place].get("noise_scheduler.betas"), version, place.strip("."))


def _read_pickle(path: Path) -> Any:
    import torch

    file_size(path)
    if not zipfile.is_zipfile(path):
        raise UnsafeFileError(
            f"{path} is not in torch's zip format: it is damaged, or of torch before 1.6. Save it again with a newer "
            "torch, or as safetensors"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            refused = [name for name in unsafe if not is_inert(name)]
            if refused:
                raise UnsafeFileError(
                    f"{path} is refused: besides tensors it contains {', '.join(sorted(refused))[:200]}, which could "
                    "run code. Save only the state dict of the prior"
                )
            stand_ins = [(_Inert, name) for name in unsafe]
            with torch.serialization.safe_globals(stand_ins):  # pyright: ignore[reportArgumentType]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnsafeFileError:
        raise
    except Exception as problem:  # the unpickler raises many kinds of errors
        raise UnsafeFileError(
            f"{path} is refused: it is damaged, or contains more than tensors: {str(problem)[:200]}"
        ) from problem


def is_inert(name: str) -> bool:
    """Whether an object of this class in a file is read as an inert one; otherwise the file is refused."""
    return name.startswith(READ_AS_NOTHING) or name in NOTHING_ELSE


def _networks(tensors: Any, place: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place in the file, tensors by their names below `net.`) of every network of such a prior in nested mappings."""
    if not isinstance(tensors, Mapping):
        return
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _networks(value, f"{place}{name}.")
        elif isinstance(name, str) and name.endswith(MARK):
            start = name.removesuffix(MARK)
            outside = start.removesuffix("net.")
            table = {key.removeprefix(start): one for key, one in tensors.items() if str(key).startswith(start)}
            betas = {"noise_scheduler.betas": tensors.get(f"{outside}noise_scheduler.betas")}
            yield f"{place}{outside}", table | {key: one for key, one in betas.items() if one is not None}


def _release(value: Any) -> tuple[int, ...] | None:
    """The release numbers in a version that was read as an inert object, a text, or containers of these."""
    if isinstance(value, str):
        return parse_version(value) if re.match(r"\d+\.\d+", value) else None
    if isinstance(value, tuple) and len(value) >= 2 and all(type(number) is int for number in value):
        return value
    inside: Iterable[Any] = ()
    if isinstance(value, _Inert):
        inside = value.contents
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, tuple | list):
        inside = value
    return next((found for one in inside if (found := _release(one)) is not None), None)


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of a version such as "1.15.6". Raises: InputError for another text."""
    found = re.match(r"\d+(?:\.\d+)+", text)
    if found is None:
        raise InputError(f"the version of the package is {text!r:.50}; it must look like 1.15.6")
    return tuple(int(number) for number in found[0].split("."))


# -- which network -------------------------------------------------------------------------------------------------


def arithmetic_of(names: Iterable[str], version: tuple[int, ...] | None, where: str) -> str:
    """The key of `ARITHMETICS` of a file with these tensors.

    Raises: ConfigError with the question to answer when names and version leave it open, or contradict each other.
    """
    names = set(names)
    if "null_brain_embeds" in names:
        return ARITHMETICS[-1]
    possible = [
        ("0.15",) if any(name.endswith(".gamma") for name in names) else (),
        ("1.9", "1.10.5") if "null_text_encodings" in names else (),
        ("0.23.1", "0.23.3", "1.4.3") if "null_text_embed" in names else (),
        ("0.15", "0.16.2"),
    ]
    choices = next(choice for choice in possible if choice)
    if len(choices) == 1:
        return choices[0]
    if version is None:
        raise ConfigError(
            f"{where} does not state the version of DALLE2-pytorch that it was trained with, and its weights fit those "
            f"from {', '.join(choices)} on, which compute different numbers. Which one was it? Give it with "
            "--package-version (in Python: package_version=)"
        )
    known = [key for key in ARITHMETICS if parse_version(key) <= version] or ["none"]
    # The norms of 0.16.0 and 0.16.1 have the newer name and compute what 0.15 does.
    if known[-1] not in choices:
        stated = ".".join(map(str, version))
        raise ConfigError(
            f"{where}: version {stated} of DALLE2-pytorch has other weights than this file, which fits those from "
            f"{', '.join(choices)} on; correct --package-version (in Python: package_version=)"
        )
    return known[-1]


def network_settings(
    state: Mapping[str, Tensor], *, arithmetic: str, project: Project | None, config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The settings of an `EmbeddingPriorNetwork` with these weights.

    Args:
        state: see `PriorFile`.
        arithmetic: see `arithmetic_of`.
        project: whose code trained it; needed for a grid of tokens.
        config: the content of the package's prior_config.json, or {}.
        where: the file, in messages.

    Raises:
        ConfigError: something cannot be seen in the file, or is not implemented; the message has the question.
        WeightsError: a tensor is missing, or the configuration contradicts the shapes.
    """
    outer = config.get("prior", config)
    net = outer.get("net", {})
    try:
        found = _visible(state)
    except KeyError as problem:
        raise WeightsError(f"{where} is not complete: it lacks {problem}") from problem
    for key, name in _SAME.items():
        if net.get(key) is not None and net[key] != found[name]:
            raise WeightsError(f"{where} has {key} {found[name]}, but the configuration has {net[key]}")
    if net.get("self_cond"):
        raise ConfigError(f"{where} was trained with self_cond, which is not implemented")
    if not any(name.endswith("rotary_emb.freqs") for name in state):
        if "rotary_emb" not in net:
            raise ConfigError(
                f"{where} has no rotary frequencies, which some versions do not save. Was it trained with rotary_emb? "
                'Give a --config file with {"net": {"rotary_emb": true}} or false'
            )
        found["rotary_emb"] = bool(net["rotary_emb"])
    if arithmetic in ("0.23.1", "0.23.3", "1.4.3") and found["num_timesteps"] is None:
        raise ConfigError(
            f"{where} has sinusoidal timesteps, whose features the versions before 1.9 rounded to whole numbers; that "
            "is not implemented"
        )
    is_grid = found["num_tokens"] is not None
    if is_grid:
        if project not in PROJECTS[1:]:
            raise ConfigError(
                f"{where} has a prior on a grid of tokens. Which project trained it? MindEye 1 multiplies embeddings "
                "by √width, MindEye 2 does not, and the file does not tell. Give --project mindeye1 or mindeye2"
            )
        found |= {"causal": bool(net.get("causal", False)), "queries": net.get("learned_query_mode", "pos_emb")}
    elif project in PROJECTS[1:] and outer.get("condition_on_text_encodings"):
        raise ConfigError(f"{where}: MindEye's priors take no text encodings; remove condition_on_text_encodings")
    takes_text = bool(outer.get("condition_on_text_encodings", project not in PROJECTS[1:])) and not is_grid
    width = found["embedding_dim"]
    scale = outer.get("image_embed_scale") or (1.0 if project == "mindeye2" else width**0.5)
    flags = ("sampling_clamp_l2norm", "sampling_final_clamp_l2norm", "init_image_embed_l2norm")
    return {
        **found,
        "arithmetic": arithmetic,
        "use_text_encodings": takes_text,
        "image_embed_scale": float(scale),
        "normalized": not is_grid,
        **{flag: bool(outer.get(flag, False)) for flag in flags},
    }


_SAME = {
    "dim": "embedding_dim",
    "depth": "num_layers",
    "heads": "num_attention_heads",
    "dim_head": "attention_head_dim",
    "num_timesteps": "num_timesteps",
    "num_time_embeds": "num_time_embeds",
    "num_image_embeds": "num_image_embeds",
    "num_text_embeds": "num_text_embeds",
    "norm_in": "norm_in",
    "norm_out": "norm_out",
    "final_proj": "final_proj",
    "normformer": "normformer",
    "num_tokens": "num_tokens",
}
"""Settings of the package that are visible in the weights, and our names."""


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that names and shapes tell. Raises: KeyError for a missing tensor."""
    first = "causal_transformer.layers.0."
    dim = state[f"{first}0.to_q.weight"].shape[1]
    table, network = state.get("to_time_embeds.0.weight"), "to_time_embeds.0.1.net.2.weight"
    time = state[network] if table is None else table
    hidden = state[f"{first}1.5.weight"].shape[1]
    padding = state.get("null_text_encodings", state.get("null_text_embed"))
    grid = state.get("null_brain_embeds")
    layers = {name.split(".")[2] for name in state if name.startswith("causal_transformer.layers.")}

    def count(kind: str) -> int:
        weight = state.get(f"to_{kind}_embeds.0.weight")
        return 1 if weight is None else weight.shape[0] // dim

    return {
        "embedding_dim": dim,
        "num_layers": len(layers),
        "num_attention_heads": state[MARK].shape[1],
        "attention_head_dim": state[f"{first}0.null_kv"].shape[1],
        "feed_forward_dim": hidden,
        "num_tokens": None if grid is None else grid.shape[0],
        "num_text_embeds": count("text"),
        "num_image_embeds": count("image"),
        "num_time_embeds": (time.shape[1] if table is not None else time.shape[0]) // dim,
        "num_timesteps": None if table is None else table.shape[0],
        "max_text_len": 0 if padding is None else padding.shape[1],
        "norm_in": any(name.startswith("causal_transformer.init_norm.") for name in state),
        "norm_out": any(name.startswith("causal_transformer.norm.") for name in state),
        "final_proj": "causal_transformer.project_out.weight" in state,
        "normformer": any(name.startswith(f"{first}1.3.") for name in state),
        "rotary_emb": True,
    }


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the names of the newest version, without those that are computed."""
    kept = {}
    for name, tensor in state.items():
        if name.endswith(("rotary_emb.freqs", ".beta")):
            continue
        new = re.sub(r"\.gamma$", ".g", name)
        kept["null_text_encodings" if new == "null_text_embed" else new] = tensor
    return kept


def read_package_config(path: Path | None) -> dict[str, Any]:
    """The content of a prior_config.json; {} for None. Raises: CheckpointError, ConfigError for another content."""
    if path is None:
        return {}
    config = read_json(path)
    outer = config.get("prior", config)
    if not isinstance(outer, dict) or not isinstance(outer.get("net", {}), dict):
        raise ConfigError(f'{path} must have the settings of the prior, and of the network under "net"')
    return config
