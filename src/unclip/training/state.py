"""What lies in a run's folder: the state to resume from, the model, the log.

Knows files and tensors by name; knows neither task nor step. Called by the trainer, and by whoever takes a model out of
a run.
"""

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
from unclip.training.recipe import MAX_TEXT, Recipe, as_dict, flat, settled_settings
from unclip.training.sharding import shared_like

UNDER_CLIP = ("prior", "prior_autoregressive", "decoder")
"""The stages whose fingerprint is that of a CLIP."""

LISTS_LIMIT_BYTES = 2**30
"""Of a file that lists samples: there may be a million."""


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
"""What an optimizer keeps of a parameter: Muon of a hidden matrix, AdamW of any."""

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
"""What the values of state.json can be."""


def versions() -> dict[str, str]:
    """What computes here: Python, the machine's kind, and the libraries whose arithmetic a run depends on."""
    found = {"unclip": __version__, "torch": str(torch.__version__)}
    found |= {name: importlib.metadata.version(name) for name in ("accelerate", "transformers")}
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


@dataclass(frozen=True)
class Snapshot:
    """Everything that the next steps of a run depend on.

    Attributes:
        step: how many steps are done.
        log: sums of the metrics since the last row of the log, and over how many steps.
        module: the module's state dict.
        ema: the moving average of what is trained.
        optimizer: its state, from `optimizer_tensors`.
        scaler: of float16's loss scale; None with another precision.
        counts: samples in each shard of the data that was read to its end.
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
    """The folder of one run. `state/` and `model/` are only ever replaced whole."""

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
        """Within it, no other trainer may work here. The lock goes with the process, however that ends.

        Raises: TrainingError when another one does, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be made: {error}; name another run folder") from error
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
                        f"another process trains in {self.path}; wait, or name another folder"
                    ) from error
            yield
        finally:
            os.close(handle)

    def start(self, recipe: Recipe, step: int) -> None:
        """Note the recipe and the versions, drop what a killed run logged after the step that is gone on from, and
        clear its drafts.
        """
        for left in self.path.glob(f"{TEMPORARY_PREFIX}*"):
            if not left.name.endswith("-old"):  # that may be the only whole one there is
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(self.path / "recipe.json", as_dict(recipe))
        self._note_versions(step)
        if not step:
            self.skipped_samples.unlink(missing_ok=True)
        if self.metrics.exists():
            file_size(self.metrics)  # of a regular file: another one may wait for ever
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
        """By what a tracker knows this run again when it goes on; drawn anew where it begins, kept in run_id."""
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
        """Add to skipped.json what of the data could not be read, with the reason; no file where all could.

        Returns: all that it lists now, of the run's earlier parts too.
        """
        every: dict[str, str] = {}
        with contextlib.suppress(CheckpointError):  # there is none yet, or no whole one
            found = read_json(self.skipped_samples, limit_bytes=LISTS_LIMIT_BYTES)
            every = {name: why for name, why in found.items() if isinstance(why, str)}
        # A name in a tar need not be UTF-8, a file of JSON must.
        new = {name.encode(errors="replace").decode(): why for name, why in skipped.items()}
        if new.items() - every.items():
            write_json(self.skipped_samples, every | new)
        return every | new

    def _note_versions(self, step: int) -> None:
        """Add to versions.json what computes from this step on, unless that is what computed before."""
        before: list[dict[str, Any]] = []
        path = self.path / "versions.json"
        if step:
            with contextlib.suppress(CheckpointError):  # there is none, or no whole one
                found = read_json(path)
                before = found.get("runs", [])
            if not isinstance(before, list) or not all(isinstance(run, dict) for run in before):
                raise CheckpointError(f"{path} does not list the runs' versions: remove it")
        now = versions()
        if not before or {key: before[-1].get(key) for key in now} != now:
            write_json(path, {"runs": [*before, {"from_step": step, **now}]})

    def sample_path(self, step: int) -> Path:
        """Where the sheet of a step goes."""
        (self.path / "samples").mkdir(exist_ok=True)
        return self.path / "samples" / f"{step:07d}.png"

    def save_state(self, snapshot: Snapshot, recipe: Recipe, fingerprint: str) -> None:
        """Replace `state/`, once the new one is complete."""
        about = {
            "step": snapshot.step,
            "seed": recipe.seed,
            "stage": recipe.stage,
            "log": snapshot.log,
            "fingerprint": fingerprint,
            "optimizer": recipe.optimizer.name,
            "num_optimizer_tensors": len(snapshot.optimizer),
            "settings": settled_settings(recipe),
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
        """A folder to write the model into; it replaces `model/` at the end, if nothing went wrong."""
        return atomic_folder(self.path / "model", overwrite=True)

    def last_checkpoint(self) -> str:
        """What there is to go on from, in words."""
        try:
            return f"the checkpoint of step {read_json(self.state / 'state.json')['step']} in {self.state} is whole"
        except (CheckpointError, KeyError, OSError):
            return "there is no checkpoint yet"

    def read_state(self, recipe: Recipe, module: nn.Module, fingerprint: str) -> Snapshot | None:
        """The state to go on from; None when there is none.

        Args:
            recipe: what is to be trained.
            module: what it describes.
            fingerprint: the task's.

        Raises:
            ConfigError: the state is that of another network.
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
                f"{self.state} is of a run with stage {stage!r:.80} and seed {seed}, the recipe has "
                f"{recipe.stage!r} and {recipe.seed}: name another run folder"
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
            raise self._other_run(["it does not say which tokenizer it was trained with"])
        if about.get("fingerprint", fingerprint) != fingerprint:
            what = "captions of the data set, which the tokenizer comes from," if stage == "clip" else "CLIP"
            raise self._other_run([f"the {what} changed since"])
        if about.get("num_optimizer_tensors", len(tensors["optimizer"])) != len(tensors["optimizer"]):
            raise self._damaged("optimizer.safetensors", "lacks tensors")
        log = about.get("log") or {"sums": {}, "num_summed": 0}
        return Snapshot(step, log, **tensors, scaler=about.get("scaler"), counts=self._counts())

    def _about(self) -> dict[str, Any]:
        """What state.json says, each value of its type."""
        about = read_json(self.state / "state.json")
        for key in ("step", "seed", "stage"):
            if key not in about:
                raise self._damaged("state.json", f"lacks {key!r}")
        for key, fits in FITS.items():
            if key in about and not fits(about[key]):
                raise self._damaged("state.json", f"has {key} {about[key]!r:.80}, which no run can have")
        return about

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.state / name} {what}: remove {self.state} to begin again from step 0")

    def _counts(self) -> dict[str, int]:
        """Of shards.json; without a whole one the shards are counted again."""
        try:
            found = read_json(self.state / "shards.json", limit_bytes=LISTS_LIMIT_BYTES)["num_samples"]
            return {name: count for name, count in found.items() if type(count) is int and count >= 0}
        except (CheckpointError, KeyError, AttributeError):
            return {}

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.state / f"{name}.safetensors"
        file_size(path)  # of a regular file: another one may wait for ever
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise self._damaged(path.name, f"cannot be read ({error})") from error
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise self._damaged(path.name, f"has values in {key} that are not finite")
        return tensors

    def _changed_settings(self, recipe: Recipe, before: Mapping[str, Any]) -> list[str]:
        """The settings of the stage and of its adapters that a run keeps and that were others.

        `before` are those of the state; older ones have none. Those of recipe.json must agree with the recipe too.
        """
        told = [before]
        with contextlib.suppress(CheckpointError, RecursionError):
            written = read_json(self.path / "recipe.json", allow_infinity=True)
            told.append(flat({name: written.get(name) or {} for name in (recipe.stage, "lora")}))
        now = json.loads(json.dumps(settled_settings(recipe)))

        def is_stated(key: str, before: Mapping[str, Any]) -> bool:
            """Whether it stands on both sides; in a table of a network's settings what is not stated counts too."""
            section, _, rest = key.partition(".")
            is_of_table = isinstance(getattr(getattr(recipe, section, None), rest.partition(".")[0], None), dict)
            return (key in before and key in now) or (is_of_table and bool(before))

        changed = [
            f"{key} was {before.get(key)!r:.80} and is {now.get(key)!r:.80}"
            for before in told
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
            raise self._other_run([f"{name} has {there} there and {here} by the recipe", *changed])

    def _other_run(self, reasons: list[str]) -> ConfigError:
        return ConfigError(
            f"{self.state} is of another network than the recipe's: {'; '.join(reasons)}. Name another run folder, or "
            "put the recipe back"
        )


def clip_of_run(run: Path) -> str | None:
    """The fingerprint of the CLIP that a run's prior or decoder was trained under; None where its state does not say.

    Args:
        run: the folder that has `model/` and `state/`; a model's folder says nothing.
    """
    try:
        about = read_json(run / "state" / "state.json")
    except CheckpointError:
        return None
    is_under_clip = about.get("stage") in UNDER_CLIP
    return str(about["fingerprint"]) if is_under_clip and about.get("fingerprint") else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by names "index/key"."""
    return {
        f"{index}/{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; rates and betas stay as they are.

    Args:
        optimizer: whose state is set.
        tensors: whole ones; they are cut, and laid out in memory, as the parameter is that they are of.
        parameters: of all groups, in their order.

    Raises: CheckpointError for a state that the optimizer cannot have of these parameters.
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
            raise CheckpointError(f"the optimizer's state has values in {key!r:.80} that it cannot have")
        own = shared_like(value, parameter)
        if not is_single:  # a fused step takes one layout for parameter and state alike
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
    """Which step a row of the log is of; `default` for a line that is none, as a killed process may leave it."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else default
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return default
