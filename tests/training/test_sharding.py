"""Sharding in a group of one process: names, shapes, values and gradients stay. test_processes.py has two."""

import os

import pytest
import torch

from unclip.errors import ConfigError
from unclip.training import sharding
from unclip.training.clip import MAX_LOGIT_SCALE, ClipTask
from unclip.training.recipe import OptimizerRecipe
from unclip.training.sharding import is_sharded, requested_by_launcher, sharded, share_of, shared_like, whole
from unclip.training.task import make_task
from unclip.training.trainer import step_generator


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_sharded_copy_computes_what_the_module_does(group, tiny, stage):
    task = make_task(tiny(stage))
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    copy = sharded(task.module, torch.device("cpu"))
    assert is_sharded(copy)
    assert not is_sharded(task.module)
    found = copy.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(whole(found[name]), value) for name, value in before.items())
    units = [part for part in copy.modules() if isinstance(part, sharding.UNITS)]
    assert units
    assert all(is_sharded(unit) for unit in units)

    batch = task.batch(0, 4, step_generator(0, 0))
    losses = []
    for module in (task.module, copy):
        losses.append(module(batch)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    mine, theirs = (dict(module.named_parameters()) for module in (task.module, copy))
    for name, parameter in mine.items():
        if parameter.grad is None:
            assert theirs[name].grad is None
        else:
            torch.testing.assert_close(whole(theirs[name].grad), parameter.grad, rtol=1e-4, atol=1e-6)

    share_of(next(copy.parameters())).data.zero_()  # memory of its own, and the copy's
    assert all(torch.equal(value, before[name]) for name, value in task.module.state_dict().items())
    assert not whole(next(copy.parameters())).any()


def test_a_copys_temperature_is_brought_back_too(group, tiny):
    task = ClipTask(tiny("clip"))
    copy = sharded(task.module, torch.device("cpu"))
    share_of(copy.logit_scale).data.fill_(9.0)
    copy.keep_limits()
    assert whole(copy.logit_scale).item() == pytest.approx(MAX_LOGIT_SCALE)
    assert task.module.logit_scale.item() < MAX_LOGIT_SCALE


def test_a_whole_tensor_is_cut_like_another(group, tiny):
    task = make_task(tiny("prior"))
    parameter = next(p for p in sharded(task.module, torch.device("cpu")).parameters() if p.requires_grad)
    value = torch.randn(parameter.shape)
    cut = shared_like(value, parameter)
    assert type(cut) is type(parameter.data)
    assert torch.equal(whole(cut), value)
    step = torch.tensor(3.0)  # an optimizer's count is of no parameter's shape
    assert shared_like(step, parameter) is step
    assert shared_like(value, value) is value


def test_the_launchers_flag_is_taken_down(monkeypatch):
    monkeypatch.setenv(sharding.LAUNCHER_FLAG, "true")
    assert requested_by_launcher()
    assert sharding.LAUNCHER_FLAG not in os.environ
    assert not requested_by_launcher()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"optimizer": OptimizerRecipe(name="muon")}, "use 'adamw'"), ({"precision": "fp16"}, "'bf16' or 'no'")],
)
def test_what_does_not_go_with_shards(tiny, changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny("prior", shard=True, **changes)
