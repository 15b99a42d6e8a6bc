"""The table of sampling settings, and the table of samplers.

Call arguments, command-line options, recommended values, sweeps and chart labels are taken from these rows.
This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from unclip.errors import InputError
from unclip.numbers import real, whole

MAX_STEPS = 1000
MAX_SCALE = 1000.0
"""Far above any useful guidance scale; a larger value is a mistake."""
MAX_CANDIDATES = 1000
MAX_TEMPERATURE = 100.0

Number = int | float


@dataclass(frozen=True)
class Setting:
    """One setting of a call.

    Attributes:
        name: the argument of a pipeline's call, and the key in a model's recommended settings.
        option: the command-line option.
        label: the name in charts and tables.
        help: the help text of the option.
        kind: int or float.
        low, high: the limits, both allowed unless `above`.
        default: the value if neither the caller nor the model sets one.
        above: whether a value must lie above `low`.
        per_stage: whether a list with one value for each super-resolution stage is accepted.
        of_prior: whether the setting belongs to the prior.
    """

    name: str
    option: str
    label: str
    help: str
    kind: type[int] | type[float]
    low: Number
    high: Number
    default: Number
    above: bool = False
    per_stage: bool = False
    of_prior: bool = False

    @property
    def limits(self) -> str:
        """The limits in words."""
        return f"{'above' if self.above else 'from'} {self.low:g} to {self.high:g}"

    def check(self, value: object, name: str = "") -> Number:
        """`value` as a plain Python number.

        Args:
            value: anything with `__index__` (an int setting) or `__float__`.
            name: the name in the error message; the argument's name by default.

        Raises: InputError unless it is a number within the limits.
        """
        name = name or self.name
        if self.kind is int:
            return whole(value, name, int(self.low), int(self.high))
        return real(value, name, self.low, self.high, above=self.above)

    def parse(self, text: str) -> Number:
        """A value from its text on the command line. Raises: InputError."""
        try:
            number = self.kind(text)
        except ValueError:
            whole = "a whole number" if self.kind is int else "a number"
            raise InputError(f"{self.option} is {text!r}; it must be {whole} {self.limits}") from None
        return self.check(number, self.option)


def _steps(stage: str, what: str, default: int, *, per_stage: bool = False, of_prior: bool = False) -> Setting:
    return Setting(
        name=f"{stage}_num_inference_steps",
        option=f"--{stage.replace('_', '-')}-steps",
        label=f"{stage.replace('super_res', 'super-resolution')} steps",
        help=f"Denoising steps of {what}.",
        kind=int,
        low=1,
        high=MAX_STEPS,
        default=default,
        per_stage=per_stage,
        of_prior=of_prior,
    )


def _guidance(stage: str, what: str, default: float, *, of_prior: bool = False) -> Setting:
    return Setting(
        name=f"{stage}_guidance_scale",
        option=f"--{stage}-guidance",
        label=f"{stage} guidance",
        help=f"Guidance scale of {what}. 1 or less turns guidance off.",
        kind=float,
        low=0,
        high=MAX_SCALE,
        default=default,
        of_prior=of_prior,
    )


SETTINGS: Mapping[str, Setting] = {
    row.name: row
    for row in (
        _steps("prior", "the prior, which predicts an image embedding from the caption", 25, of_prior=True),
        _steps("decoder", "the decoder, which makes the small picture", 25),
        _steps(
            "super_res", "super-resolution, which enlarges the picture; N,N sets each of its stages", 7, per_stage=True
        ),
        _guidance("prior", "the prior: how strongly it follows the caption", 4.0, of_prior=True),
        _guidance("decoder", "the decoder: how strongly it follows the embedding and the caption", 8.0),
        Setting(
            "num_prior_candidates",
            "--candidates",
            "candidates",
            "Image embeddings that the prior samples for each picture; the one closest to the caption is kept.",
            int,
            1,
            MAX_CANDIDATES,
            1,
            of_prior=True,
        ),
        Setting(
            "prior_temperature",
            "--prior-temperature",
            "temperature",
            "Sampling temperature of an autoregressive prior; 0 takes the likeliest code.",
            float,
            0,
            MAX_TEMPERATURE,
            1.0,
            of_prior=True,
        ),
        Setting(
            "prior_top_p",
            "--prior-top-p",
            "top-p",
            "Nucleus sampling of an autoregressive prior: only the likeliest codes, whose probabilities sum to P.",
            float,
            0,
            1,
            1.0,
            above=True,
            of_prior=True,
        ),
    )
}


@dataclass(frozen=True)
class SamplerRow:
    """One sampler.

    A new sampler needs a row here, and its sampler and scheduler classes in `unclip.diffusion.scheduler`.

    Attributes:
        name: the name on the command line.
        scheduler: the scheduler class, in `unclip.diffusion.scheduler` and in model folders.
        help: the description on the command line.
        equivalents: the classes of diffusers that sample in the same way.
    """

    name: str
    scheduler: str
    help: str
    equivalents: tuple[str, ...]


SAMPLERS: Mapping[str, SamplerRow] = {
    row.name: row
    for row in (
        SamplerRow(
            "ancestral",
            "UnCLIPScheduler",
            "Karlo's",
            ("UnCLIPScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
        ),
        SamplerRow("ddim", "DDIMScheduler", "deterministic", ("DDIMScheduler", "DDIMParallelScheduler")),
        SamplerRow("dpm", "DPMSolverMultistepScheduler", "good with few steps", ("DPMSolverMultistepScheduler",)),
    )
}
