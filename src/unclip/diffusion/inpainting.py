"""Inpainting: a sampler that keeps what is known of the clean sample, and a path that goes up again.

Does not know what the sample shows, what is drawn into the rest, or how the wrapped sampler steps.
Pipelines wrap a scheduler's sampler in `InpaintingSampler`; the loop walks its path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.diffusion.process import DiffusionProcess, Prediction
from unclip.diffusion.sampler import Memory, Sampler
from unclip.errors import InputError
from unclip.numbers import whole

MAX_RESAMPLES = 100


@dataclass(frozen=True)
class InpaintingSampler:
    """Any sampler, with the known part of the sample put back after each of its steps (RePaint, 2201.09865, eq. 8).

    The known part at a timestep is the clean one, noised to that timestep; at the end it is the clean one itself, to
    the bit. The rest is the wrapped sampler's. Both take the same draw of noise: every element is of one part alone,
    so no element's noise is used twice.

    A step that looks at a fresh known part beside what was drawn so far cannot make the two agree at once. So parts of
    the path are walked several times, with the forward process between (section 4.2): `jump_length` steps down, up
    again, `num_resamples` times in all. The last step, to the clean sample, is taken once.

    Args:
        sampler: takes the steps; one that goes down.
        x0: the clean sample, float32 [batch, channels, ...].
        kept: bool, of `x0`'s shape or one that broadcasts to it; true where `x0` is known.
        num_resamples: how often each part of the path is walked, 1 to 100; 1 never goes up.
        jump_length: steps in such a part, 1 or more.

    Raises:
        InputError: a count is outside its limits; `kept` is not bool, or does not broadcast to `x0`.
    """

    sampler: Sampler
    x0: Tensor
    kept: Tensor
    num_resamples: int = 1
    jump_length: int = 1

    def __post_init__(self) -> None:
        for name, value in zip(
            ("num_resamples", "jump_length"), check_resampling(self.num_resamples, self.jump_length), strict=True
        ):
            object.__setattr__(self, name, value)
        if self.kept.dtype != torch.bool:
            raise InputError(f"what is kept is told by bool, not {self.kept.dtype}")
        try:
            fits = torch.broadcast_shapes(self.kept.shape, self.x0.shape) == self.x0.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"what is kept has shape {tuple(self.kept.shape)}, the sample {tuple(self.x0.shape)}: it must broadcast"
            )

    @property
    def process(self) -> DiffusionProcess:
        """The wrapped sampler's."""
        return self.sampler.process

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`; a step that starts above the end of the one before comes after a way up."""
        *down, last = self.sampler.steps(timesteps)
        parts = [down[start : start + self.jump_length] for start in range(0, len(down), self.jump_length)]
        return (*(step for part in parts for step in part * self.num_resamples), last)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Everywhere but into the clean sample."""
        return t_next >= 0

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`."""
        x, memory = self.sampler.step(prediction, x_t, t, t_next, memory, noise)
        if t_next < 0:
            known = self.x0
        elif noise is None:
            raise InputError(f"the step from {t} to {t_next} needs noise for what is kept, and none was given")
        else:
            known = self.process.add_noise(self.x0, noise, t_next)
        return torch.where(self.kept, known, x), memory


def check_resampling(num_resamples: object, jump_length: object) -> tuple[int, int]:
    """Both as ints. Raises: InputError unless they are whole numbers, from 1 to 100 and from 1."""
    return whole(num_resamples, "num_resamples", 1, MAX_RESAMPLES), whole(jump_length, "jump_length")
