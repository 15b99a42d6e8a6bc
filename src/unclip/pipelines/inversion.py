"""One stage, or a whole cascade, run backwards: from pictures to the noise that leads to them (paper §3).

Knows stages, schedulers' timesteps and a pipeline's bars and hooks; knows not what the noise is for. Called by
`manipulation.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.diffusion.noise import NoiseSource
from unclip.images import to_square
from unclip.pipelines.arguments import Callback, on_step
from unclip.pipelines.generation import Call, GenerationPipeline, StageRun
from unclip.pipelines.pipeline import stage_words
from unclip.stages.condition import SuperResCondition
from unclip.stages.stage import Stage, invert
from unclip.stages.super_res import SuperResStage


def inverted(
    pipe: GenerationPipeline,
    name: str,
    stage: Stage,
    condition: Any,
    null: Any,
    pictures: Sequence[Image.Image],
    run: StageRun,
    *,
    num_rounds: int,
    callback: Callback | None,
) -> Tensor:
    """x_T of one stage for pictures, which are brought to its size: float32 [batch, channels, size, size].

    Args:
        pipe: has the stage's scheduler, by its name.
        name: the stage's.
        stage, condition, null, num_rounds: as of `unclip.stages.stage.invert`.
        pictures: one for each row of the condition.
        run: steps and guidance.
        callback: as of a pipeline's call.

    Raises: NonFiniteError when it is NaN or infinity.
    """
    size = stage.sample_shape(condition)[-1]
    timesteps = getattr(pipe, f"{name}_scheduler").spaced_timesteps(run.num_steps)
    try:
        x_T = invert(
            stage,
            condition,
            torch.stack([to_square(picture, size) for picture in pictures]),
            timesteps=timesteps,
            num_rounds=num_rounds,
            null=null,
            guidance_scale=run.guidance_scale,
            progress=pipe.progress(name),
            on_step=on_step(pipe, name, callback),
        )
    finally:
        pipe.maybe_free_model_hooks()
    pipe._check_finite({f"{stage_words(name)}'s noise": x_T})
    return x_T


def inverted_super_res(
    pipe: GenerationPipeline,
    pictures: Sequence[Image.Image],
    small: Tensor,
    runs: Mapping[str, StageRun],
    *,
    num_rounds: int,
    callback: Callback | None,
) -> list[Tensor]:
    """x_T of every super-resolution stage, on the CPU; each starts from the picture that the stage before makes.

    Args:
        pipe: samples by DDIM without noise.
        pictures, num_rounds, callback: as of `inverted`.
        small: what the decoder makes, [batch, 3, size, size] in [-1, 1].
        runs: steps of each stage, by its name.
    """
    found: list[Tensor] = []
    picture, stages, call = small, pipe.cascade, Call(NoiseSource(None, len(pictures)), None)
    for name, part in stages.items():
        stage = SuperResStage(part.first, part.last, part.scheduler.process, tiling=pipe._tiling)
        below, told = SuperResCondition(picture), {"num_rounds": num_rounds, "callback": callback}
        x_T = inverted(pipe, name, stage, below, None, pictures, runs[name], **told)  # type: ignore[arg-type]
        found.append(x_T.cpu())
        if len(found) < len(stages):
            picture = pipe._run(name, stage, below, None, replace(runs[name], latents=x_T), call)
    return found
