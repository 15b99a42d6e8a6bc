"""Adapters: they start as nothing, are all that is trained, and end up in weights that load everywhere."""

import dataclasses
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import unclip
from unclip.errors import ConfigError, MissingDependencyError
from unclip.training.recipe import LoraSettings
from unclip.training.task import make_task
from unclip.training.trainer import Trainer, step_generator

CLASSES = {"prior": "PriorTransformer", "decoder": "UNet2DConditionModel"}
STAGES = pytest.mark.parametrize("stage", list(CLASSES))


@pytest.fixture
def adapted(tiny, tmp_path):
    """Recipe of a tiny stage with adapters, and the folder it starts from."""

    def make(stage, **changes):
        first = make_task(tiny(stage))
        with torch.no_grad():  # layers that begin at zero would hide what comes before them
            for parameter in first.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        first.save(tmp_path / "base")
        settings = {"lora": LoraSettings(rank=4), "start_from": tmp_path / "base", "steps": 8, "precision": "no"}
        return tiny(stage, **settings | changes)

    return make


@STAGES
def test_fresh_adapters_change_nothing_and_alone_are_trained(adapted, tiny, stage):
    recipe = adapted(stage)
    task, plain = make_task(recipe), make_task(tiny(stage, start_from=recipe.start_from))
    batch = plain.batch(0, 8, step_generator(0, 0))
    torch.testing.assert_close(task.module(batch)["loss"], plain.module(batch)["loss"])
    trained = {name for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


@STAGES
def test_merged_weights_load_everywhere_and_the_base_stays(adapted, stage, tmp_path):
    class_name = CLASSES[stage]
    recipe = adapted(stage)
    task = make_task(recipe)
    Trainer(task, recipe, tmp_path / "run").run()
    model, base = tmp_path / "run" / "model", recipe.start_from
    file = f"{stage}/diffusion_pytorch_model.safetensors"
    before, after = load_file(base / file), load_file(model / file)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0", "add_k_proj", "add_v_proj") for name in changed)
    assert getattr(unclip, class_name).from_pretrained(model / stage)
    assert getattr(diffusers, class_name).from_pretrained(model / stage)
    adapter = load_file(model / f"{stage}_lora" / "adapter_model.safetensors")
    assert (model / f"{stage}_lora" / "adapter_config.json").is_file()
    assert sum(t.numel() for t in adapter.values()) < 0.3 * sum(t.numel() for t in before.values())
    # what was merged computes what the adapters do: B A · alpha / rank is in the weights
    name = sorted(changed)[0]
    key = name.removesuffix(".weight")
    change = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"] * 8 / 4
    torch.testing.assert_close(after[name] - before[name], change, atol=1e-5, rtol=1e-3)


@STAGES
def test_a_run_with_adapters_goes_on_exactly(adapted, stage, tmp_path):
    recipe = adapted(stage)
    straight = Trainer(make_task(recipe), recipe, tmp_path / "straight")
    straight.run()
    half = Trainer(make_task(recipe), recipe, tmp_path / "stopped")
    for _ in range(3):
        half.take_step()
    half.save()
    half.run_folder.start(recipe, half.step)
    again = Trainer(make_task(recipe), recipe, tmp_path / "stopped")
    assert again.step == 3
    again.run()
    assert all(torch.equal(value, again.ema[name]) for name, value in straight.ema.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 800.0}, r"lora\.alpha was 8\.0 and is 800\.0"),
        ({"targets": ("to_q",)}, r"lora\.targets was \['to_q', .*\] and is \['to_q'\]"),
        ({"rank": 2}, r"lora\.rank was 4 and is 2"),
    ],
)
def test_other_adapters_are_not_gone_on_from(adapted, tmp_path, changes, words):
    recipe = adapted("prior", steps=1)
    Trainer(make_task(recipe), recipe, tmp_path / "run").run()
    changed = dataclasses.replace(recipe, steps=2, lora=dataclasses.replace(recipe.lora, **changes))
    with pytest.raises(ConfigError, match=words):
        Trainer(make_task(changed), changed, tmp_path / "run")
    allowed = dataclasses.replace(recipe, steps=2, lora=dataclasses.replace(recipe.lora, dropout=0.5))
    assert Trainer(make_task(allowed), allowed, tmp_path / "run").step == 1


def test_what_lora_needs(tiny, tmp_path, adapted, monkeypatch):
    for stage, changes in (("prior", {}), ("super_res", {"start_from": tmp_path}), ("clip", {})):
        with pytest.raises(ConfigError, match=r"\[lora\] (is for the stages prior|needs start_from)"):
            tiny(stage, lora=LoraSettings(), **changes)
    with pytest.raises(ConfigError, match=r"lora\.rank is 0"):
        LoraSettings(rank=0)
    recipe = adapted("prior", lora=LoraSettings(targets=("nobody",)))
    with pytest.raises(ConfigError, match=r"lora\.targets are nobody"):
        make_task(recipe)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="pip install peft"):
        make_task(recipe)
