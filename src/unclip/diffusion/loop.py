"""The sampling loop, and the source of its noise: one generator for a batch, or one for each image."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.diffusion.sampler import Memory, Sampler
from unclip.errors import InputError
from unclip.numbers import several, whole

_SEED_END = 2**64


class NoiseSource:
    """Standard normal noise, drawn in the same order as in the reference.

    One generator draws for the whole batch at once, so a seed gives the reference's picture. A list gives every image
    its own generator, so a picture does not depend on its batch. Noise is drawn on the generator's device and then
    moved; a CPU generator therefore gives the same noise everywhere.

    Args:
        generator: None for torch's global generator, one generator, or a list with one for each image.
        batch_size: number of images, 1 or more.

    Raises:
        InputError: the list's length is not `batch_size`, or an element is not a generator.
    """

    def __init__(self, generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int) -> None:
        if isinstance(generator, Sequence):
            if len(generator) != batch_size:
                raise InputError(f"there are {len(generator)} generators for {batch_size} images; give one for each")
            generator = list(generator)
        each = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in each):
            raise InputError(f"the generator is {generator!r}; it must be a torch.Generator, a list of them, or None")
        self._generator = generator
        self._batch_size = batch_size

    def draw(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """The next noise. It is always float32, so a seed gives the same noise for every dtype of the network.

        Args:
            shape: [batch, ...], with the source's batch size.
            device: the device of the result.
        """
        shape = tuple(shape)
        if isinstance(self._generator, list):
            return torch.cat([_randn((1, *shape[1:]), one, device) for one in self._generator])
        return _randn(shape, self._generator, device)

    def branches(self, count: int) -> "list[NoiseSource]":
        """Further sources, independent of each other. This source does not advance.

        Branch k does not depend on `count`, and a generator in the same state gives the same branches. An image with
        its own generator has its own branches, whatever its batch. For torch's global generator, every branch is that
        generator itself, so drawing from it does advance it.
        """
        if self._generator is None:
            return [self] * count
        if isinstance(self._generator, list):
            each = [_branches(one, count) for one in self._generator]
            return [NoiseSource([own[k] for own in each], self._batch_size) for k in range(count)]
        return [NoiseSource(one, self._batch_size) for one in _branches(self._generator, count)]


def _branches(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators with seeds drawn from a copy of this one."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    seeds = [int(torch.randint(2**63 - 1, (), generator=copy, device=copy.device)) for _ in range(count)]
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def _randn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    if generator is None:
        return torch.randn(shape, device=device, dtype=torch.float32)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(device)


def generators_from_seed(seed: int | Sequence[int], batch_size: int) -> list[torch.Generator]:
    """One CPU generator for each image.

    Args:
        seed: a whole number from 0 to 2^64 - 1: image i takes seed + i (modulo 2^64), so it equals the first image of
            that seed. Or a sequence or array with one such number for each image.
        batch_size: number of images, 1 or more.

    Raises:
        InputError: a seed is not an integer or is outside its limits, or the number of seeds is not that of images.
    """
    given = several(seed)
    if given is not None and len(given) != batch_size:
        raise InputError(f"there are {len(given)} seeds for {batch_size} images; give one seed, or one for each image")
    pairs = [(seed, index) for index in range(batch_size)] if given is None else [(one, 0) for one in given]
    return [torch.Generator().manual_seed(following_seed(*pair)) for pair in pairs]


def following_seed(seed: object, index: int) -> int:
    """seed + index modulo 2^64. Raises: InputError, see `generators_from_seed`."""
    return (whole(seed, "the seed", 0, _SEED_END - 1) + index) % _SEED_END


Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t float32, t) -> the network's raw output; casts x_t to the network's dtype."""

Progress = Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]]
"""Wraps the steps of the loop, as tqdm does."""


@dataclass(frozen=True)
class StepInfo:
    """The argument of a callback after a step.

    Attributes:
        index: the step's index, from 0.
        num_steps: the number of steps of the run.
        t: the timestep that the step started from.
        x: the state after the step, float32.
        x0: the predicted clean sample, float32: a preview.
    """

    index: int
    num_steps: int
    t: int
    x: Tensor
    x0: Tensor


OnStep = Callable[[StepInfo], Tensor | None]
"""Called after every step. It may return a tensor that replaces x, and may raise `Cancelled`."""


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
    """Run the sampler on `x` along `timesteps`, with one call of `denoiser` for each step.

    Noise is drawn after the network's forward, and only where the sampler needs it, as in the reference.
    If a step of a descending path starts above the end of the previous one, the forward process leads up to it
    (RePaint, Lugmayr et al. 2201.09865, section 4.2): one draw of noise without a forward of the network, and the
    sampler's memory is reset. Gradients are not disabled here.

    Args:
        denoiser: (x_t, t) -> output.
        sampler: takes the steps, and holds the process that interprets the outputs.
        timesteps: in the sampler's direction, descending to the clean sample (ascending for an inversion).
        x: the state at the first timestep, [batch, ...]; converted to float32.
        noise: the source of the steps' noise.
        progress: wraps the steps, as tqdm does.
        on_step: called after every step.

    Returns:
        The state after the last step, float32.

    Raises:
        InputError: `timesteps` do not suit the sampler, or a callback returned a value of another shape or a value
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
            x = replaced(x, on_step(StepInfo(index, len(steps), t, x, prediction.x0)))
    return x


def replaced(x: Tensor, replacement: Tensor | None) -> Tensor:
    """The state `x`, or what a callback returned in its place. Raises: InputError for something that cannot be it."""
    if replacement is None or replacement is x:
        return x
    if not isinstance(replacement, Tensor) or replacement.shape != x.shape or replacement.is_meta:
        got = f"{tuple(replacement.shape)}" if isinstance(replacement, Tensor) else type(replacement).__name__
        raise InputError(
            f"on_step returned {got}; it must return None, or a tensor of shape {tuple(x.shape)} with values"
        )
    replacement = replacement.to(device=x.device, dtype=x.dtype)
    # If x was not finite before, the callback is not the cause; the caller reports that.
    if not replacement.isfinite().all() and x.isfinite().all():
        raise InputError(f"on_step returned a tensor with NaN or infinity in {x.dtype}; it must be finite")
    return replacement
