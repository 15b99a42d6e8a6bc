"""The trainer: what a step is, what a kill, a full disk or a bad loss leave behind, and what is resumed."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.errors import CheckpointError, ConfigError, TrainingError, UnclipError
from unclip.training import state
from unclip.training import trainer as trainer_module
from unclip.training.clip import MAX_LOGIT_SCALE, ClipTask
from unclip.training.optimizer import learning_rate
from unclip.training.recipe import TASKS, ClipSettings, LoraSettings, OptimizerRecipe, PriorSettings, Recipe
from unclip.training.state import RunFolder
from unclip.training.task import make_task, of_rows
from unclip.training.trainer import Trainer, own_rows, step_generator


class Line(nn.Module):
    """y = w x + b, and a dropout, so that something draws from torch's own generator."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.2)
        self.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))

    def forward(self, batch):
        error = (self.line(self.dropout(batch["x"])) - batch["x"].sum(dim=1, keepdim=True)).pow(2)
        return {"loss": error.mean(), "worst": error.max().detach()}


class LineTask:
    """The smallest task there is; `spoil` may change a batch or raise."""

    def __init__(self, spoil=None):
        torch.manual_seed(0)
        self.module = Line()
        self.fingerprint = "line"
        self.spoil = spoil
        self.drawn = 0
        self.counts = {}
        self.source = self

    is_local = False
    skipped: dict[str, str] = {}  # noqa: RUF012

    def batch(self, step, batch_size, generator, own=None):
        batch = of_rows({"x": torch.randn(batch_size, 3, generator=generator)}, own)
        self.drawn += 1
        return batch if self.spoil is None else self.spoil(batch, self.drawn)

    def reading(self, should_stop):
        return contextlib.nullcontext()

    def save(self, folder):
        save_file({k: v.clone() for k, v in self.module.state_dict().items()}, folder / "line.safetensors")

    def sample_sheet(self, path):
        path.with_suffix(".txt").write_text(f"{self.module.training}")


def line_recipe(**changes) -> Recipe:
    settings = {"steps": 12, "batch_size": 8, "precision": "no", "log_every_steps": 5, "sample_every_steps": 6}
    return Recipe(**{"stage": "clip", "data": Path("x"), "clip": ClipSettings(), **settings, **changes})


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("pictures_per_s")
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{path.stem}/{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert rows(one) == rows(other)
    assert (one / "state" / "state.json").read_text() == (other / "state" / "state.json").read_text()


def stopped_at(step: int, number: int = signal.SIGINT):
    """A spoiler that asks this process to stop, as Ctrl-C does, while a step is computed."""

    def spoil(batch, drawn):
        if drawn == step:
            os.kill(os.getpid(), number)
        return batch

    return spoil


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(tmp_path):
    trainer = Trainer(LineTask(), line_recipe(), tmp_path / "run")
    trainer.run()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["metrics.jsonl", "model", "recipe.json", "samples", "state", "versions.json"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [5, 10, 12]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["batch_size"] == 8
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["0000006.txt", "0000012.txt"]
    assert (tmp_path / "run" / "samples" / "0000012.txt").read_text() == "False"  # in evaluation mode
    model = load_file(tmp_path / "run" / "model" / "line.safetensors")
    assert torch.equal(model["line.weight"], trainer.ema["line.weight"])
    assert not torch.equal(model["line.weight"], trainer.task.module.line.weight)
    assert torch.equal(model["fixed"], torch.ones(2))


def test_the_versions_that_computed(tmp_path, monkeypatch):
    run, about = tmp_path / "run", {}
    monkeypatch.setattr(state, "versions", lambda: dict(about))

    def train(step: int, torch_version: str) -> list[dict]:
        about.update(torch=torch_version)
        Trainer(LineTask(), line_recipe(steps=step), run).run()
        return json.loads((run / "versions.json").read_text())["runs"]

    first, second = {"from_step": 0, "torch": "1"}, {"from_step": 3, "torch": "2"}
    assert train(2, "1") == [first]
    assert train(3, "1") == [first]
    assert train(4, "2") == [first, second]
    assert train(5, "2") == [first, second]
    (run / "versions.json").write_text("{")
    assert train(6, "2") == [{"from_step": 5, "torch": "2"}]
    shutil.rmtree(run / "state")
    assert train(2, "3") == [{"from_step": 0, "torch": "3"}]
    monkeypatch.undo()
    assert state.versions().keys() == {"unclip", "torch", "accelerate", "transformers", "python", "platform"}
    assert state.versions()["torch"] == torch.__version__


def skipping(**skipped: str) -> LineTask:
    task = LineTask()
    task.skipped = skipped
    return task


def test_what_was_skipped_before_stays_listed(tmp_path):
    listed = tmp_path / "skipped.json"
    trainer = Trainer(skipping(a="broken"), line_recipe(steps=2), tmp_path)
    trainer.run()
    assert json.loads(listed.read_text()) == trainer.skipped == {"a": "broken"}
    Trainer(skipping(), line_recipe(steps=3), tmp_path).run()
    assert json.loads(listed.read_text()) == {"a": "broken"}
    task = skipping()
    task.skipped = {"b": "cut off", "c\udcff": "no UTF-8"}
    trainer = Trainer(task, line_recipe(steps=4), tmp_path)
    trainer.run()
    assert json.loads(listed.read_text()) == trainer.skipped == {"a": "broken", "b": "cut off", "c?": "no UTF-8"}
    listed.write_text('{"a":')
    Trainer(skipping(d="broken"), line_recipe(steps=5), tmp_path).run()
    assert json.loads(listed.read_text()) == {"d": "broken"}
    shutil.rmtree(tmp_path / "state")  # another run begins
    Trainer(skipping(), line_recipe(steps=2), tmp_path).run()
    assert not listed.exists()


def test_what_other_processes_skipped_is_listed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "gather_object", lambda own: [*own, {"of another": "cut off"}])
    Trainer(skipping(own="broken"), line_recipe(steps=2), tmp_path).run()
    assert json.loads((tmp_path / "skipped.json").read_text()) == {"own": "broken", "of another": "cut off"}


def test_counts_of_shards_are_kept(tmp_path, monkeypatch):
    task = LineTask()
    task.counts["0.tar"] = 7
    monkeypatch.setattr(trainer_module, "gather_object", lambda own: [*own, {"1.tar": 5}])
    Trainer(task, line_recipe(steps=2), tmp_path).run()
    again = LineTask()
    Trainer(again, line_recipe(steps=3), tmp_path)
    assert again.counts == {"0.tar": 7, "1.tar": 5}
    for text in ("{", "[]", '{"num_samples": 3}', '{"num_samples": {"0.tar": "many"}}'):
        (tmp_path / "state" / "shards.json").write_text(text)
        again = LineTask()
        assert Trainer(again, line_recipe(steps=3), tmp_path).step == 2
        assert again.counts == {}


def test_it_learns(tmp_path):
    recipe = line_recipe(steps=80, optimizer=OptimizerRecipe(learning_rate=0.1, warmup_steps=2, weight_decay=0.0))
    Trainer(LineTask(), recipe, tmp_path / "run").run()
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.3 * losses[0]


def test_the_log_holds_means(tmp_path):
    task, seen = LineTask(), []
    trainer = Trainer(task, line_recipe(steps=5), tmp_path / "run")
    step = trainer._train_step
    trainer._train_step = lambda: seen.append(step()) or seen[-1]
    trainer.run()
    (row,) = rows(tmp_path / "run")
    for name in ("loss", "worst"):
        assert row[name] == pytest.approx(sum(found[name] for found in seen) / 5, rel=1e-5)


def test_progress_tells_loss_and_pictures_a_second(tmp_path):
    told = []

    class Bar:
        def __init__(self, total, initial, unit):
            told.append((total, initial, unit))

        def set_postfix(self, values, refresh):
            told.append(values)

        def update(self, count):
            told.append(count)

        def close(self):
            told.append("closed")

    Trainer(LineTask(), line_recipe(steps=2), tmp_path / "run").run(progress=Bar)
    assert told[0] == (2, 0, "step")
    assert set(told[1]) == {"loss", "pictures/s"}
    assert told[2:] == [1, told[3], 1, "closed"]

    def fails(batch, drawn):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Trainer(LineTask(fails), line_recipe(), tmp_path / "other").run(progress=Bar)
    assert told[-1] == "closed"


def test_learning_rate():
    recipe = line_recipe(steps=100, optimizer=OptimizerRecipe(learning_rate=1.0, warmup_steps=10, decay_share=0.2))
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    flat = line_recipe(steps=3, optimizer=OptimizerRecipe(learning_rate=2.0, warmup_steps=0, decay_share=0.0))
    assert [learning_rate(flat, step) for step in range(3)] == [2.0] * 3


def test_the_average_is_warmed_up(tmp_path):
    trainer = Trainer(LineTask(), line_recipe(ema_decay=0.5), tmp_path / "run")
    start = trainer.ema["line.bias"].clone()
    trainer._train_step()
    wanted = torch.lerp(start, trainer.task.module.line.bias.detach(), 0.9)  # 1 - (1 + 0) / (10 + 0)
    torch.testing.assert_close(trainer.ema["line.bias"], wanted)
    trainer.step = 1000
    before = trainer.ema["line.bias"].clone()
    trainer._train_step()
    torch.testing.assert_close(
        trainer.ema["line.bias"], torch.lerp(before, trainer.task.module.line.bias.detach(), 0.5)
    )


def test_gradients_are_clipped(tmp_path):
    """AdamW's steps hardly tell, so what the optimizer is given is looked at."""

    def given(max_norm: float) -> torch.Tensor:
        recipe = line_recipe(optimizer=OptimizerRecipe(max_grad_norm=max_norm))
        trainer = Trainer(LineTask(), recipe, tmp_path / str(max_norm))
        found = []
        step = trainer.optimizer.step
        parameters = [p for p in trainer.weights.parameters() if p.requires_grad]
        trainer.optimizer.step = lambda: found.append(torch.cat([p.grad.flatten() for p in parameters])) or step()
        trainer.take_step()
        return found[0]

    whole, clipped = given(1e6), given(0.01)
    assert whole.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), whole / whole.norm())


@pytest.mark.parametrize("stage", list(TASKS))
def test_a_step_in_bfloat16(tiny, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(trainer_module, "mixed_precision", lambda precision: precision)  # emulated or not
    losses, kinds = {}, {}
    for precision in ("no", "bf16"):
        recipe = tiny(stage, precision=precision)
        trainer = Trainer(make_task(recipe), recipe, tmp_path / precision)
        assert trainer.accelerator.mixed_precision == precision
        seen = kinds.setdefault(precision, set())
        for layer in trainer.weights.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda layer, given, output, seen=seen: seen.add(output.dtype))
        before = {name: p.detach().clone() for name, p in trainer.weights.named_parameters() if p.requires_grad}
        losses[precision] = trainer.take_step()["loss"]
        for name, parameter in trainer.weights.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.isfinite().all(), name
        moved = [name for name, p in trainer.weights.named_parameters() if name in before and (p != before[name]).any()]
        assert moved  # not all: layers that begin at zero keep gradients from those before them
        AcceleratorState._reset_state(reset_partial_state=True)
    assert kinds["no"] == {torch.float32}
    assert torch.bfloat16 in kinds["bf16"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)


# -- sharing a batch out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "num_pieces"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_each_row_is_computed_once(num_processes, num_pieces):
    own = [own_rows(24, num_processes=num_processes, rank=r, num_pieces=num_pieces) for r in range(num_processes)]
    assert sorted(torch.cat(own).tolist()) == list(range(24))
    assert {len(rows) for rows in own} == {24 // num_processes}
    pieces = [torch.cat([rows.chunk(num_pieces)[place] for rows in own]) for place in range(num_pieces)]
    assert torch.cat(pieces).tolist() == list(range(24))  # all processes together compute piece after piece


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(ConfigError, match=r"a batch of 10 .* 2 processes .* 3: make batch_size a multiple of 6"):
        own_rows(10, num_processes=2, rank=0, num_pieces=3)


def test_accumulation_is_one_large_batch(tiny, tmp_path):
    found = {}
    for pieces in (1, 4):
        task = make_task(tiny("decoder", accumulation=pieces, batch_size=8))
        trainer = Trainer(task, tiny("decoder", accumulation=pieces, batch_size=8), tmp_path / str(pieces))
        losses = []
        for _ in range(2):
            losses.append(trainer._train_step()["loss"])
            trainer.step += 1
        found[pieces] = losses, {k: v.clone() for k, v in task.module.state_dict().items()}
    assert found[1][0] == pytest.approx(found[4][0], rel=1e-4)
    for name, value in found[1][1].items():
        torch.testing.assert_close(value, found[4][1][name], atol=2e-4, rtol=1e-3)


def test_a_launchers_accumulation_is_not_obeyed(tiny, tmp_path, monkeypatch):
    """The recipe says it: else every loss would be divided by the launcher's number once more."""
    norms = []
    for number in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
        trainer = Trainer(LineTask(), line_recipe(accumulation=2), tmp_path / number)
        clip = trainer.accelerator.clip_grad_norm_
        monkeypatch.setattr(
            trainer.accelerator, "clip_grad_norm_", lambda *how, clip=clip: norms.append(clip(*how).item())
        )
        trainer.take_step()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert norms[0] == norms[1] > 0


def test_the_temperature_of_a_clip_does_not_stay_above_its_limit(tiny, tmp_path):
    """There it has no gradient: it would never come down again."""
    settings = {"steps": 40, "precision": "no", "optimizer": OptimizerRecipe(learning_rate=0.02, warmup_steps=0)}
    recipe = tiny("clip", **settings)
    task = ClipTask(recipe)
    with torch.no_grad():
        task.module.logit_scale.fill_(MAX_LOGIT_SCALE + 3)
    trainer = Trainer(task, recipe, tmp_path)
    found = [(trainer.take_step(), task.module.logit_scale.item())[1] for _ in range(20)]
    limit = torch.tensor(MAX_LOGIT_SCALE).item()
    assert found[0] == pytest.approx(limit)
    assert max(found) <= limit
    assert found[-1] < limit - 0.1  # an untrained network fares better with a lower one
    trainer.save()
    again = Trainer(ClipTask(recipe), recipe, tmp_path)
    assert again.weights.logit_scale.item() == found[-1]


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 7])
def test_stopped_and_gone_on_is_as_if_never_stopped(tmp_path, step):
    Trainer(LineTask(), line_recipe(), tmp_path / "straight").run()
    first = Trainer(LineTask(stopped_at(step)), line_recipe(), tmp_path / "stopped")
    first.run()
    assert first.step == step
    assert (tmp_path / "stopped" / "model").is_dir()
    second = Trainer(LineTask(), line_recipe(), tmp_path / "stopped")
    assert second.step == step
    second.run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


def test_the_loss_scale_of_float16_goes_on_too(tmp_path, monkeypatch):
    """On a CPU accelerate scales no loss; with a scaler that grows at every third step this one does."""

    def scaling(**settings):
        accelerator = Accelerator(**settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        return accelerator

    monkeypatch.setattr(trainer_module, "Accelerator", scaling)
    Trainer(LineTask(), line_recipe(), tmp_path / "straight").run()
    Trainer(LineTask(stopped_at(5)), line_recipe(), tmp_path / "stopped").run()
    second = Trainer(LineTask(), line_recipe(), tmp_path / "stopped")
    assert second.accelerator.scaler.get_scale() == 8.0
    second.run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("stage", list(TASKS))
def test_real_tasks_go_on_exactly(tiny, tmp_path, stage):
    recipe = tiny(stage, steps=4, log_every_steps=3, sample_every_steps=100)
    Trainer(make_task(recipe), recipe, tmp_path / "straight").run()
    first = Trainer(make_task(recipe), recipe, tmp_path / "stopped")
    batch = first.task.batch
    first.task.batch = lambda *about: stopped_at(2)(batch(*about), first.step + 1)
    first.run()
    assert first.step == 2
    Trainer(make_task(recipe), recipe, tmp_path / "stopped").run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_between_two_steps_waits_until_all_processes_are_told(tmp_path, monkeypatch):
    """One that stopped at once would save while the others compute, and each would wait for the other."""
    trainer = Trainer(LineTask(), line_recipe(), tmp_path / "run")
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda told, how: told)  # the other one sees the same
    update = trainer._update_average

    def late():
        update()
        if trainer.step == 2:  # what this step had to say to the others is said
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "_update_average", late)
    trainer.run()
    assert trainer.step == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_put_back(tmp_path, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = Trainer(LineTask(stopped_at(2, number)), line_recipe(), tmp_path / "run")
    trainer.run()
    assert (trainer.step, trainer.stopped_by) == (2, number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice(batch, drawn):
        if drawn == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return batch

    with pytest.raises(KeyboardInterrupt):
        Trainer(LineTask(twice), line_recipe(), tmp_path / "run").run()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=type,
)
def test_memory_that_does_not_suffice_names_the_batch(tmp_path, error):
    def fails(batch, drawn):
        raise error

    with pytest.raises(TrainingError, match="a step of batch_size 8 with accumulation 1 does not fit into memory"):
        Trainer(LineTask(fails), line_recipe(), tmp_path / "run").run()


def test_what_is_logged_is_told(tmp_path):
    told = []
    Trainer(LineTask(), line_recipe(), tmp_path / "run").run(on_log=lambda step, row: told.append((step, row)))
    assert [step for step, _ in told] == [5, 10, 12]
    assert all(row["loss"] > 0 and row["pictures_per_s"] > 0 for _, row in told)


def test_in_a_thread(tmp_path):
    trainer = Trainer(LineTask(), line_recipe(steps=2), tmp_path / "run")
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert trainer.step == 2


def test_rows_past_the_checkpoint_are_dropped(tmp_path):
    run = tmp_path / "run"
    Trainer(LineTask(), line_recipe(steps=5), run).run()
    kept = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(kept + '{"step": 10, "loss": 7}\n{"step": 11, "lo')
    (run / ".unclip-tmp-left").mkdir()
    (run / ".unclip-tmp-left" / "half").write_text("x")
    (run / ".unclip-tmp-file.json").write_text("x")
    Trainer(LineTask(), line_recipe(), run).run()
    assert [row["step"] for row in rows(run)] == [5, 10, 12]
    assert not list(run.glob(".unclip-tmp*"))


def test_a_log_without_a_checkpoint_starts_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 7, "pictures_per_s": 1}\n[]\n')
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 12]
    assert rows(tmp_path)[0]["loss"] != 7


def test_a_finished_run_stays(tmp_path):
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    before, log, written = tensors(tmp_path), rows(tmp_path), (tmp_path / "model").stat().st_mtime_ns
    written_recipe = (tmp_path / "recipe.json").read_text()
    Trainer(LineTask(), line_recipe(batch_size=16, steps=10), tmp_path).run()
    assert (tmp_path / "recipe.json").read_text() == written_recipe  # what it was trained by
    assert all(torch.equal(before[name], value) for name, value in tensors(tmp_path).items())
    assert rows(tmp_path) == log
    assert (tmp_path / "model").stat().st_mtime_ns == written


def test_a_state_of_before_the_log_was_kept_in_it(tmp_path):
    Trainer(LineTask(), line_recipe(steps=5), tmp_path).run()
    about = json.loads((tmp_path / "state" / "state.json").read_text())
    old = {"step": 5, "seed": 0, "stage": "prior"}
    assert about.items() >= {**old, "stage": "clip"}.items()
    recipe = line_recipe(stage="prior", clip=None, prior=PriorSettings())
    (tmp_path / "state" / "state.json").write_text(json.dumps(old))
    assert Trainer(LineTask(), recipe, tmp_path).step == 5
    (tmp_path / "state" / "state.json").write_text(json.dumps({**old, "stage": "clip"}))
    with pytest.raises(ConfigError, match="does not identify the tokenizer"):
        Trainer(LineTask(), line_recipe(), tmp_path)


def test_other_captions(tmp_path):
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    task = LineTask()
    task.fingerprint = "other"
    with pytest.raises(ConfigError, match=r"the captions of the data set, .* changed"):
        Trainer(task, line_recipe(), tmp_path)


# -- runs that are not resumed --------------------------------------------------------------------------------------


def test_another_seed_or_stage(tmp_path):
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    with pytest.raises(ConfigError, match="stage 'clip' and seed 0, but the recipe has 'clip' and 1: choose another"):
        Trainer(LineTask(), line_recipe(seed=1), tmp_path)


def test_another_size(tiny, tmp_path):
    recipe = tiny("prior", steps=1)
    Trainer(make_task(recipe), recipe, tmp_path).run()
    changed = tiny("prior", steps=2, section={"model": recipe.prior.model | {"attention_head_dim": 8}})
    words = r"has shape .* there and .* in the recipe; prior\.model\.attention_head_dim was 16 and is 8"
    with pytest.raises(ConfigError, match=words):
        Trainer(make_task(changed), changed, tmp_path)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ConfigError, match=r"has shape .* there and"):
        Trainer(make_task(changed), changed, tmp_path)


def test_another_process(tiny, tmp_path):
    recipe = tiny("prior", steps=1)
    Trainer(make_task(recipe), recipe, tmp_path).run()
    process = dataclasses.replace(recipe.prior.process, prediction_type="epsilon")
    changed = tiny("prior", steps=2, section={"process": process})
    with pytest.raises(ConfigError, match=r"prior\.process\.prediction_type was 'sample' and is 'epsilon'"):
        Trainer(make_task(changed), changed, tmp_path)
    allowed = tiny("prior", steps=2, batch_size=8, section={"text_drop": 0.5})
    assert Trainer(make_task(allowed), allowed, tmp_path).step == 1


def test_another_clip(tiny, tmp_path):
    recipe = tiny("prior", steps=1)
    Trainer(make_task(recipe), recipe, tmp_path / "run").run()
    ClipTask(tiny("clip", seed=9)).save(tmp_path / "clip")
    changed = tiny("prior", section={"clip": tmp_path / "clip"})
    with pytest.raises(ConfigError, match="the CLIP changed"):
        Trainer(make_task(changed), changed, tmp_path / "run")


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.safetensors", "state.json"])
def test_a_broken_state(tmp_path, name):
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    path = tmp_path / "state" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Trainer(LineTask(), line_recipe(), tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Trainer(LineTask(), line_recipe(), tmp_path)


def test_a_state_that_lacks_its_step(tmp_path):
    Trainer(LineTask(), line_recipe(), tmp_path).run()
    (tmp_path / "state" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged \(the setting step is missing\)"):
        Trainer(LineTask(), line_recipe(), tmp_path)


def test_precision_that_is_not_there(tmp_path, monkeypatch):
    def refuses(**settings):
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr(trainer_module, "Accelerator", refuses)
    with pytest.raises(ConfigError, match="does not support this precision or tracker here: fp16"):
        Trainer(LineTask(), line_recipe(precision="fp16"), tmp_path)


def test_a_tracker_that_accelerate_does_not_know(tmp_path, monkeypatch):
    """As an accelerate that is older than the tracker; the tracker itself is installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    recipe = line_recipe(trackers=("of-the-future",))
    with pytest.raises(ConfigError, match=r"accelerate does not support .* tracker here: .*of-the-future"):
        Trainer(LineTask(), recipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_trainers_in_one_folder(tmp_path):
    second = []

    def other(batch, drawn):
        with pytest.raises(TrainingError, match="another process is training in") as caught:
            Trainer(LineTask(), line_recipe(), tmp_path).run()
        second.append(caught)
        return batch

    Trainer(LineTask(other), line_recipe(steps=1), tmp_path).run()
    assert second


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "the loss is nan"), (float("inf"), "the loss is")])
def test_a_loss_that_is_no_number(tmp_path, value, words):
    Trainer(LineTask(), line_recipe(steps=4), tmp_path).run()
    before = tensors(tmp_path)

    def spoil(batch, drawn):
        return {"x": batch["x"] * value} if drawn == 3 else batch

    trainer = Trainer(LineTask(spoil), line_recipe(), tmp_path)
    with pytest.raises(TrainingError, match=f"{words}.*at step 6; the checkpoint of step 4 in .* is complete"):
        trainer.run()
    assert all(torch.equal(before[name], found) for name, found in tensors(tmp_path).items())
    assert all(parameter.isfinite().all() for parameter in trainer.task.module.parameters())


def test_a_gradient_that_is_no_number(tmp_path):
    class Root(Line):
        def forward(self, batch):
            return {"loss": (self.line(batch["x"]) * 0).abs().sqrt().mean()}  # 0, with a gradient of 0/0

    task = LineTask()
    task.module = Root()
    trainer = Trainer(task, line_recipe(), tmp_path)
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan at step 0; no checkpoint exists yet"):
        trainer.run()
    assert task.module.line.weight.isfinite().all()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("IoError: code 28")])
@pytest.mark.parametrize("name", ["module", "optimizer", "model"])
def test_a_full_disk(tmp_path, monkeypatch, error, name):
    Trainer(LineTask(), line_recipe(steps=4), tmp_path).run()
    before, about = tensors(tmp_path), (tmp_path / "state" / "state.json").read_text()

    def full(values, path):
        if path.stem == name or (name == "model" and path.stem == "line"):
            path.write_bytes(b"half")
            raise error
        return save_file(values, path)

    monkeypatch.setattr(state, "save_file", full)
    task = LineTask()
    if name == "model":
        task.save = lambda folder: full({}, folder / "line.safetensors")
    words = r"cannot be written at step 12: .*28.*; the checkpoint of step 4 in .* is complete: make room"
    with pytest.raises(TrainingError, match=words):
        Trainer(task, line_recipe(), tmp_path).run()
    kept = {key: value for key, value in tensors(tmp_path).items() if name == "model" or key.startswith("state/")}
    assert len(kept) > 5
    assert all(torch.equal(before[key], value) for key, value in kept.items())
    assert (tmp_path / "state" / "state.json").read_text() == about
    assert not list(tmp_path.glob(".unclip-tmp*"))
    monkeypatch.undo()
    trainer = Trainer(LineTask(), line_recipe(), tmp_path)
    trainer.run()
    assert trainer.step == 12


def test_muon_goes_on_bit_for_bit_and_adamw_not_from_its_state(tmp_path, tiny):
    recipe = tiny("prior", steps=6, optimizer=OptimizerRecipe(name="muon", warmup_steps=2))
    straight = Trainer(make_task(recipe), recipe, tmp_path / "straight")
    assert any("momentum" in value for value in _states_after(straight))
    task = make_task(recipe)
    draw, stop = task.batch, stopped_at(3)
    drawn = iter(range(1, 100))
    task.batch = lambda *about: stop(draw(*about), next(drawn))
    Trainer(task, recipe, tmp_path / "stopped").run()
    again = Trainer(make_task(recipe), recipe, tmp_path / "stopped")
    assert again.step == 3
    again.run()
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")
    adamw = dataclasses.replace(recipe, optimizer=OptimizerRecipe(warmup_steps=2))
    with pytest.raises(ConfigError, match=r"optimizer\.name was 'muon' and is 'adamw'"):
        Trainer(make_task(adamw), adamw, tmp_path / "stopped")


def _states_after(trainer: Trainer) -> list[dict]:
    trainer.run()
    return list(trainer.optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("elsewhere", [1.0, float("nan"), float("inf")])
def test_a_bad_loss_of_another_process_stops_this_one(tmp_path, monkeypatch, elsewhere):
    trainer = Trainer(LineTask(), line_recipe(), tmp_path)
    assert trainer._mean({"loss": 1.0}) == {"loss": 1.0}
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda told, how: (told + elsewhere) / 2)
    found = trainer._mean({"loss": 1.0, "worst": 3.0})
    if elsewhere == 1.0:
        assert found == {"loss": 1.0, "worst": 2.0}
        trainer._check_finite(found["loss"], torch.tensor(1.0))
    else:
        with pytest.raises(TrainingError, match="the loss is"):
            trainer._check_finite(found["loss"], torch.tensor(1.0))


@pytest.mark.parametrize(("stop", "save"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_what_one_process_is_asked_all_do(tmp_path, monkeypatch, stop, save):
    trainer = Trainer(LineTask(), line_recipe(), tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda told, how: (told + torch.tensor([1.0, stop, save])) / 2)
    trainer._mean({"loss": 1.0})
    assert trainer._stop == bool(stop)
    assert trainer._save_is_due == bool(save)


def test_processes_that_see_different_folders_are_told(tmp_path, monkeypatch):
    trainer = Trainer(LineTask(), line_recipe(), tmp_path / "other")
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr("unclip.training.trainer.gather_object", lambda own: [*own, 3])
    with pytest.raises(ConfigError, match="is at step 0 for one process and at 3 for another"):
        Trainer(LineTask(), line_recipe(), tmp_path)


def test_a_large_seed(tmp_path):
    Trainer(LineTask(), line_recipe(seed=2**64 - 1, steps=2), tmp_path).run()
    assert [row["step"] for row in rows(tmp_path)][-1] == 2


def test_metrics_go_to_a_tracker_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = line_recipe(trackers=("tensorboard",), log_every_steps=3)
    Trainer(LineTask(), recipe, tmp_path).run()
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    wanted = [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert len(found) == 4
    for (step, value), (at, loss) in zip(found, wanted, strict=True):
        assert step == at
        assert value == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("name", "left"), [("wandb", "run/wandb/*/*.wandb"), ("trackio", "kept/unclip.db")])
def test_metrics_go_to_the_trackers_that_are_installed(tmp_path, monkeypatch, name, left):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # read when trackio is imported
    pytest.importorskip(name)
    recipe = line_recipe(trackers=(name,), log_every_steps=3)
    for steps in (6, 12):  # a resumed run
        Trainer(LineTask(), dataclasses.replace(recipe, steps=steps), tmp_path / "run").run()
    assert [path for path in tmp_path.glob(left) if path.stat().st_size > 1000]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "kept"}
    parts = list(tmp_path.glob("run/wandb/offline-run-*"))
    assert len(parts) == (2 if name == "wandb" else 0)
    assert len({part.name.rpartition("-")[2] for part in parts}) <= 1  # one run for wandb, when they are sent to it


def test_wandb_is_told_which_run_goes_on(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args, init_kwargs, **more: told.append(init_kwargs))
    recipe = line_recipe(trackers=("tensorboard",))
    for steps in (6, 12):
        Trainer(LineTask(), dataclasses.replace(recipe, steps=steps), tmp_path).run()
    first, second = (how["wandb"] for how in told)
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


def test_a_tracker_knows_a_run_again_that_goes_on_and_only_that(tmp_path):
    folder = RunFolder(tmp_path)
    first = folder.run_id(0)
    assert folder.run_id(7) == first
    assert folder.run_id(0) != first
    (tmp_path / "run_id").write_bytes(b"\xff\x00")
    assert folder.run_id(7).isalnum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_training_is_the_same(tmp_path, tiny):
    for name, compiled in (("plain", False), ("compiled", True)):
        recipe = tiny("prior", steps=3, compile=compiled, precision="no", log_every_steps=1)
        Trainer(make_task(recipe), recipe, tmp_path / name).run()
    plain, compiled = ([row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert tensors(tmp_path / "plain").keys() == tensors(tmp_path / "compiled").keys()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="cannot be created"):
        Trainer(LineTask(), line_recipe(), tmp_path / "file" / "run").run()


# -- a damaged folder: resumed exactly, or refused with a typed error; no traceback and no endless wait ---------


Damage = Callable[[Path], None]


def written(name: str, content: bytes) -> Damage:
    def damage(run: Path) -> None:
        (run / name).write_bytes(content)

    return damage


def told(name: str, **changes: object) -> Damage:
    """Values of a JSON file replaced; by ... they are left out."""

    def damage(run: Path) -> None:
        about = json.loads((run / name).read_text()) | changes
        kept = {key: value for key, value in about.items() if value is not ...}
        (run / name).write_text(json.dumps(kept))

    return damage


def tensors_of(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(run: Path) -> None:
        path = run / "state" / f"{name}.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return damage


def filled(key: str, number: float, dtype: torch.dtype | None = None) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found.update({key: torch.full_like(found[key], number, dtype=dtype)})


def replaced(name: str, kind: str) -> Damage:
    """A file or folder that became a pipe, a socket, a folder, a file, or a link to nowhere or to endless zeros."""

    def damage(run: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as one:  # its path may not be long
                one.bind(path.name)
        elif kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_bytes(b"x")
        elif kind != "none":
            path.symlink_to("/dev/zero" if kind == "zeros" else "/nowhere/at/all")

    return damage


MODULE = ("line.weight", "line.bias")
REFUSED: dict[str, Damage] = {
    **{f"{name} with {number}": tensors_of(name, filled(key, number))
       for name, key in (("ema", MODULE[0]), ("module", MODULE[1]), ("module", "fixed"), ("optimizer", "0/exp_avg"))
       for number in (float("nan"), float("inf"), float("-inf"))},
    **{f"{name} of another type": tensors_of(name, filled(key, 1.0, dtype))
       for name, key in (("ema", MODULE[0]), ("module", MODULE[0]), ("optimizer", "1/exp_avg"), ("optimizer", "0/step"))
       for dtype in (torch.float64, torch.int64, torch.bfloat16)},
    **{f"{name} lacks {key}": tensors_of(name, lambda found, key=key: found.pop(key))
       for name, key in (("ema", MODULE[0]), ("module", "fixed"), ("optimizer", "0/exp_avg"), ("optimizer", "1/step"))},
    **{f"{name} has more": tensors_of(name, lambda found, key=key: found.update({key: torch.zeros(1)}))
       for name, key in (("ema", "x"), ("ema", "fixed"), ("module", "x"), ("optimizer", "x"), ("optimizer", "7/step"),
                         ("optimizer", "0/x"), ("optimizer", "-1/step"), ("optimizer", f"{'9' * 5000}/step"))},
    **{f"{name} is empty": tensors_of(name, lambda found: found.clear()) for name in ("ema", "module", "optimizer")},
    "a negative square": tensors_of("optimizer", filled("0/exp_avg_sq", -1.0)),
    "a step of zero": tensors_of("optimizer", filled("0/step", 0.0)),
    "a moment of another shape": tensors_of("optimizer", lambda found: found.update({"0/exp_avg": torch.zeros(3, 1)})),
    **{f"{name} {what}": written(f"state/{name}", content)
       for name in ("state.json", "ema.safetensors", "module.safetensors", "optimizer.safetensors")
       for what, content in (("empty", b""), ("of zeros", bytes(100)), ("not UTF-8", b"\xff\xfe{}"),
                             ("nested", b"[" * 100_000), ("a list", b"[1]"), ("not finite", b'{"step": NaN}'))},
    **{f"state.json {key} = {str(wrong)[:20]}": told("state/state.json", **{key: wrong})
       for key, values in {
           "step": (-1, 5.5, "5", True, None, [], {}, 1e300, 2**70, ...),
           "seed": ("0", None, 1.5, -1, [], ...),
           "stage": (3, None, [], {}, "x" * 10**6, "prior", ...),
           "log": (3, [], "x", {"sums": 3}, {"sums": {}}, {"num_summed": 1}, {"sums": {"a": "b"}, "num_summed": 1},
                   {"sums": {}, "num_summed": -1}, {"sums": {}, "num_summed": 1.5}, {"sums": [], "num_summed": 1}),
           "fingerprint": (3, None, [], "other"),
           "optimizer": (3, None, [], {}, "muon", "x"),
           "settings": (3, None, [], "x"),
           "scaler": (3, [], "x", {"scale": "x"}, {"scale": -1.0}, {"scale": 1e300}, {"scale": [1]}),
           "num_optimizer_tensors": (3, "x", None, -1, 1.5),
       }.items()
       for wrong in values},
    **{f"versions.json {str(wrong)[:20]}": written("versions.json", json.dumps(wrong).encode())
       for wrong in ({"runs": 3}, {"runs": None}, {"runs": [3]}, {"runs": {"a": 1}}, {"runs": "x"}, {"runs": [None]})},
    **{f"{kind} for {name}": replaced(name, kind)
       for name in ("state/state.json", "state/ema.safetensors", "state/module.safetensors",
                    "state/optimizer.safetensors")
       for kind in ("pipe", "socket", "folder", "zeros", "nowhere", "none")},
    **{f"{kind} for {name}": replaced(name, kind)
       for name in ("state", "model", "samples") for kind in ("pipe", "socket", "file", "zeros")},
    **{f"{kind} for metrics.jsonl": replaced("metrics.jsonl", kind) for kind in ("pipe", "socket", "folder", "zeros")},
}  # fmt: skip
ROW = b'{"step": 5, "loss": 1.0}\n'
TOLERATED: dict[str, Damage] = {
    "nothing": lambda run: None,
    **{f"metrics {line[:20]!r}": (lambda run, line=line: written("metrics.jsonl", (run / "metrics.jsonl").read_bytes()
                                                              + line)(run))
       for line in (b"\xff\xfe\n", b"\x00", b"[" * 100_000 + b"\n", b"[]\n", b'{"step": "x"}\n', b'{"step": NaN}\n',
                    b'{"step": 1e400}\n', b'{"step": ' + b"9" * 5000 + b"}\n", b"{}\n", b"\n", b'{"step": {}}\n')},
    **{f"{name} {kind}": replaced(name, kind)
       for name in ("recipe.json", "versions.json", "skipped.json", "run_id", "state/shards.json")
       for kind in ("pipe", "none")},
    **{f"{name} {content[:20]!r}": written(name, content)
       for name in ("recipe.json", "versions.json", "skipped.json", "state/shards.json")
       for content in (b"", b"\xff", b"{", b"[]", b"[" * 100_000, b'{"clip": 3}', b'{"a": [1]}', b'{"num_samples": 3}',
                       b'{"num_samples": {"a": "x", "b": -1, "c": 1e300}}', b'{"clip": ' + b'{"a": ' * 400
                       + b"1" + b"}" * 401)},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of five steps, and one of eight."""
    folder = tmp_path_factory.mktemp("runs")
    with torch.random.fork_rng():
        for steps in (5, 8):
            Trainer(LineTask(), line_recipe(steps=steps), folder / str(steps)).run()
    return folder / "5", folder / "8"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("damage", list(REFUSED.values()), ids=list(REFUSED))
def test_refused(runs, tmp_path, damage):
    run = shutil.copytree(runs[0], tmp_path / "run")
    damage(run)
    with pytest.raises((CheckpointError, ConfigError, TrainingError)) as refusal:
        Trainer(LineTask(), line_recipe(steps=8), run).run()
    assert len(str(refusal.value)) < 1000
    assert str(run) in str(refusal.value) or "optimizer's state" in str(refusal.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("damage", list(TOLERATED.values()), ids=list(TOLERATED))
def test_tolerated(runs, tmp_path, damage):
    run = shutil.copytree(runs[0], tmp_path / "run")
    damage(run)
    Trainer(LineTask(), line_recipe(steps=8), run).run()
    assert_equal_runs(run, runs[1])


def test_bytes_changed_anywhere(runs, tmp_path):
    """Each file of the state with one byte changed: what is not refused has whole tensors."""
    generator = torch.Generator().manual_seed(0)
    whole = load_file(runs[0] / "state" / "module.safetensors")
    run = shutil.copytree(runs[0], tmp_path / "run")
    for path in sorted((run / "state").iterdir()):
        content = path.read_bytes()
        for place, byte in torch.randint(2**30, (25, 2), generator=generator).tolist():
            changed = bytearray(content)
            changed[place % len(content)] = byte % 256
            path.write_bytes(changed)
            with contextlib.suppress(UnclipError):
                trainer = Trainer(LineTask(), line_recipe(steps=8), run)
                assert {name: p.shape for name, p in trainer.task.module.state_dict().items()} == {
                    name: tensor.shape for name, tensor in whole.items()
                }
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "before", "after", "words"),
    [
        ("clip", {}, {"text_heads": 4}, "clip.text_heads was 2 and is 4"),
        ("clip", {}, {"image_heads": 1}, "clip.image_heads was 2 and is 1"),
        ("clip", {}, {"projection_dim": 16}, "clip.projection_dim was 32 and is 16"),
        ("clip", {}, {"include_held_out": True}, "clip.include_held_out was False and is True"),
        ("clip", {}, {"text_config": {"hidden_act": "gelu"}}, "clip.text_config.hidden_act was None"),
        ("clip", {"image_config": {"layer_norm_eps": 0.1}}, {}, "clip.image_config.layer_norm_eps was 0.1"),
        ("prior", {}, {"model": {"norm_in_type": None, "dropout": 0.5}}, "prior.model.dropout was None"),
        ("decoder", {}, {"text_proj": {"clip_extra_context_tokens": 4}}, "clip_extra_context_tokens"),
        ("super_res", {}, {"low_res_size": 8}, "super_res.low_res_size was 16 and is 8"),
        ("super_res", {}, {"only_last_step": True}, "super_res.only_last_step was False and is True"),
    ],
)
def test_what_the_weights_were_trained_as_stays(tiny, tmp_path, stage, before, after, words):
    def recipe(steps: int, changes: dict):
        own = getattr(tiny(stage), stage)
        merged = {
            key: getattr(own, key) | change if isinstance(change, dict) else change for key, change in changes.items()
        }
        return tiny(stage, steps=steps, section=merged)

    first, second = recipe(1, before), recipe(2, after)
    Trainer(make_task(first), first, tmp_path).run()
    with pytest.raises(ConfigError, match=words):
        Trainer(make_task(second, run=tmp_path), second, tmp_path)
    (tmp_path / "recipe.json").unlink()  # the state says it too
    with pytest.raises(ConfigError, match=words):
        Trainer(make_task(second, run=tmp_path), second, tmp_path)
    again = recipe(2, before)
    assert Trainer(make_task(again, run=tmp_path), again, tmp_path).step == 1


def test_a_state_of_before_it_said_its_settings(tiny, tmp_path):
    recipe = tiny("clip", steps=1)
    Trainer(ClipTask(recipe), recipe, tmp_path).run()
    told("state/state.json", settings=..., num_optimizer_tensors=...)(tmp_path)
    changed = tiny("clip", steps=2, section={"image_heads": 1})
    with pytest.raises(ConfigError, match=r"clip\.image_heads was 2 and is 1"):
        Trainer(ClipTask(changed, run=tmp_path), changed, tmp_path)
    allowed = tiny("clip", steps=2, section={"weight_power": 0.1})
    assert Trainer(ClipTask(allowed, run=tmp_path), allowed, tmp_path).step == 1


def test_what_may_change(tiny, tmp_path):
    recipe = tiny("super_res", steps=1)
    Trainer(make_task(recipe), recipe, tmp_path).run()
    free = {"crop_size": 8, "blur_sigma": 1.0, "blur_share": 0.1, "noise": 0.0}
    changed = tiny("super_res", steps=2, batch_size=8, section=free)
    assert Trainer(make_task(changed), changed, tmp_path).step == 1


def test_other_adapters(tiny, tmp_path):
    whole = tiny("prior", steps=1)
    Trainer(make_task(whole), whole, tmp_path / "whole").run()
    recipe = dataclasses.replace(whole, start_from=tmp_path / "whole" / "model", lora=LoraSettings(rank=2))
    Trainer(make_task(recipe), recipe, tmp_path / "run").run()
    changed = dataclasses.replace(recipe, lora=LoraSettings(rank=2, alpha=4.0))
    with pytest.raises(ConfigError, match=r"lora\.alpha was 8.0 and is 4.0"):
        Trainer(make_task(changed), changed, tmp_path / "run")
    allowed = dataclasses.replace(recipe, steps=2, lora=LoraSettings(rank=2, dropout=0.5))
    assert Trainer(make_task(allowed), allowed, tmp_path / "run").step == 1


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("lines", {this!r})
lines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lines)
from pathlib import Path
recipe = lines.line_recipe(steps={steps}, save_every_s=0.0, sample_every_steps=1000)
print("ready", flush=True)
lines.Trainer(lines.LineTask(), recipe, Path({folder!r})).run()
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_ten_times_at_any_moment(tmp_path):
    steps, num_kills = 800, 10
    Trainer(LineTask(), line_recipe(steps=steps, sample_every_steps=1000), tmp_path / "straight").run()
    run = tmp_path / "killed"
    places = {"tests": str(Path(__file__).parent), "this": __file__, "folder": str(run), "steps": steps}
    script = textwrap.dedent(KILLED).format(**places)
    dice, reached = random.Random(0), []
    for number in range(num_kills + 1):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if number < num_kills:
            time.sleep(dice.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=120)[0]
        assert rest == ("" if number < num_kills else "done\n")
        if (run / "state").is_dir():
            reached.append(json.loads((run / "state" / "state.json").read_text())["step"])
    assert reached == sorted(reached)
    assert len(set(reached)) > 3  # the kills came at different steps
    assert reached[-1] == steps
    assert_equal_runs(tmp_path / "straight", run)
    assert not list(run.glob(".unclip-tmp*"))


@pytest.mark.slow
def test_a_prior_killed_several_times_by_the_command_line(tmp_path, pictures, clip_model):
    text = (Path(__file__).parents[2] / "recipes" / "tiny" / "prior.toml").read_text()
    for key, value in {
        "data": f'"{pictures}"',
        "clip": f'"{clip_model}"',
        "log_every_steps": "7",
        "sample_every_steps": "1000\nsave_every_s = 0.0",
    }.items():
        text = re.sub(f"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    recipe = tmp_path / "prior.toml"
    recipe.write_text(text)
    steps, num_kills = 120, 3
    straight, run = tmp_path / "straight", tmp_path / "killed"

    def started(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "unclip", "train", str(recipe), "--out", str(out), "--steps", str(steps), "-q"]
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, env=quiet, stdout=subprocess.PIPE, text=True)

    def saved() -> int:
        try:
            return json.loads((run / "state" / "state.json").read_text())["step"]
        except FileNotFoundError:  # none yet, or just being replaced
            return 0

    assert started(straight).communicate(timeout=120)[0] == f"{straight / 'model'}\n"
    dice, reached = random.Random(0), []
    for _ in range(num_kills):
        process, begun = started(run), saved()
        while saved() <= begun and process.poll() is None:
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.communicate(timeout=120)[0] == ""
        reached.append(saved())
    assert 0 < reached[0] < reached[-1] < steps
    assert started(run).communicate(timeout=120)[0] == f"{run / 'model'}\n"
    assert_equal_runs(straight, run)
    assert not list(run.glob(".unclip-tmp*"))


def test_the_generator_of_a_step():
    draws = {
        tuple(torch.rand(3, generator=step_generator(seed, step)).tolist()) for seed in (0, 1) for step in range(9)
    }
    assert len(draws) == 18
