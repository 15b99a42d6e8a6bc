"""The table of sampling settings, and the table of samplers.

Call arguments, command-line options, recommended values, sweeps and chart labels are taken from these rows.
This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
        default: the value if neither the caller nor the model sets one. Its type is that of all values.
        low, high: the limits, both allowed unless `above`.
        help: the help text of the option.
        above: whether a value must lie above `low`.
        per_stage: whether a list with one value for each super-resolution stage is accepted.
    """

    name: str
    option: str
    label: str
    default: Number
    low: Number
    high: Number
    help: str
    above: bool = False
    per_stage: bool = False

    @property
    def kind(self) -> type[int] | type[float]:
        """The type of the values."""
        return type(self.default)

    @property
    def of_prior(self) -> bool:
        """Whether the setting belongs to the prior."""
        return "prior" in self.name

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
            value: object = self.kind(text)
        except ValueError:
            value = text
        return self.check(value, self.option)


_OFF = "1 or less turns guidance off."
# fmt: off
_ROWS = (
    Setting("prior_num_inference_steps", "--prior-steps", "prior steps", 25, 1, MAX_STEPS,
            "Denoising steps of the prior, which predicts an image embedding from the caption."),
    Setting("decoder_num_inference_steps", "--decoder-steps", "decoder steps", 25, 1, MAX_STEPS,
            "Denoising steps of the decoder, which makes the small picture."),
    Setting("super_res_num_inference_steps", "--super-res-steps", "super-resolution steps", 7, 1, MAX_STEPS,
            "Denoising steps of super-resolution, which enlarges the picture; N,N sets each of its stages.",
            per_stage=True),
    Setting("prior_guidance_scale", "--prior-guidance", "prior guidance", 4.0, 0, MAX_SCALE,
            f"Guidance scale of the prior: how strongly it follows the caption. {_OFF}"),
    Setting("decoder_guidance_scale", "--decoder-guidance", "decoder guidance", 8.0, 0, MAX_SCALE,
            f"Guidance scale of the decoder: how strongly it follows the embedding and the caption. {_OFF}"),
    Setting("num_prior_candidates", "--candidates", "candidates", 1, 1, MAX_CANDIDATES,
            "Number of image embeddings to sample for each picture; the one closest to the caption is kept."),
    Setting("prior_temperature", "--prior-temperature", "temperature", 1.0, 0, MAX_TEMPERATURE,
            "Sampling temperature of an autoregressive prior; 0 always takes the likeliest code."),
    Setting("prior_top_p", "--prior-top-p", "top-p", 1.0, 0, 1,
            "Nucleus sampling of an autoregressive prior: only from the likeliest codes, whose probabilities sum to P.",
            above=True),
    Setting("noise_level", "--noise-level", "noise level", 0, 0, 999,
            "Noise that is added to the image embedding, from 0 (none) to 999: how far results may differ from it."),
    Setting("decoder_guidance_low", "--decoder-guidance-low", "lowest guided noise", 0.0, 0, 1,
            "The decoder is guided only in steps with this much noise or more, from 0 (none) to 1 (pure noise). Steps "
            "without guidance take half of the time."),
    Setting("decoder_guidance_high", "--decoder-guidance-high", "highest guided noise", 1.0, 0, 1,
            "The decoder is guided only in steps with this much noise or less, from 0 (none) to 1 (pure noise)."),
    Setting("decoder_reuse", "--decoder-reuse", "decoder reuse", 1, 1, MAX_STEPS,
            "The decoder computes its deep layers in every N-th step and reuses them in between; 1 is exact."),
    Setting("super_res_reuse", "--super-res-reuse", "super-resolution reuse", 1, 1, MAX_STEPS,
            "As --decoder-reuse, for super-resolution. It has no effect with tiles."),
)
# fmt: on
SETTINGS: Mapping[str, Setting] = {row.name: row for row in _ROWS}


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


_ANCESTRAL = ("UnCLIPScheduler", "DDPMScheduler", "DDPMParallelScheduler")
_SAMPLERS = (
    SamplerRow("ancestral", "UnCLIPScheduler", "Karlo's", _ANCESTRAL),
    SamplerRow("ddim", "DDIMScheduler", "deterministic", ("DDIMScheduler", "DDIMParallelScheduler")),
    SamplerRow("dpm", "DPMSolverMultistepScheduler", "good with few steps", ("DPMSolverMultistepScheduler",)),
)
SAMPLERS: Mapping[str, SamplerRow] = {row.name: row for row in _SAMPLERS}
