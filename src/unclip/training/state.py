"""The folder of a run: the state to resume from, the model, and the logs."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unclip import __version__
from unclip.checkpoints.files import TEMPORARY_PREFIX, atomic_file, atomic_folder, file_size, read_json, write_json
from unclip.errors import CheckpointError, ConfigError, TrainingError
from unclip.training.recipe import TASKS, Recipe, fixed_settings
from unclip.training.sections import MAX_TEXT, flat
from unclip.training.sharding import shared_like

LISTS_LIMIT_BYTES = 2**30
"""The largest file that lists samples; there may be a million of them."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(each) in (int, float) for each in value.values())


def _is_log(value: object) -> bool:
    return isinstance(value, dict) and _are_numbers(value.get("sums")) and _is_count(value.get("num_summed"))


def _is_scaler(value: object) -> bool:
    return isinstance(value, dict) and _are_numbers(value) and all(0 <= each <= 2**64 for each in value.values())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


STATE_OF_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
STATE_OF_MUON = {"momentum"}
"""The state of a parameter in an optimizer. Muon uses that of AdamW except for hidden matrices."""

FITS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "seed": _is_count,
    "stage": _is_text,
    "fingerprint": _is_text,
    "optimizer": _is_text,
    "log": _is_log,
    "scaler": _is_scaler,
    "settings": lambda value: isinstance(value, dict),
    "num_optimizer_tensors": _is_count,
}
"""Checks of the values of state.json."""


def versions() -> dict[str, str]:
    """The versions of Python, of the platform, and of the libraries that compute a run."""
    found = {"unclip": __version__, "torch": str(torch.__version__)}
    found |= {name: importlib.metadata.version(name) for name in ("accelerate", "transformers")}
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


@dataclass(frozen=True)
class Snapshot:
    """The state of a run from which it is resumed.

    Attributes:
        step: the number of completed steps.
        log: sums of the metrics since the last row of the log, and the number of steps in them.
        module: the module's state dict.
        ema: the moving average of the trained parameters.
        optimizer: the state of the optimizer, by `optimizer_tensors`.
        scaler: the state of float16's loss scaler; None with another precision.
        counts: the number of samples in each shard that was read to its end.
    """

    step: int
    log: dict[str, Any]
    module: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scaler: dict[str, Any] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. `state/` and `model/` are replaced atomically."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def skipped_samples(self) -> Path:
        return self.path / "skipped.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other trainer can use the folder. The lock ends with the process.

        Raises: TrainingError when another trainer uses the folder, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be created: {error}; choose another run folder") from error
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise TrainingError(
                        f"another process trains in {self.path}; wait, or choose another folder"
                    ) from error
            yield
        finally:
            os.close(handle)

    def start(self, recipe: Recipe, step: int) -> None:
        """Write the recipe and the versions. Remove temporary files and later log rows of a killed run."""
        for left in self.path.glob(f"{TEMPORARY_PREFIX}*"):
            if not left.name.endswith("-old"):  # it may be the only complete copy
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(self.path / "recipe.json", recipe.as_dict())
        self._note_versions(step)
        if not step:
            self.skipped_samples.unlink(missing_ok=True)
        if self.metrics.exists():
            file_size(self.metrics)  # refuses a file that is not regular, which could block
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _logged_step(line, default=step + 1) <= step]
            if kept != lines:
                with atomic_file(self.metrics) as draft:
                    draft.write_bytes(b"".join(kept))

    def log(self, row: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def run_id(self, step: int) -> str:
        """The run's identifier for trackers. It is generated at step 0, and kept in the file run_id."""
        path = self.path / "run_id"
        with contextlib.suppress(OSError, UnicodeDecodeError, CheckpointError):
            file_size(path)
            known = path.read_text(encoding="ascii").strip()
            if step and known.isalnum():
                return known
        drawn = uuid.uuid4().hex
        with atomic_file(path) as draft:
            draft.write_text(f"{drawn}\n", encoding="ascii")
        return drawn

    def note_skipped(self, skipped: Mapping[str, str]) -> dict[str, str]:
        """Add samples that could not be read, with the reasons, to skipped.json. Without any, the file is not created.

        Returns: everything that the file lists.
        """
        every: dict[str, str] = {}
        with contextlib.suppress(CheckpointError):  # missing or incomplete
            found = read_json(self.skipped_samples, limit_bytes=LISTS_LIMIT_BYTES)
            every = {name: why for name, why in found.items() if isinstance(why, str)}
        # A name in a tar may not be UTF-8, but JSON must be.
        new = {name.encode(errors="replace").decode(): why for name, why in skipped.items()}
        if new.items() - every.items():
            write_json(self.skipped_samples, every | new)
        return every | new

    def _note_versions(self, step: int) -> None:
        """Add the versions to versions.json if they differ from the previous ones."""
        before: list[dict[str, Any]] = []
        path = self.path / "versions.json"
        if step:
            with contextlib.suppress(CheckpointError):  # missing or incomplete
                found = read_json(path)
                before = found.get("runs", [])
            if not isinstance(before, list) or not all(isinstance(run, dict) for run in before):
                raise CheckpointError(f"{path} is not a list of versions: remove it")
        now = versions()
        if not before or {key: before[-1].get(key) for key in now} != now:
            write_json(path, {"runs": [*before, {"from_step": step, **now}]})

    def sample_path(self, step: int) -> Path:
        """The path of the sample sheet of a step."""
        (self.path / "samples").mkdir(exist_ok=True)
        return self.path / "samples" / f"{step:07d}.png"

    def save_state(self, snapshot: Snapshot, recipe: Recipe, fingerprint: str) -> None:
        """Write `state/`; the previous one is replaced when the new one is complete."""
        about = {
            "step": snapshot.step,
            "seed": recipe.seed,
            "stage": recipe.stage,
            "log": snapshot.log,
            "fingerprint": fingerprint,
            "optimizer": recipe.optimizer.name,
            "num_optimizer_tensors": len(snapshot.optimizer),
            "settings": fixed_settings(recipe),
        }
        if snapshot.scaler is not None:
            about["scaler"] = snapshot.scaler
        with atomic_folder(self.state, overwrite=True) as draft:
            for name in ("module", "ema", "optimizer"):
                tensors = getattr(snapshot, name)
                save_file(
                    {k: v.detach().contiguous().clone() for k, v in tensors.items()}, draft / f"{name}.safetensors"
                )
            if snapshot.counts:
                write_json(draft / "shards.json", {"num_samples": dict(snapshot.counts)})
            write_json(draft / "state.json", about)

    def new_model(self) -> contextlib.AbstractContextManager[Path]:
        """A context with a temporary folder, which replaces `model/` at the end unless there is an error."""
        return atomic_folder(self.path / "model", overwrite=True)

    def last_checkpoint(self) -> str:
        """A phrase for messages: which checkpoint exists."""
        try:
            return f"the checkpoint of step {read_json(self.state / 'state.json')['step']} in {self.state} is complete"
        except (CheckpointError, KeyError, OSError):
            return "there is no checkpoint yet"

    def read_state(self, recipe: Recipe, module: nn.Module, fingerprint: str) -> Snapshot | None:
        """The state to resume from; None if there is none.

        Args:
            recipe: of the run.
            module: the module of its task.
            fingerprint: of its task.

        Raises:
            ConfigError: the state belongs to another network.
            CheckpointError: a file is missing or damaged.
        """
        for folder in (self.state, self.path / "model", self.path / "samples"):
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(f"{folder} is not a folder: remove it")
        if not self.state.is_dir():
            return None
        about = self._about()
        step, seed, stage = about["step"], about["seed"], about["stage"]
        if stage != recipe.stage or seed != recipe.seed:
            raise ConfigError(
                f"{self.state} belongs to a run with stage {stage!r:.80} and seed {seed}, but the recipe has "
                f"{recipe.stage!r} and {recipe.seed}: choose another run folder"
            )
        changed = self._changed_settings(recipe, about.get("settings") or {})
        tensors = {name: self._read(name) for name in ("module", "ema", "optimizer")}
        wanted = module.state_dict()
        trained = {name: wanted[name] for name, p in module.named_parameters() if p.requires_grad}
        self._check_alike(tensors["module"], wanted, changed)
        self._check_alike(tensors["ema"], trained, changed)
        if changed:
            raise self._other_run(changed)
        optimizer = about.get("optimizer", "adamw")
        if optimizer != recipe.optimizer.name:
            raise self._other_run([f"optimizer.name was {optimizer!r:.80} and is {recipe.optimizer.name!r}"])
        if stage == "clip" and "fingerprint" not in about:
            raise self._other_run(["its state does not identify the tokenizer"])
        if about.get("fingerprint", fingerprint) != fingerprint:
            what = "captions of the data set, from which the tokenizer is built," if stage == "clip" else "CLIP"
            raise self._other_run([f"the {what} changed"])
        if about.get("num_optimizer_tensors", len(tensors["optimizer"])) != len(tensors["optimizer"]):
            raise self._damaged("optimizer.safetensors", "lacks tensors")
        log = about.get("log") or {"sums": {}, "num_summed": 0}
        return Snapshot(step, log, **tensors, scaler=about.get("scaler"), counts=self._counts())

    def _about(self) -> dict[str, Any]:
        """The content of state.json, with checked types."""
        about = read_json(self.state / "state.json")
        for key in ("step", "seed", "stage"):
            if key not in about:
                raise self._damaged("state.json", f"lacks {key!r}")
        for key, fits in FITS.items():
            if key in about and not fits(about[key]):
                raise self._damaged("state.json", f"has the invalid value {about[key]!r:.80} for {key}")
        return about

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.state / name} {what}: remove {self.state} to start again from step 0")

    def _counts(self) -> dict[str, int]:
        """The content of shards.json. If it is missing or broken, the shards are counted again."""
        try:
            found = read_json(self.state / "shards.json", limit_bytes=LISTS_LIMIT_BYTES)["num_samples"]
            return {name: count for name, count in found.items() if type(count) is int and count >= 0}
        except (CheckpointError, KeyError, AttributeError):
            return {}

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.state / f"{name}.safetensors"
        file_size(path)  # refuses a file that is not regular, which could block
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise self._damaged(path.name, f"cannot be read ({error})") from error
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise self._damaged(path.name, f"has values that are not finite in {key}")
        return tensors

    def _changed_settings(self, recipe: Recipe, before: Mapping[str, Any]) -> list[str]:
        """Descriptions of the fixed settings that differ from the recipe.

        `before` are the settings in state.json, which is empty in old runs. recipe.json is compared too.
        """
        earlier = [before]
        with contextlib.suppress(CheckpointError, RecursionError):
            written = read_json(self.path / "recipe.json", allow_infinity=True)
            earlier.append(flat({name: written.get(name) or {} for name in (recipe.stage, "lora")}))
        now = fixed_settings(recipe)

        def is_stated(key: str, before: Mapping[str, Any]) -> bool:
            """Whether both sides have the setting. In a table of network settings, a missing setting counts too."""
            section, _, rest = key.partition(".")
            is_of_table = isinstance(getattr(getattr(recipe, section, None), rest.partition(".")[0], None), dict)
            return (key in before and key in now) or (is_of_table and bool(before))

        changed = [
            f"{key} was {before.get(key)!r:.80} and is {now.get(key)!r:.80}"
            for before in earlier
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and is_stated(key, before)
        ]
        return list(dict.fromkeys(changed))

    def _check_alike(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], changed: list[str]) -> None:
        kinds, needed = (
            {name: (tuple(value.shape), value.dtype) for name, value in each.items()} for each in (found, wanted)
        )
        wrong = [name for name in sorted(kinds.keys() | needed.keys()) if kinds.get(name) != needed.get(name)]
        if wrong:
            name = wrong[0]
            there, here = (_kind(each.get(name)) for each in (kinds, needed))
            raise self._other_run([f"{name} has {there} there and {here} in the recipe", *changed])

    def _other_run(self, reasons: list[str]) -> ConfigError:
        return ConfigError(
            f"{self.state} belongs to another network than the recipe: {'; '.join(reasons)}. Choose another run "
            "folder, or restore the recipe"
        )


def clip_of_run(run: Path) -> str | None:
    """The fingerprint of the CLIP with which a run's prior or decoder was trained; None if it is unknown.

    Args:
        run: the folder with `model/` and `state/`.
    """
    try:
        about = read_json(run / "state" / "state.json")
    except CheckpointError:
        return None
    task = TASKS.get(str(about.get("stage")))
    return str(about["fingerprint"]) if task is not None and task.uses_clip and about.get("fingerprint") else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named "index/key"."""
    return {
        f"{index}/{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. Learning rates and betas do not change.

    Args:
        optimizer: its state is set.
        tensors: whole tensors. They get the sharding and the memory layout of their parameters.
        parameters: of all groups, in order.

    Raises: CheckpointError for a state that does not fit these parameters.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if not (index.isdecimal() and len(index) < 10 and int(index) < len(parameters)):
            raise CheckpointError(f"the optimizer's state has {key!r:.80}; there are {len(parameters)} parameters")
        parameter = parameters[int(index)]
        is_single = name == "step"
        is_sound = value.dtype == torch.float32 and value.shape == (() if is_single else parameter.shape)
        if not is_sound or (is_single and value <= 0) or (name == "exp_avg_sq" and (value < 0).any()):
            raise CheckpointError(f"the optimizer's state has invalid values in {key!r:.80}")
        own = shared_like(value, parameter)
        if not is_single:  # a fused step needs the layout of the parameter
            own = torch.empty_like(parameter.detach()).copy_(own)
        state.setdefault(int(index), {})[name] = own
    for index, entry in state.items():
        wanted = STATE_OF_MUON if groups[id(parameters[index])].get("matrices") else STATE_OF_ADAMW
        if entry.keys() != wanted:
            raise CheckpointError(
                f"the optimizer's state of parameter {index} has {sorted(entry)}, not {sorted(wanted)}"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _kind(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "no values" if found is None else f"shape {found[0]} ({str(found[1]).removeprefix('torch.')})"


def _logged_step(line: bytes, *, default: int) -> int:
    """The step of a row of the log; `default` for a damaged line, which a killed process may leave."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else default
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return default
