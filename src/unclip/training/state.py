"""The folder of a run: the state to resume from, the model, and the logs."""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unclip import __version__
from unclip.checkpoints.files import (
    TEMPORARY_PREFIX,
    atomic_file,
    atomic_folder,
    file_size,
    locked,
    read_json,
    write_json,
)
from unclip.errors import CheckpointError, ConfigError, TrainingError
from unclip.limits import Range
from unclip.training.recipe import TASKS, Recipe, fixed_settings
from unclip.training.sections import Section, flat, refuse
from unclip.training.sharding import shared_like

LISTS_LIMIT_BYTES = 2**30
"""The largest file that lists samples; there may be a million of them."""

STATE_OF_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
STATE_OF_MUON = {"momentum"}
"""The state of a parameter in an optimizer. Muon uses that of AdamW except for hidden matrices."""

Count = Annotated[int, Range(0, 2**64 - 1)]


def versions() -> dict[str, str]:
    """The versions of Python, of the platform, and of the libraries that compute a run."""
    found = {"unclip": __version__, "torch": str(torch.__version__)}
    found |= {name: importlib.metadata.version(name) for name in ("accelerate", "transformers")}
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


@dataclass(frozen=True)
class StateInfo(Section):
    """The content of state.json. A value that old runs do not have has a default.

    Attributes:
        step: the number of completed steps.
        seed, stage, settings: of the recipe.
        log: sums of the metrics since the last row of the log, and the number of steps in them.
        fingerprint: of the task.
        optimizer: the optimizer's name.
        num_optimizer_tensors: the number of tensors in its state.
        scaler: the state of float16's loss scaler; None with another precision.
    """

    step: Count
    seed: Count
    stage: str
    log: dict[str, Any] = field(default_factory=lambda: {"sums": {}, "num_summed": 0})
    fingerprint: str | None = None
    optimizer: str = "adamw"
    num_optimizer_tensors: Count | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.log.get("num_summed")
        is_log = _are_numbers(self.log.get("sums")) and type(count) is int and 0 <= count < 2**64
        refuse(not is_log, f"log is {self.log!r:.80}; it must have sums and num_summed")
        is_scaler = self.scaler is None or (
            _are_numbers(self.scaler) and all(0 <= x <= 2**64 for x in self.scaler.values())
        )
        refuse(not is_scaler, f"scaler is {self.scaler!r:.80}; it must have numbers")


@dataclass(frozen=True)
class Snapshot:
    """The state of a run from which it is resumed.

    Attributes:
        step, log, scaler: see `StateInfo`.
        module: the module's state dict.
        ema: the moving average of the trained parameters.
        optimizer: the state of the optimizer, by `optimizer_tensors`.
        counts: the number of samples in each shard that was read to its end.
    """

    step: int
    log: dict[str, Any]
    module: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scaler: dict[str, Any] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


class RunFolder:
    """The folder of a run. `state/` and `model/` are replaced atomically."""

    def __init__(self, path: Path):
        self.path = path
        self.state, self.model, self.samples = path / "state", path / "model", path / "samples"
        self.metrics, self.skipped_samples = path / "metrics.jsonl", path / "skipped.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other trainer can use the folder. The lock ends with the process.

        Raises: TrainingError when another trainer uses the folder, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be created: {error}; choose another run folder") from error
        refusal = TrainingError(f"another process is training in {self.path}; wait, or choose another folder")
        with locked(self.path, refusal):
            yield

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
            found = path.read_text(encoding="ascii").strip()
            if step and found.isalnum():
                return found
        new = uuid.uuid4().hex
        with atomic_file(path) as draft:
            draft.write_text(f"{new}\n", encoding="ascii")
        return new

    def note_skipped(self, skipped: Mapping[str, str]) -> dict[str, str]:
        """Add samples that could not be read, with the reasons, to skipped.json. Without any, the file is not created.

        Returns: everything that the file lists.
        """
        listed = {name: why for name, why in _read_if_sound(self.skipped_samples).items() if isinstance(why, str)}
        # A name in a tar may not be UTF-8, but JSON must be.
        new = {name.encode(errors="replace").decode(): why for name, why in skipped.items()}
        if new.items() - listed.items():
            write_json(self.skipped_samples, listed | new)
        return listed | new

    def _note_versions(self, step: int) -> None:
        """Add the versions to versions.json if they differ from the previous ones."""
        path, now = self.path / "versions.json", versions()
        before = _read_if_sound(path).get("runs", []) if step else []
        if not isinstance(before, list) or not all(isinstance(run, dict) for run in before):
            raise CheckpointError(f"{path} is not a valid list of versions: remove it")
        if not before or {key: before[-1].get(key) for key in now} != now:
            write_json(path, {"runs": [*before, {"from_step": step, **now}]})

    def save_state(self, snapshot: Snapshot, recipe: Recipe, fingerprint: str) -> None:
        """Write `state/`; the previous one is replaced when the new one is complete."""
        about = StateInfo(
            snapshot.step, recipe.seed, recipe.stage, snapshot.log, fingerprint, recipe.optimizer.name,
            len(snapshot.optimizer), fixed_settings(recipe), snapshot.scaler,
        )  # fmt: skip
        with atomic_folder(self.state, overwrite=True) as draft:
            for name in ("module", "ema", "optimizer"):
                tensors = {key: t.detach().contiguous().clone() for key, t in getattr(snapshot, name).items()}
                save_file(tensors, draft / f"{name}.safetensors")
            if snapshot.counts:
                write_json(draft / "shards.json", {"num_samples": dict(snapshot.counts)})
            write_json(draft / "state.json", about.as_dict())

    def last_checkpoint(self) -> str:
        """A phrase for messages: which checkpoint exists."""
        step = _read_if_sound(self.state / "state.json").get("step")
        return (
            "no checkpoint exists yet" if step is None else f"the checkpoint of step {step} in {self.state} is complete"
        )

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
        for folder in (self.state, self.model, self.samples):
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(f"{folder} is not a folder: remove it")
        if not self.state.is_dir():
            return None
        try:
            found = read_json(self.state / "state.json")
            about = StateInfo.read({key: found[key] for key in StateInfo.hints() if key in found}, self.state)
        except ConfigError as error:
            raise self._damaged("state.json", f"is damaged ({error})") from error
        stage, seed = recipe.stage, recipe.seed
        if (about.stage, about.seed) != (stage, seed):
            raise ConfigError(
                f"{self.state} belongs to a run with stage {about.stage!r:.80} and seed {about.seed}, but the recipe "
                f"has {stage!r} and {seed}: choose another run folder"
            )
        tensors = {name: self._read(name) for name in ("module", "ema", "optimizer")}
        wanted = module.state_dict()
        trained = {name: wanted[name] for name, p in module.named_parameters() if p.requires_grad}
        reasons = _differences(tensors["module"], wanted) or _differences(tensors["ema"], trained)
        reasons += self._changed_settings(recipe, about.settings)
        if about.optimizer != recipe.optimizer.name:
            reasons.append(f"optimizer.name was {about.optimizer!r:.80} and is {recipe.optimizer.name!r}")
        if stage == "clip" and about.fingerprint is None:
            reasons.append("its state does not identify the tokenizer")
        elif about.fingerprint not in (None, fingerprint):
            what = "captions of the data set, from which the tokenizer is built," if stage == "clip" else "CLIP"
            reasons.append(f"the {what} changed")
        what = f"{self.state} belongs to another network than the recipe: {'; '.join(reasons)}"
        refuse(reasons, f"{what}. Choose another run folder, or restore the recipe")
        if about.num_optimizer_tensors not in (None, len(tensors["optimizer"])):
            raise self._damaged("optimizer.safetensors", "lacks tensors")
        return Snapshot(about.step, about.log, **tensors, scaler=about.scaler, counts=self._counts())

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.state / name} {what}: remove {self.state} to start again from step 0")

    def _counts(self) -> dict[str, int]:
        """The content of shards.json. If it is missing or broken, the shards are counted again."""
        found = _read_if_sound(self.state / "shards.json").get("num_samples")
        found = found if isinstance(found, dict) else {}
        return {name: count for name, count in found.items() if type(count) is int and count >= 0}

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

        `before` are the settings in state.json, which is empty in old runs. recipe.json is compared too. A setting that
        only one side has counts in a table of network settings.
        """
        earlier, stage = [before], recipe.stage
        with contextlib.suppress(RecursionError):
            written = _read_if_sound(self.path / "recipe.json")
            earlier.append(flat({name: written.get(name) or {} for name in (stage, "lora")}))
        now, section = fixed_settings(recipe), getattr(recipe, stage)
        tables = tuple(f"{stage}.{name}." for name, value in vars(section).items() if isinstance(value, dict))
        changed = [
            f"{key} was {before.get(key)!r:.80} and is {now.get(key)!r:.80}"
            for before in earlier
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and (key in before.keys() & now.keys() or (before and key.startswith(tables)))
        ]
        return list(dict.fromkeys(changed))


def _are_numbers(table: object) -> bool:
    return isinstance(table, dict) and all(type(value) in (int, float) for value in table.values())


def _read_if_sound(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged."""
    try:
        return read_json(path, limit_bytes=LISTS_LIMIT_BYTES, allow_infinity=True)
    except (CheckpointError, OSError):
        return {}


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A description of the first tensor with another shape or type."""
    there, here = (
        {name: f"shape {tuple(t.shape)} ({t.dtype})" for name, t in each.items()} for each in (found, wanted)
    )
    wrong = [
        f"{name} has {there.get(name, 'no values')} there and {here.get(name, 'no values')} in the recipe"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    return wrong[:1]


def clip_of_run(run: Path) -> str | None:
    """The fingerprint of the CLIP with which a run's prior or decoder was trained; None if it is unknown.

    Args:
        run: the folder with `model/` and `state/`.
    """
    about = _read_if_sound(run / "state" / "state.json")
    task, found = TASKS.get(str(about.get("stage"))), about.get("fingerprint")
    return str(found) if task is not None and "clip" in task.settings.hints() and found else None


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
    numbers = {str(index): index for index in range(len(parameters))}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        if (index := numbers.get(number)) is None:
            raise CheckpointError(f"the optimizer's state has {key!r:.80}; there are {len(parameters)} parameters")
        parameter, is_step = parameters[index], name == "step"
        is_sound = value.dtype == torch.float32 and value.shape == (() if is_step else parameter.shape)
        if not is_sound or (is_step and value <= 0) or (name == "exp_avg_sq" and (value < 0).any()):
            raise CheckpointError(f"the optimizer's state has invalid values in {key!r:.80}")
        own = shared_like(value, parameter)
        if not is_step:  # a fused step needs the layout of the parameter
            own = torch.empty_like(parameter.detach()).copy_(own)
        state.setdefault(index, {})[name] = own
    for index, entry in state.items():
        wanted = STATE_OF_MUON if groups[id(parameters[index])].get("matrices") else STATE_OF_ADAMW
        if entry.keys() != wanted:
            raise CheckpointError(
                f"the optimizer's state has {sorted(entry)} for parameter {index}, not {sorted(wanted)}"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _logged_step(line: bytes, *, default: int) -> int:
    """The step of a row of the log; `default` for a damaged line, which a killed process may leave."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else default
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return default
