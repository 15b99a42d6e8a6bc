"""Converts priors of DALLE2-pytorch and MindEye to folders that `EmbeddingPrior` reads."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unclip.checkpoints.dalle2 import (
    Project,
    arithmetic_of,
    network_settings,
    parse_version,
    read_package_config,
    read_prior_file,
    renamed,
)
from unclip.checkpoints.files import atomic_folder
from unclip.diffusion.schedule import tables
from unclip.diffusion.scheduler import UnCLIPScheduler
from unclip.errors import ConfigError, WeightsError
from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
from unclip.pipelines.embedding_prior import EmbeddingPrior

SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "quadratic": "scaled_linear"}
"""The package's schedules of noise, by our names. The betas of the last two depend on the number of timesteps."""


def convert_dalle2_prior(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    package_version: str | None = None,
    project: Project | None = None,
    config: str | os.PathLike[str] | None = None,
    weights: Literal["ema", "online"] = "ema",
    overwrite: bool = False,
) -> Path:
    """Write the folder `out`, which `EmbeddingPrior` reads, from a file of DALLE2-pytorch or MindEye; return `out`.

    Args:
        file: a trainer's file or a state dict (.pth, .pt, .safetensors); see `checkpoints.dalle2.read_prior_file`.
        package_version: the version of DALLE2-pytorch with which it was trained, such as "1.15.6"; by default the one
            that the file states.
        project: "mindeye1" or "mindeye2" for their priors; needed for grids of tokens.
        config: the package's prior_config.json, which states what weights do not: what is predicted, clamping, the
            scale of the embeddings, the use of text encodings. Without it, these are the package's defaults.
        weights: "ema" or "online", of a trainer's file.
        overwrite: replace an existing `out`.

    Raises:
        ConfigError: something is not visible in the file, or not implemented; the message has the question to answer.
        UnsafeFileError, WeightsError, MissingFileError, OutputExistsError: `out` is then unchanged.
    """
    path, stated = Path(file), read_package_config(None if config is None else Path(config))
    found = read_prior_file(path, weights=weights)
    version = found.version if package_version is None else parse_version(package_version)
    arithmetic = arithmetic_of(found.state, version, str(path))
    settings = network_settings(found.state, arithmetic=arithmetic, project=project, config=stated, where=str(path))
    outer = stated.get("prior", stated)
    scheduler = UnCLIPScheduler(**_process(found.betas, settings, outer, str(path)))
    with torch.device("meta"):
        network = EmbeddingPriorNetwork(settings)
    _fill(network, renamed(found.state), str(path))
    with atomic_folder(out, overwrite=overwrite) as draft:
        EmbeddingPrior(network, scheduler).save_pretrained(draft)
    return Path(out)


def _fill(network: EmbeddingPriorNetwork, state: dict[str, Tensor], where: str) -> None:
    """Assign the weights. Raises: WeightsError for missing or unknown ones, or other shapes."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    for words, names in (("lacks", wanted.keys() - given.keys()), ("has the unknown", given.keys() - wanted.keys())):
        if names:
            raise WeightsError(f"{where} {words} {', '.join(sorted(names))[:200]}")
    for name, shape in wanted.items():
        if given[name] != shape:
            raise WeightsError(f"{name} in {where} is {tuple(given[name])}; its network needs {tuple(shape)}")
    network.load_state_dict(state, assign=True)


def _process(betas: Tensor | None, settings: dict[str, Any], outer: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of the scheduler. Raises: ConfigError for a schedule that is not known or not implemented."""
    count = outer.get("timesteps") or settings["num_timesteps"] if betas is None else len(betas)
    if count is None:
        raise ConfigError(f'{where} does not state its timesteps: give a --config file with {{"timesteps": 1000}}')
    scale = 1000 / count  # the package's, for its linear schedules
    made = {
        name: {"beta_schedule": ours} | ({} if name == "cosine" else _ends(scale)) for name, ours in SCHEDULES.items()
    }
    if betas is None:
        name = outer.get("beta_schedule") or "cosine"
    else:
        name = next((name for name, row in made.items() if _is_schedule(betas, row)), None)
    if name not in made:
        raise ConfigError(f"{where} has a schedule of noise that is not implemented; supported: {', '.join(SCHEDULES)}")
    kind = "sample" if outer.get("predict_x_start", True) else "epsilon"
    return {
        "num_train_timesteps": count,
        "prediction_type": "v_prediction" if outer.get("predict_v") else kind,
        "clip_sample": not outer.get("predict_x_start", True),
        **made[name],
    }


def _ends(scale: float) -> dict[str, float]:
    return {"beta_start": scale * 0.0001, "beta_end": min(scale * 0.02, 0.999)}


def _is_schedule(betas: Tensor, row: dict[str, Any]) -> bool:
    own = tables(len(betas), row["beta_schedule"], row.get("beta_start", 0.0001), row.get("beta_end", 0.02)).betas
    return bool(torch.allclose(betas.double(), torch.as_tensor(own).double(), rtol=1e-4, atol=1e-6))
