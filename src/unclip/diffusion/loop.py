"""The denoising loop: the only one, for every stage, sampler and direction.

Does not know what is denoised, which sampler steps, or whether guidance is on.
Pipelines call `run`; callbacks, previews, cancellation, progress and noise live here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unclip.diffusion.noise import NoiseSource
from unclip.diffusion.sampler import Memory, Sampler
from unclip.errors import InputError

Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t float32, t) -> the network's raw output; casts to the network's dtype itself."""

Progress = Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]]
"""Wraps what the loop goes over, as tqdm does."""


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after a step.

    Attributes:
        index: of the step, from 0.
        num_steps: of the whole run.
        t: the timestep that the step started from.
        x: the state after the step, float32.
        x0: what the network took the clean sample for, float32: a preview.
    """

    index: int
    num_steps: int
    t: int
    x: Tensor
    x0: Tensor


OnStep = Callable[[StepInfo], Tensor | None]
"""Told of every step; may return a tensor to go on with in place of x, and may raise `Cancelled`."""


def run(
    denoiser: Denoiser,
    sampler: Sampler,
    timesteps: Sequence[int],
    x: Tensor,
    *,
    noise: NoiseSource,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Walk `x` along `timesteps`: one call of `denoiser` a step.

    Noise is drawn after the network's forward, and only where the sampler needs it, which is the reference's order.
    Where `timesteps` descend and yet a step starts above the end of the one before, the way up to it is the forward
    process (RePaint, Lugmayr et al. 2201.09865, section 4.2): no forward of the network, one draw of noise, and the
    sampler's memory starts anew.
    Gradients are the caller's affair: wrap the call in `torch.no_grad()` unless they are wanted.

    Args:
        denoiser: (x_t, t) -> output.
        sampler: takes the steps, and holds the process that reads the outputs.
        timesteps: in the sampler's direction, descending to the clean sample (ascending for an inversion).
        x: the state at the first timestep, [batch, ...]; brought to float32.
        noise: where the steps' noise comes from.
        progress: wraps the steps, as tqdm does.
        on_step: told of every step.

    Returns:
        The state after the last step, float32.

    Raises:
        InputError: `timesteps` is no path for this sampler, or a callback returned something of another shape, or
            that is not finite.
        Cancelled: raised by `on_step`, never by the loop.
    """
    steps = sampler.steps(timesteps)
    x = x.float()
    memory: Memory = None
    reached, goes_down = steps[0][0], timesteps[0] >= timesteps[-1]
    for index, (t, t_next) in enumerate(steps if progress is None else progress(steps)):
        if goes_down and t > reached:
            x, memory = sampler.process.renoise(x, reached, t, noise.draw(x.shape, x.device)), None
        prediction = sampler.process.predict(denoiser(x, t), x, t)
        fresh = noise.draw(x.shape, x.device) if sampler.needs_noise(t, t_next) else None
        x, memory = sampler.step(prediction, x, t, t_next, memory, fresh)
        reached = t_next
        if on_step is not None:
            x = _replaced(x, on_step(StepInfo(index, len(steps), t, x, prediction.x0)))
    return x


def _replaced(x: Tensor, replacement: Tensor | None) -> Tensor:
    if replacement is None or replacement is x:
        return x
    if not isinstance(replacement, Tensor) or replacement.shape != x.shape:
        got = tuple(replacement.shape) if isinstance(replacement, Tensor) else type(replacement).__name__
        raise InputError(f"on_step returned {got}; it must return None, or a tensor of shape {tuple(x.shape)}")
    if replacement.is_meta:
        raise InputError("on_step returned a tensor on the meta device, where tensors have no values")
    replacement = replacement.to(device=x.device, dtype=x.dtype)
    # What was already lost before is not the callback's doing: whoever takes the result says so.
    if not replacement.isfinite().all() and x.isfinite().all():
        raise InputError(f"on_step returned a tensor that holds NaN or infinity in {x.dtype}; it must be finite")
    return replacement
