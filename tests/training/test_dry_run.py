"""A dry run: its figures are those of the run, and nothing stays."""

import pytest

from unclip.cli.train import duration
from unclip.training.dry_run import measure_cost
from unclip.training.task import make_task


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "super_res"])
def test_figures(tiny, stage, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = tiny(stage, steps=500, batch_size=8)
    task = make_task(recipe)
    cost = measure_cost(task, recipe, num_steps=2)
    assert not list(tmp_path.iterdir())
    trained = [p for p in task.module.parameters() if p.requires_grad]
    assert cost.trained == sum(p.numel() for p in trained)
    assert sum(cost.parameters.values()) <= sum(p.numel() for p in task.module.parameters())
    # weights and average and gradient and AdamW's two moments, four bytes each, and some that are not trained
    assert 0.99 < cost.state_bytes / (5 * 4 * cost.trained) < 1.1
    assert cost.peak_bytes > cost.state_bytes
    assert 0 < cost.step_s < 60
    sizes = {"clip": ((32,), (32,)), "prior": ((32,), ()), "decoder": ((16, 32), (16,)), "super_res": ((32,), (16,))}
    assert (cost.read_px, cost.trained_px) == sizes[stage]
    assert cost.total_s == cost.step_s * 500


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.4, "12 s"), (150, "2 min"), (7500, "2 h 05 min"), (360000, "100 h 00 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
