"""Schedulers with the interface of diffusers: settings, files, timesteps, and steps of hand-written loops.

Pipelines use only the immutable parts of a scheduler: the process, the sampler and the timesteps.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from unclip.checkpoints.files import output_folder, read_json, safe_join, write_json
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.loading_arguments import accepted_arguments
from unclip.diffusion import scheduler_config as _settings
from unclip.diffusion.loop import NoiseSource
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import AncestralSampler, DDIMSampler, Memory, Sampler
from unclip.diffusion.schedule import spaced_timesteps
from unclip.diffusion.scheduler_config import SchedulerConfig
from unclip.errors import ConfigError, InputError
from unclip.limits import Range, check, check_fields
from unclip.numbers import plain, whole

__all__ = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UnCLIPScheduler"]
"""The scheduler of each row of `settings.SAMPLERS`, and DDPMScheduler, which has the sampler of UnCLIPScheduler."""

CONFIG_NAME = "scheduler_config.json"

Generators = torch.Generator | Sequence[torch.Generator] | None


class SchedulerOutput(NamedTuple):
    """A step's result.

    Attributes:
        prev_sample: the sample at the next, less noisy timestep, in the dtype of the one before.
        pred_original_sample: the predicted clean sample, float32.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler(ABC):
    """Base class of the schedulers.

    Pipelines use `process`, `spaced_timesteps` and `sampler`, which never change.

    Attributes:
        config: the settings, read-only, as a mapping and as attributes.
        timesteps: LongTensor, descending; every timestep before `set_timesteps` is called.
        num_inference_steps: the argument of the last `set_timesteps`; None before.
    """

    order: ClassVar[int] = 1
    init_noise_sigma: ClassVar[float] = 1.0
    _neutral: ClassVar[_settings.Neutral] = _settings.NEUTRAL_EVERYWHERE
    _foreign: ClassVar[_settings.Neutral] = _settings.FOREIGN_NEUTRAL
    _includes_zero: ClassVar[bool] = True

    def _configure(self, given: Mapping[str, Any]) -> None:
        """Take the arguments of a subclass's `__init__`, which are its `locals()`."""
        name = type(self).__name__
        _settings.check_neutral(name, self._neutral, given["unused"])
        settings = {key: plain(value) for key, value in given.items() if key not in ("self", "unused")}
        for key, value in settings.items():
            check(value, _settings.KINDS[key], key)
        self._config = SchedulerConfig({"_class_name": name, **settings})
        self._process = DiffusionProcess(
            num_timesteps=settings["num_train_timesteps"],
            beta_schedule=settings["beta_schedule"],
            beta_start=settings["beta_start"],
            beta_end=settings["beta_end"],
            prediction_type=settings["prediction_type"],
            variance_type=settings["variance_type"] or "fixed_small_log",
            clip_range=settings["clip_sample_range"] if settings["clip_sample"] else None,
            threshold_ratio=settings["dynamic_thresholding_ratio"] if settings.get("thresholding") else None,
            threshold_max=settings.get("sample_max_value", 1.0),
        )
        self._sampler = self._new_sampler()
        self.num_inference_steps: int | None = None
        self._take_path(tuple(range(self._process.num_timesteps - 1, -1, -1)), None)

    @abstractmethod
    def _new_sampler(self) -> Sampler:
        """The sampler that the settings describe."""

    def _take_path(self, path: tuple[int, ...], device: torch.device | str | None) -> None:
        self._path = path
        self._timesteps = torch.tensor(path, dtype=torch.long, device=device)
        self._last: tuple[int, Memory] | None = None  # the end of the last step, and the sampler's memory

    # ---- the immutable part, which pipelines use ----

    @property
    def config(self) -> SchedulerConfig:
        """The settings."""
        return self._config

    @property
    def process(self) -> DiffusionProcess:
        """The process that the settings describe."""
        return self._process

    def sampler(self) -> Sampler:
        """The immutable sampler that the settings describe."""
        return self._sampler

    def spaced_timesteps(self, num_steps: int) -> tuple[int, ...]:
        """The timesteps for `num_steps` steps, descending, spaced as the settings say.

        Raises:
            InputError: `num_steps` is not an integer from 1 to num_train_timesteps.
        """
        return spaced_timesteps(
            self._process.num_timesteps,
            num_steps,
            self._config.get("timestep_spacing", "linspace"),
            includes_zero=self._includes_zero,
            offset=self._config.get("steps_offset", 0),
        )

    def __len__(self) -> int:
        return self._process.num_timesteps

    def __repr__(self) -> str:
        entries = ", ".join(f"{key}={value!r}" for key, value in self._config.items() if not key.startswith("_"))
        return f"{type(self).__name__}({entries})"

    # ---- hand-written loops ----

    @property
    def timesteps(self) -> Tensor:
        """See the class."""
        return self._timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, on `device`, and reset the memory of previous steps.

        Raises:
            InputError: `num_inference_steps` is not an integer from 1 to num_train_timesteps.
        """
        path = self.spaced_timesteps(num_inference_steps)
        self.num_inference_steps = len(path)
        self._take_path(path, device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` unchanged: these processes preserve the variance, so no scaling is needed."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """`DiffusionProcess.add_noise` in the samples' dtype; `timesteps` int64 of shape [batch], [1] or []."""
        if isinstance(timesteps, Tensor) and timesteps.ndim == 0:
            timesteps = timesteps[None]
        return self._process.add_noise(original_samples, noise, timesteps).to(original_samples.dtype)

    def _next(self, t: int) -> int:
        """The default next timestep after `t`."""
        if t not in self._path:
            raise InputError(f"timestep {t} is not one of the scheduler's timesteps; pass prev_timestep with it")
        place = self._path.index(t) + 1
        return self._path[place] if place < len(self._path) else -1

    def _step(
        self,
        sampler: Sampler,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None,
        generator: Generators,
        return_dict: bool,
        noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        count = self._process.num_timesteps
        t = whole(timestep, "the timestep", 0, count - 1)
        if prev_timestep is None:
            t_next = self._next(t)
        else:  # loops written for diffusers end at any number below 0
            t_next = max(whole(prev_timestep, "prev_timestep", -count, count - 1), -1)
        prediction = self._process.predict(model_output, sample, t)
        if noise is not None:
            if not isinstance(noise, Tensor) or noise.shape != sample.shape or not noise.is_floating_point():
                raise InputError(
                    f"variance_noise must be floating-point and have the sample's shape {tuple(sample.shape)}"
                )
            if generator is not None:
                raise InputError("generator and variance_noise are both given; pass one of them")
            noise = noise.to(sample.device)
        elif sampler.needs_noise(t, t_next):
            noise = NoiseSource(generator, sample.shape[0]).draw(sample.shape, sample.device)
        # A step that does not continue from the previous one starts a new run.
        memory = self._last[1] if self._last is not None and self._last[0] == t else None
        x, memory = sampler.step(prediction, sample, t, t_next, memory, noise)
        self._last = (t_next, memory)
        output = SchedulerOutput(x.to(sample.dtype), prediction.x0)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    # ---- settings and files ----

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler with the settings of `config`, which may be another scheduler's.

        The process is kept: schedule, prediction type, variance and clipping. Where `config` leaves them out, they are
        the defaults of its own class, which "_class_name" names; without a name, settings that only UnCLIPScheduler
        has identify it. Karlo's even spacing of timesteps is kept too. Sampling settings of other schedulers are
        ignored, as are names that begin with "_".

        Args:
            config: a scheduler's `config`, or the content of a scheduler_config.json.
            overrides: settings of this class that replace those of `config`.

        Raises:
            ConfigError: a setting is unknown, not implemented, or outside its limits; or an override is a sampling
                setting of another scheduler.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"the configuration is {type(config).__name__}; pass a scheduler's config, or a dict")
        known = {*cls._defaults(), *cls._neutral}
        more = {name: value for name, value in overrides.items() if name not in known}
        _settings.check_neutral(cls.__name__, cls._foreign, more)
        inherited: dict[str, object] = {}
        source = SCHEDULERS.get("UnCLIPScheduler" if _settings.is_unclip(config) else str(config.get("_class_name")))
        if source is not None and source is not cls:
            defaults = source._defaults()
            kept = (*_settings.PROCESS_SETTINGS, *_settings.THRESHOLD_SETTINGS)
            inherited = {name: defaults[name] for name in kept if name in defaults}
            inherited["timestep_spacing"] = defaults.get("timestep_spacing", "linspace")
        given = {**inherited, **config, **overrides}
        if given.get("variance_type", ...) is None:
            del given["variance_type"]  # from a scheduler that does not use it
        for name in given:
            if name not in known | _settings.ELSEWHERE and not name.startswith("_"):
                raise ConfigError(f"no scheduler has the setting {name!r}; remove it")
        return cls(**{name: value for name, value in given.items() if name in known})

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {one.name: one.default for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD}

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Create a scheduler from scheduler_config.json in a folder, or in a repository on the hub.

        Args:
            name_or_folder: a folder, or a repository's name.
            subfolder: the scheduler's folder inside it, for example "decoder_scheduler".
            revision, cache_dir, local_files_only, token: where and how to look on the hub.
            overrides: settings that replace those of the file; other arguments of diffusers are ignored with one
                warning, or refused.

        Raises:
            InputError: an argument is refused.
            CheckpointError: the file is missing or cannot be read.
            ConfigError: see `from_config`.
        """
        overrides = accepted_arguments(overrides, cls.from_pretrained, None)
        file = CONFIG_NAME if subfolder is None else f"{subfolder}/{CONFIG_NAME}"
        folder = resolve(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[file],
        )
        return cls.from_config(read_json(safe_join(folder, file), allow_infinity=True), **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write scheduler_config.json into `folder`, which is created if it does not exist.

        Raises:
            InputError, OutputExistsError: `folder` is not a possible name, or is a file.
        """
        folder = output_folder(folder)
        entries = dict(self._config)
        if self._process.beta_schedule == "squaredcos_cap_v2":
            del entries["beta_start"], entries["beta_end"]  # not used; Karlo's files do not have them
        write_json(folder / CONFIG_NAME, entries)


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
        unused: settings of diffusers' class that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

    _neutral: ClassVar[_settings.Neutral] = _settings.NEUTRAL_UNCLIP
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
        self._configure(locals())

    def _new_sampler(self) -> AncestralSampler:
        return AncestralSampler(self._process)

    def _next(self, t: int) -> int:
        # As in Karlo, the default is the neighbour; after the last timestep comes the clean sample.
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
            model_output: the network's output, of sample's shape or, with a learned variance, with twice its channels.
            timestep: of `sample`.
            sample: [batch, channels, ...].
            prev_timestep: the next timestep; by default `timestep` - 1, or the clean sample after the last timestep.
            generator: for the noise: None, one generator, or a list with one for each image.
            return_dict: False gives a plain tuple.

        Raises:
            InputError: a shape or a timestep is wrong.
        """
        return self._step(self._sampler, model_output, timestep, sample, prev_timestep, generator, return_dict)


class DDPMScheduler(Scheduler):
    """Ancestral sampling (Ho et al. 2006.11239) with the names, defaults and files of diffusers' DDPMScheduler.

    It samples as `UnCLIPScheduler` does, for timesteps of any spacing. Kandinsky 2.2's folders contain it.

    Args:
        num_train_timesteps: noise levels of the training.
        beta_start, beta_end: of the linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        variance_type: "fixed_small", "fixed_small_log", "fixed_large" or "learned_range".
        clip_sample, clip_sample_range: whether predicted x0 is clamped, and to which range.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding in place of clamping; see
            `threshold_ratio` and `threshold_max` of `DiffusionProcess`.
        timestep_spacing: "leading", "linspace" or "trailing"; see `spaced_timesteps` of `schedule`.
        unused: settings of diffusers' class that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

    _neutral: ClassVar[_settings.Neutral] = _settings.NEUTRAL_DDPM
    _foreign: ClassVar[_settings.Neutral] = {**_settings.FOREIGN_NEUTRAL, "eta": (1, 1.0), "solver_order": (1,)}

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        **unused: object,
    ) -> None:
        self._configure(locals())

    def _new_sampler(self) -> AncestralSampler:
        return AncestralSampler(self._process)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        prev_timestep: int | Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """As `UnCLIPScheduler.step`; the next timestep is by default the next of `timesteps`."""
        return self._step(self._sampler, model_output, timestep, sample, prev_timestep, generator, return_dict)


class DDIMScheduler(Scheduler):
    """DDIM (Song et al. 2010.02502). Names and defaults are those of diffusers, with `variance_type` and `eta` added.

    Where x0 is clipped, the noise is recomputed from it, which diffusers calls `use_clipped_model_output`.

    Args:
        num_train_timesteps: noise levels of the training.
        beta_start, beta_end: of the linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        clip_sample, clip_sample_range: whether predicted x0 is clamped, and to which range.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_spacing: "leading", "linspace" (Karlo's) or "trailing"; see `spaced_timesteps` of `schedule`.
        steps_offset: is added to the timesteps of "leading".
        set_alpha_to_one: whether the last step leads to the clean sample, or to the noise level of timestep 0.
        thresholding, dynamic_thresholding_ratio, sample_max_value: as in `DDPMScheduler`.
        variance_type: "learned_range" if the network predicts a variance, which is split off and ignored.
        eta: from 0 (deterministic) to 1 (as noisy as ancestral sampling).
        unused: settings of diffusers' class that unclip does not implement, at their neutral values.

    Raises:
        ConfigError: a setting is unknown, not implemented, or outside its limits.
    """

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
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        eta: float = 0.0,
        **unused: object,
    ) -> None:
        self._configure(locals())

    def _new_sampler(self) -> DDIMSampler:
        return DDIMSampler(self._process, self.config.eta, self.config.set_alpha_to_one)

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
        """One step of a hand-written loop; the order of arguments is that of diffusers.

        Args:
            model_output: the network's output, of sample's shape or, with a learned variance, with twice its channels.
            timestep: of `sample`.
            sample: [batch, channels, ...].
            eta: replaces the setting for this step; None keeps it.
            use_clipped_model_output: None or True, as the noise is always consistent with the clipped x0; False is
                accepted only where nothing is clipped.
            generator: for the noise: None, one generator, or a list with one for each image.
            variance_noise: the noise itself, of sample's shape, instead of a generator.
            return_dict: False gives a plain tuple.
            prev_timestep: the next timestep; by default the next of `timesteps`.

        Raises:
            InputError: a shape or a timestep is wrong, or noise comes from two sources.
            ConfigError: `eta` is outside 0..1, or `use_clipped_model_output` is False while x0 is clipped.
        """
        if use_clipped_model_output is False and self._process.bounds:
            raise ConfigError(
                "use_clipped_model_output=False is not implemented with clip_sample: leave it out, "
                "or create the scheduler with clip_sample=False"
            )
        sampler = self._sampler if eta is None else DDIMSampler(self._process, eta, self.config.set_alpha_to_one)
        return self._step(
            sampler, model_output, timestep, sample, prev_timestep, generator, return_dict, noise=variance_noise
        )


@dataclass(frozen=True)
class _LastPrediction:
    """Memory of `DPMSolverPlusPlus2MSampler`: the prediction of the previous step."""

    x0: Tensor
    half_log_snr: float


@dataclass(frozen=True)
class DPMSolverPlusPlus2MSampler(Sampler):
    """DPM-Solver++(2M), deterministic, predicting x0 (Lu et al. 2211.01095, algorithm 2).

    The first step is first order, since it has no previous step. The last step, to the clean sample, gives x0. The
    solver is most accurate on timesteps that leave out 0, because the step down to 0 is long in log-SNR.

    Args:
        process: its variance type has no effect; a learned variance is split off and ignored.
        order: 2; or 1, which is DDIM.

    Raises:
        ConfigError: `order` is neither.
    """

    order: Annotated[int, Range(1, 2)] = 2

    def __post_init__(self) -> None:
        check_fields(self, "order")

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """See `Sampler.step`."""
        self.process.posterior(t, t_next)  # checks the direction
        if t_next < 0:
            return prediction.x0, None
        tables = self.process.tables
        now = tables.half_log_snr[t]
        width = tables.half_log_snr[t_next] - now
        x0 = prediction.x0
        if self.order == 2 and memory is not None:
            # 2211.01095, algorithm 2: D = (1 + 1 / 2r) x0 - 1 / 2r x0_before, r the ratio of the two widths.
            weight = 0.5 * width / (now - memory.half_log_snr)
            x0 = (1 + weight) * x0 - weight * memory.x0
        # The update of the same algorithm; with x0 in place of D it is DDIM's.
        x = tables.sigma[t_next] / tables.sigma[t] * x_t.float() - tables.alpha[t_next] * math.expm1(-width) * x0
        return x, _LastPrediction(prediction.x0, now)


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ (Lu et al. 2211.01095), multistep, predicting x0, deterministic.

    Names and defaults are those of diffusers, with clipping added (off by default). Its timesteps leave out 0 for
    "linspace" and "leading", because the step down to 0 is too long for this solver.

    Args:
        num_train_timesteps: noise levels of the training.
        beta_start, beta_end: of the linear schedules.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        solver_order: 1 or 2.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_spacing: "linspace", "leading" or "trailing"; see `spaced_timesteps` of `schedule`.
        steps_offset: is added to the timesteps of "leading".
        thresholding, dynamic_thresholding_ratio, sample_max_value: as in `DDPMScheduler`.
        variance_type: "learned_range" if the network predicts a variance, which is split off and ignored.
        clip_sample, clip_sample_range: whether predicted x0 is clamped, and to which range.
        unused: settings of diffusers' class that unclip does not implement, at their neutral values.

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
        steps_offset: int = 0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        **unused: object,
    ) -> None:
        self._configure(locals())

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
        """As `DDIMScheduler.step`; `generator` and `variance_noise` have no effect, as the solver is deterministic."""
        return self._step(self._sampler, model_output, timestep, sample, prev_timestep, None, return_dict)


SCHEDULERS: dict[str, type[Scheduler]] = {name: globals()[name] for name in __all__}
