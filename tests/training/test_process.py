"""Under which diffusion process a run trains: the recipe's, that of the model it starts from, or the stage's own."""

import dataclasses
import json

import pytest
import torch

import unclip
from unclip.errors import ConfigError, UnclipError
from unclip.training.recipe import TASKS, LoraSettings, ProcessRecipe, read_recipe
from unclip.training.task import make_task, process_of, settled
from unclip.training.trainer import Trainer, step_generator

STARTS = pytest.mark.parametrize(
    ("stage", "lora"),
    [
        ("prior", None),
        ("prior", LoraSettings(rank=4)),
        ("decoder", None),
        ("decoder", LoraSettings(rank=4)),
        ("super_res", None),
    ],
    ids=["prior", "prior-lora", "decoder", "decoder-lora", "super_res"],
)
V = ProcessRecipe(prediction_type="v_prediction", variance_type="fixed_small_log", clip_range=3.0)
V_IN_FULL = ProcessRecipe(1000, "squaredcos_cap_v2", 0.0001, 0.02, "v_prediction", "fixed_small_log", 3.0)
SILENT = ProcessRecipe()


@pytest.fixture
def model(tiny, tmp_path):
    """The folder of a stage that predicts v; its weights are no longer the first ones, which predict 0."""

    def make(stage, process=V):
        task = make_task(tiny(stage, section={"process": process}))
        with torch.no_grad():
            for parameter in task.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        task.save(tmp_path / "model")
        return task, tmp_path / "model"

    return make


def loss(task):
    with torch.no_grad():
        return task.module(task.batch(0, 8, step_generator(0, 0)))["loss"].item()


def rewrite(folder, stage, **changes):
    path = folder / f"{stage}_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@STARTS
def test_what_the_recipe_does_not_state_is_the_models(tiny, model, tmp_path, stage, lora):
    first, folder = model(stage)
    recipe = tiny(stage, start_from=folder, lora=lora, section={"process": SILENT})
    task = make_task(recipe)
    assert task.stage.process == first.stage.process == process_of(V_IN_FULL)
    assert task.stage.process != TASKS[stage].process
    assert loss(task) == pytest.approx(loss(first), rel=1e-6)
    task.save(tmp_path / "again")
    name = f"{stage}_scheduler"
    again = unclip.UnCLIPScheduler.from_pretrained(tmp_path / "again", name)
    assert again.config == unclip.UnCLIPScheduler.from_pretrained(folder, name).config
    assert again.config["prediction_type"] == "v_prediction"


@STARTS
def test_another_process_than_the_models_is_refused_by_name(tiny, model, stage, lora):
    _, folder = model(stage)
    other = ProcessRecipe(prediction_type="epsilon", variance_type="fixed_small_log", clip_range=1.0)
    words = (
        rf"the recipe's {stage}\.process differs from .* \({stage}_scheduler\): "
        r"prediction_type is 'v_prediction' there and 'epsilon' here; clip_range is 3\.0 there and 1\.0 here\. "
        "Remove these settings"
    )
    with pytest.raises(ConfigError, match=words):
        make_task(tiny(stage, start_from=folder, lora=lora, section={"process": other}))
    same = ProcessRecipe(prediction_type="v_prediction", weighting="min_snr")  # the weighting is the run's own
    task = make_task(tiny(stage, start_from=folder, lora=lora, section={"process": same}))
    assert task.settings.process == dataclasses.replace(V_IN_FULL, weighting="min_snr")
    assert task.module.weighting == "min_snr"


def test_a_linear_schedule_and_no_clipping_are_the_models_too(tiny, model, tmp_path):
    linear = ProcessRecipe(500, "linear", 0.0002, 0.03, "v_prediction", "fixed_large")
    _, folder = model("super_res", linear)
    rewrite(folder, "super_res", clip_sample=False)
    recipe = tiny("super_res", start_from=folder, section={"process": SILENT, "only_last_step": True})
    task = make_task(recipe)
    assert task.stage.process == unclip.DiffusionProcess(
        500, "linear", 0.0002, 0.03, "v_prediction", "fixed_large", None
    )
    assert settled(settled(recipe)) == settled(recipe)
    task.save(tmp_path / "again")
    found = unclip.UnCLIPScheduler.from_pretrained(tmp_path / "again", "super_res_scheduler")
    assert found.process == task.stage.process
    with pytest.raises(ConfigError, match=r"clip_range is None there and 2\.0 here"):
        settled(tiny("super_res", start_from=folder, section={"process": ProcessRecipe(clip_range=2.0)}))


def test_a_siblings_scheduler_says_the_process(tiny, model):
    first, folder = model("decoder")
    scheduler = unclip.UnCLIPScheduler.from_pretrained(folder, "decoder_scheduler")
    unclip.DPMSolverMultistepScheduler.from_config(scheduler.config).save_pretrained(folder / "decoder_scheduler")
    task = make_task(tiny("decoder", start_from=folder, section={"process": SILENT}))
    assert task.stage.process == first.stage.process


def test_where_the_model_says_nothing_the_recipe_holds_as_ever(tiny, model):
    _, folder = model("super_res")
    stated = ProcessRecipe(prediction_type="sample")
    recipe = tiny("super_res", start_from=folder, section={"process": stated})
    rewrite(folder, "super_res", _class_name="PNDMScheduler")
    wanted = dataclasses.replace(TASKS["super_res"].process, prediction_type="sample")
    assert make_task(recipe).stage.process == wanted
    (folder / "super_res_scheduler" / "scheduler_config.json").unlink()
    (folder / "super_res_scheduler").rmdir()
    assert make_task(recipe).stage.process == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction_type": "flow"}, r"super_res_scheduler cannot be trained on: prediction_type is 'flow'"),
        ({"thresholding": True}, r"super_res_scheduler cannot be trained on: .*thresholding=True"),
    ],
)
def test_a_scheduler_that_is_not_implemented(tiny, model, changes, words):
    _, folder = model("super_res")
    rewrite(folder, "super_res", **changes)
    with pytest.raises(ConfigError, match=words):
        make_task(tiny("super_res", start_from=folder, section={"process": SILENT}))


def test_a_broken_scheduler_is_an_error(tiny, model):
    _, folder = model("super_res")
    (folder / "super_res_scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UnclipError, match=r"scheduler_config\.json"):
        settled(tiny("super_res", start_from=folder))


def test_the_built_in_models_super_resolution(tmp_path):
    """By its name, from a recipe without a process."""
    text = 'stage = "super_res"\ndata = "set"\nstart_from = "unclip-emoji"\n[super_res]\n'
    (tmp_path / "recipe.toml").write_text(text)
    recipe = settled(read_recipe(tmp_path / "recipe.toml"))
    assert recipe.start_from == "unclip-emoji"
    assert recipe.super_res.process.prediction_type == "v_prediction"
    (tmp_path / "recipe.toml").write_text(text + '[super_res.process]\nprediction_type = "epsilon"\n')
    with pytest.raises(ConfigError, match=r"in unclip-emoji .*prediction_type is 'v_prediction' there and 'epsilon'"):
        settled(read_recipe(tmp_path / "recipe.toml"))


# -- the run's folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny, model, tmp_path):
    """`unclip train` of a recipe file without a process that starts from the model that predicts v."""
    from typer.testing import CliRunner

    from unclip.cli.main import app

    _, folder = model("super_res")
    text = f"""
stage = "super_res"
data = "{tiny("super_res").data}"
start_from = "{folder}"
steps = 2
batch_size = 4
precision = "no"
sample_every_steps = 100

[super_res]
low_res_size = 16
crop_size = 16
"""

    def run(*options, more=""):
        (tmp_path / "recipe.toml").write_text(text + more)
        return CliRunner().invoke(app, ["train", str(tmp_path / "recipe.toml"), "-q", *map(str, options)])

    return run


def test_a_runs_recipe_says_the_process_in_full(command, tmp_path):
    run = tmp_path / "run"
    assert command("--dry-run").exit_code == 0
    done = command("--out", run, "--steps", 1)
    assert done.exit_code == 0, done.output
    told = json.loads((run / "recipe.json").read_text())["super_res"]["process"]
    assert told == dataclasses.asdict(V_IN_FULL)
    saved = json.loads((run / "model" / "super_res_scheduler" / "scheduler_config.json").read_text())
    assert (saved["prediction_type"], saved["clip_sample_range"]) == ("v_prediction", 3.0)
    for wrong in (("--out", run), ("--dry-run",)):
        done = command(*wrong, more='[super_res.process]\nprediction_type = "epsilon"\n')
        assert done.exit_code == 1
        assert "prediction_type is 'v_prediction' there and 'epsilon' here" in done.stderr
    done = command("--out", run, more='[super_res.process]\nprediction_type = "v_prediction"\n')
    assert done.exit_code == 0, done.output
    assert json.loads((run / "state" / "state.json").read_text())["step"] == 2


def test_runs_of_before(command, tmp_path):
    """Their recipe.json has no betas. A run with another process than its start is not resumed."""
    run = tmp_path / "run"
    assert command("--out", run, "--steps", 1).exit_code == 0
    recipe = json.loads((run / "recipe.json").read_text())
    process = recipe["super_res"]["process"]
    del process["beta_start"], process["beta_end"]
    (run / "recipe.json").write_text(json.dumps(recipe))
    done = command("--out", run)
    assert done.exit_code == 0, done.output
    process |= {"prediction_type": "epsilon"}
    (run / "recipe.json").write_text(json.dumps(recipe))
    done = command("--out", run, "--steps", 3)
    assert done.exit_code == 1
    assert "super_res.process.prediction_type was 'epsilon' and is 'v_prediction'" in done.stderr


def test_a_model_whose_scheduler_changed_since(tiny, model, tmp_path):
    _, folder = model("super_res")
    recipe = settled(tiny("super_res", start_from=folder, steps=1, section={"process": SILENT}))
    Trainer(make_task(recipe), recipe, tmp_path / "run").run()
    rewrite(folder, "super_res", prediction_type="sample")
    changed = settled(tiny("super_res", start_from=folder, steps=1, section={"process": SILENT}))
    with pytest.raises(ConfigError, match=r"process\.prediction_type was 'v_prediction' and is 'sample'"):
        Trainer(make_task(changed), changed, tmp_path / "run")
