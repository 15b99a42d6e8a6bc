"""Two processes do what one does, each with all of the weights or with a shard of them, for every stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unclip
from unclip.data.shard_writer import write_shards

ROOT = Path(__file__).parents[2]
STEPS = 6
STAGES = pytest.mark.parametrize("stage", ["clip", "prior", "prior_autoregressive", "decoder", "super_res"])

pytestmark = pytest.mark.slow


LAUNCHERS = {
    "alone": [sys.executable],
    "replicated": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "sharded": [
        *[sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        *["--use_fsdp", "--fsdp_version", "2"],
    ],
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def train(folder: Path, stage: str, out: str, launcher: str, *, steps: int = STEPS) -> None:
    """`unclip train` on a tiny recipe, by one of the launchers."""
    recipe = str(folder / "recipes" / "tiny" / f"{stage}.toml")
    unclip = ["-m", "unclip", "train", recipe, "--out", out, "--steps", str(steps), "-q"]
    done = run([*LAUNCHERS[launcher], *unclip], folder)
    assert done.stdout == f"{out}/model\n"
    assert "Warning" not in done.stderr


@pytest.fixture
def place(tmp_path, pictures, clip_model):
    shutil.copytree(ROOT / "recipes" / "tiny", tmp_path / "recipes" / "tiny")
    for recipe in (tmp_path / "recipes" / "tiny").glob("*.toml"):
        text = recipe.read_text().replace("log_every_steps = 10", "log_every_steps = 1")
        recipe.write_text(text)
    shutil.copytree(pictures, tmp_path / "runs" / "tiny" / "data")
    shutil.copytree(clip_model, tmp_path / "runs" / "tiny" / "clip" / "model")
    return tmp_path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path) -> None:
    """Losses to 1e-5 of one another, and weights to what AdamW makes of the rounding of gradients."""
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-5, atol=0)
    for name in ("module", "ema"):
        mine, theirs = (load_file(run / "state" / f"{name}.safetensors") for run in (one, two))
        assert mine.keys() == theirs.keys()
        for key in mine:
            # A shift of all keys changes no attention, so the gradient of their bias is rounding, which AdamW blows up.
            torch.testing.assert_close(theirs[key], mine[key], rtol=1e-5, atol=5e-4)


@STAGES
@pytest.mark.parametrize("launcher", ["replicated", "sharded"])
def test_two_processes_do_what_one_does(place, stage, launcher):
    train(place, stage, "one", "alone")
    train(place, stage, "two", launcher)
    assert len(losses(place / "one")) == STEPS
    assert_same_run(place / "one", place / "two")
    shapes = [
        {name: value.shape for name, value in load_file(place / run / "state" / "optimizer.safetensors").items()}
        for run in ("one", "two")
    ]
    assert shapes[0] == shapes[1]  # what was cut is whole again


CHANGES = {
    "accumulation": ("prior", "steps = ", "accumulation = 2\nsteps = "),
    "lora": ("decoder", "[decoder]", "[lora]\nrank = 4\n\n[decoder]"),
    "perceptual": (
        "super_res_last",
        'last_loss = "l1"',
        'last_loss = "perceptual"\nfeatures = "../../runs/tiny/clip/model"',
    ),
}
"""A setting: the recipe, and what stands in it in place of what."""


@pytest.mark.parametrize(
    ("setting", "launcher"),
    [
        ("accumulation", "replicated"),
        ("accumulation", "sharded"),
        ("lora", "replicated"),
        ("lora", "sharded"),
        ("perceptual", "sharded"),
    ],
)
def test_two_processes_with_further_settings(place, setting, launcher):
    stage, old, new = CHANGES[setting]
    recipe = place / "recipes" / "tiny" / f"{stage}.toml"
    if setting == "lora":
        train(place, stage, "base", "alone", steps=1)
        recipe.write_text(recipe.read_text().replace("steps = ", 'start_from = "../../base/model"\nsteps = ', 1))
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    assert new in recipe.read_text()
    train(place, stage, "one", "alone")
    train(place, stage, "two", launcher)
    assert len(losses(place / "one")) == STEPS
    assert_same_run(place / "one", place / "two")
    assert setting != "lora" or all(".lora_" in name for name in load_file(place / "two" / "state" / "ema.safetensors"))


PARTING = """
import pathlib, sys
from unclip.training.task import make_task
from unclip.training.recipe import read_recipe
from unclip.training.trainer import Trainer
recipe = read_recipe(pathlib.Path(sys.argv[1]), steps=1, shard=sys.argv[2] == "sharded")
trainer = Trainer(make_task(recipe), recipe, pathlib.Path("two"))
threads = lambda: " ".join(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
during = threads()
trainer.run()
pathlib.Path(f"threads-{trainer.accelerator.process_index}").write_text(during + chr(10) + threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux tells them")
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_nothing_of_the_process_group_is_left(place, kind):
    """Its last holder would wait for its thread with the interpreter's lock in hand, and the thread for the lock."""
    (place / "parting.py").write_text(PARTING)
    recipe = place / "recipes" / "tiny" / "super_res.toml"
    command = [*LAUNCHERS["replicated"][1:], "parting.py", str(recipe), kind]
    run([sys.executable, *command], place)
    for rank in range(2):
        during, after = (place / f"threads-{rank}").read_text().splitlines()
        assert "gloo" in during
        assert "gloo" not in after


TABLES = """
import pathlib, sys
import torch
from accelerate import PartialState
from unclip.training.task import make_task
from unclip.training.recipe import read_recipe
task = make_task(read_recipe(pathlib.Path(sys.argv[1])))
torch.save(task.stage.prior.dot_edges, f"edges-{PartialState().process_index}.pt")
"""


def to_shards(place: Path, stage: str) -> None:
    """The recipe's data as shards, of which each of two processes has its own."""
    data = place / "runs" / "tiny" / "data"
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    parts = [
        {"png": (data / row["file_name"]).read_bytes(), "json": json.dumps({"captions": row["captions"]}).encode()}
        for row in rows
    ]
    (place / "shards").mkdir()
    write_shards(((f"{n:04}", part) for n, part in enumerate(parts * 2)), place / "shards", per_shard=4)
    recipe = place / "recipes" / "tiny" / f"{stage}.toml"
    recipe.write_text(recipe.read_text().replace('data = "', 'data = "../../shards" # '))


def test_processes_that_read_their_own_shards_have_one_language(place):
    to_shards(place, "prior_autoregressive")
    (place / "tables.py").write_text(TABLES)
    recipe = str(place / "recipes" / "tiny" / "prior_autoregressive.toml")
    run([*LAUNCHERS["replicated"], "tables.py", recipe], place)
    one, two = (torch.load(place / f"edges-{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one, two)
    train(place, "prior_autoregressive", "two", "sharded", steps=3)
    assert len(losses(place / "two")) == 3


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_run_goes_from_shards_to_one_process_and_back(place, stage):
    recipe = place / "recipes" / "tiny" / f"{stage}.toml"
    recipe.write_text(recipe.read_text().replace("[optimizer]", "[optimizer]\ndecay_share = 0.0"))
    train(place, stage, "one", "alone", steps=9)
    for steps, launcher in ((3, "sharded"), (6, "alone"), (9, "sharded")):
        train(place, stage, "two", launcher, steps=steps)
    assert len(losses(place / "two")) == 9
    assert_same_run(place / "one", place / "two")
    network = {"prior": unclip.PriorTransformer, "decoder": unclip.UNet2DConditionModel}[stage]
    model = network.from_pretrained(place / "two" / "model" / stage)
    ema = load_file(place / "two" / "state" / "ema.safetensors")
    found = {f"{stage}.{name}": value for name, value in model.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in ema.items() if name in found)


def test_what_any_process_could_not_read_is_listed(place):
    data = place / "runs" / "tiny" / "data"
    shards = place / "shards"
    shards.mkdir()
    picture = (data / json.loads((data / "metadata.jsonl").read_text().splitlines()[0])["file_name"]).read_bytes()
    samples = ((f"{n:04}", {"png": b"no" if n in (0, 5) else picture, "txt": b"a shape"}) for n in range(10))
    write_shards(samples, shards, per_shard=5)
    recipe = place / "recipes" / "tiny" / "super_res.toml"
    recipe.write_text(recipe.read_text().replace('data = "', 'max_skipped_share = 0.5\ndata = "../../shards" # '))
    train(place, "super_res", "two", "replicated", steps=2)
    assert len(json.loads((place / "two" / "skipped.json").read_text())) == 2
