"""The ecosystem's face of a process and its samplers: three schedulers by the names and settings people know.

Know no network and no loop; the arithmetic is the samplers', the bookkeeping `scheduler_base`'s.
Pipelines hold one a stage; users exchange them with `from_config`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from unclip.diffusion import settings as _settings
from unclip.diffusion.sampler import AncestralSampler, DDIMSampler, DPMSolverPlusPlus2MSampler
from unclip.diffusion.scheduler_base import Generators, Scheduler, SchedulerOutput
from unclip.errors import ConfigError

__all__ = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UnCLIPScheduler",
    "converted",
    "is_foreign",
]


class UnCLIPScheduler(Scheduler):
    """Karlo's ancestral sampling (Ho et al. 2006.11239 with recomputed betas), timesteps spaced evenly down to 0.

    Args:
        num_train_timesteps: noise levels of the training.
        variance_type: "fixed_small_log", "fixed_small", "fixed_large" or "learned_range".
        clip_sample: whether predicted x0 is clamped to [-clip_sample_range, clip_sample_range].
        clip_sample_range: above 0.
        prediction_type: "epsilon", "sample" or "v_prediction".
        beta_schedule: "squaredcos_cap_v2", "linear" or "scaled_linear".
        beta_start, beta_end: of the linear schedules.
        unused: settings of the ecosystem's schedulers that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

    _foreign: ClassVar[_settings.Neutral] = {
        **_settings.FOREIGN_NEUTRAL,
        "timestep_spacing": ("linspace",),
        "solver_order": (1,),
    }

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        variance_type: str = "fixed_small_log",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
        *,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        **unused: object,
    ) -> None:
        entries = {
            "num_train_timesteps": num_train_timesteps,
            "variance_type": variance_type,
            "clip_sample": clip_sample,
            "clip_sample_range": clip_sample_range,
            "prediction_type": prediction_type,
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        super().__init__(entries, unused)

    def _new_sampler(self) -> AncestralSampler:
        return AncestralSampler(self._process)

    def _next(self, t: int) -> int:
        # The reference goes to the neighbour unless told otherwise; but the end of the path is its end.
        return -1 if t == self._path[-1] else t - 1

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step of a hand-written loop.

        Args:
            model_output: the network's, of sample's shape or, with a learned variance, twice its channels.
            timestep: of `sample`.
            sample: [batch, channels, ...].
            prev_timestep: where to go; None is `timestep` - 1, and clean from the last of `timesteps`.
            generator: for the noise: None, one, or a list of one an image.
            return_dict: False gives a plain tuple.

        Raises:
            InputError: a shape or a timestep is wrong.
        """
        return self._step(self._sampler, model_output, timestep, sample, prev_timestep, generator, return_dict)


class DDIMScheduler(Scheduler):
    """DDIM (Song et al. 2010.02502). Names and defaults are the ecosystem's, with `variance_type` and `eta` added.

    Where x0 is clipped the noise is recomputed from it, which the ecosystem calls `use_clipped_model_output`.

    Args:
        num_train_timesteps: noise levels of the training.
        beta_start, beta_end: of the linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        clip_sample, clip_sample_range: whether and to what predicted x0 is clamped.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_spacing: "leading", "linspace" (Karlo's) or "trailing"; see `spaced_timesteps` of `schedule`.
        variance_type: "learned_range" if the network has learned a variance, which is split off and ignored.
        eta: from 0 (deterministic) to 1 (as noisy as ancestral sampling).
        unused: settings of the ecosystem's class that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

    _neutral: ClassVar[_settings.Neutral] = _settings.NEUTRAL_DDIM
    _foreign: ClassVar[_settings.Neutral] = {**_settings.FOREIGN_NEUTRAL, "solver_order": (1,)}

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        variance_type: str | None = None,
        eta: float = 0.0,
        **unused: object,
    ) -> None:
        entries = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "clip_sample": clip_sample,
            "prediction_type": prediction_type,
            "clip_sample_range": clip_sample_range,
            "timestep_spacing": timestep_spacing,
            "variance_type": variance_type,
            "eta": eta,
        }
        super().__init__(entries, unused)

    def _new_sampler(self) -> DDIMSampler:
        return DDIMSampler(self._process, self.config.eta)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_timestep: int | Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step of a hand-written loop; the order of arguments is the ecosystem's.

        Args:
            model_output: the network's, of sample's shape or, with a learned variance, twice its channels.
            timestep: of `sample`.
            sample: [batch, channels, ...].
            eta: replaces the setting for this step; None keeps it.
            use_clipped_model_output: None or True, as the noise is always consistent with the clipped x0; False only
                where nothing is clipped and it makes no difference.
            generator: for the noise: None, one, or a list of one an image.
            variance_noise: the noise itself, of sample's shape, in place of a generator's.
            return_dict: False gives a plain tuple.
            prev_timestep: where to go; None is the next of `timesteps`.

        Raises:
            InputError: a shape or a timestep is wrong, or noise comes from two sources.
            ConfigError: `eta` is outside 0..1, or `use_clipped_model_output` is False while x0 is clipped.
        """
        if use_clipped_model_output is False and self._process.clip_range is not None:
            raise ConfigError(
                "use_clipped_model_output=False is not implemented where clip_sample is on: leave it out, "
                "or make the scheduler with clip_sample=False"
            )
        sampler = self._sampler if eta is None else DDIMSampler(self._process, eta)
        return self._step(
            sampler, model_output, timestep, sample, prev_timestep, generator, return_dict, noise=variance_noise
        )


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ (Lu et al. 2211.01095), multistep, predicting x0, deterministic.

    Names and defaults are the ecosystem's, with clipping added (off by default). Its timesteps leave out 0 for
    "linspace" and "leading", where the step down to it would be a long one for this solver.

    Args:
        num_train_timesteps: noise levels of the training.
        beta_start, beta_end: of the linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        solver_order: 1 or 2.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_spacing: "linspace", "leading" or "trailing"; see `spaced_timesteps` of `schedule`.
        variance_type: "learned_range" if the network has learned a variance, which is split off and ignored.
        clip_sample, clip_sample_range: whether and to what predicted x0 is clamped.
        unused: settings of the ecosystem's class that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

    _neutral: ClassVar[_settings.Neutral] = _settings.NEUTRAL_DPM_SOLVER
    _foreign: ClassVar[_settings.Neutral] = {**_settings.FOREIGN_NEUTRAL, "eta": (0, 0.0)}
    _includes_zero: ClassVar[bool] = False

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        **unused: object,
    ) -> None:
        entries = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "solver_order": solver_order,
            "prediction_type": prediction_type,
            "timestep_spacing": timestep_spacing,
            "variance_type": variance_type,
            "clip_sample": clip_sample,
            "clip_sample_range": clip_sample_range,
        }
        super().__init__(entries, unused)

    def _new_sampler(self) -> DPMSolverPlusPlus2MSampler:
        return DPMSolverPlusPlus2MSampler(self._process, self.config.solver_order)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        prev_timestep: int | Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """As `DDIMScheduler.step`; `generator` and `variance_noise` play no part, as the solver is deterministic."""
        return self._step(self._sampler, model_output, timestep, sample, prev_timestep, None, return_dict)


FOREIGN: dict[str, type[Scheduler]] = {
    "DDIMParallelScheduler": DDIMScheduler,
    "DDIMScheduler": DDIMScheduler,
    "DDPMParallelScheduler": UnCLIPScheduler,
    "DDPMScheduler": UnCLIPScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "UnCLIPScheduler": UnCLIPScheduler,
}
"""The ecosystem's classes by name, and what samples as they do."""


def is_foreign(value: object) -> bool:
    """Whether it is a scheduler of the ecosystem's."""
    ours = type(value).__module__.partition(".")[0] != "diffusers"
    return not ours and hasattr(value, "set_timesteps") and isinstance(getattr(value, "config", None), Mapping)


def converted(scheduler: Any, replaced: Scheduler | None = None) -> Scheduler:
    """A scheduler that samples as one of the ecosystem's does.

    One that was built by `from_config` from a scheduler of unclip keeps its even spacing of timesteps and its kind of
    variance, as unclip's own `from_config` does. Where x0 is clipped the noise is recomputed from it.

    Args:
        scheduler: see `is_foreign`.
        replaced: the scheduler in whose place it comes; says the kind of variance where the ecosystem's class does not.

    Raises: ConfigError for a class that unclip has no sampler for, or a setting that it does not implement.
    """
    name, config = type(scheduler).__name__, scheduler.config
    settings = {**config, "_class_name": name}
    defaults = config.get("_use_default_values", ())
    if settings.get("variance_type") is None:
        settings["variance_type"] = None if replaced is None else replaced.config["variance_type"]
    elif "_class_name" in config and "timestep_spacing" in defaults and "variance_type" not in defaults:
        settings["timestep_spacing"] = "linspace"
    cls, spacing = FOREIGN.get(name), settings.get("timestep_spacing", "linspace")
    if cls is None:
        raise ConfigError(f"unclip does not have the sampler of diffusers' {name}")
    if name.startswith("DDPM") and spacing != "linspace":
        if not str(settings["variance_type"]).startswith("fixed_small"):
            raise ConfigError(f"unclip does not implement timestep_spacing={spacing!r} of diffusers' {name}")
        cls, settings["eta"] = DDIMScheduler, 1.0  # the same step (2010.02502, section 4.1), for any timesteps
    return cls.from_config(settings)
