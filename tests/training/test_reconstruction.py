"""Losses of super-resolution's last step: what they are, whose gradient they have, and that they train its network."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTForImageClassification

from unclip.errors import CheckpointError, ConfigError, MissingFileError, WeightsError
from unclip.training.losses import absolute_error, perceptual_loss
from unclip.training.recipe import ProcessRecipe, SuperResSettings
from unclip.training.task import make_task
from unclip.training.trainer import Trainer, step_generator

LAST = {"only_last_step": True}
MIN_SNR = ProcessRecipe(weighting="min_snr")


def save_resnet(folder) -> None:
    """A random image model of transformers that is not a CLIP."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ResNetModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))


@pytest.fixture(params=["clip", "resnet"])
def features(request, clip_model, tmp_path):
    if request.param == "clip":
        return clip_model
    save_resnet(tmp_path / "resnet")
    return tmp_path / "resnet"


def test_absolute_error():
    found, wanted = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, -0.5]])
    assert absolute_error(found, wanted)["loss"].item() == 0.75


def test_perceptual_distance(features):
    loss = perceptual_loss(features, 2.0)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    same = loss(wanted, wanted)
    assert same["loss"].item() == pytest.approx(0.0, abs=1e-6)
    noise = torch.randn(wanted.shape, generator=generator)
    near, far = (loss((wanted + size * noise).requires_grad_(), wanted) for size in (0.05, 0.5))
    assert 0 < near["perceptual"] < far["perceptual"] <= 4  # of vectors of unit length
    assert far["loss"].item() == pytest.approx((far["l1"] + 2 * far["perceptual"]).item(), rel=1e-5)
    found = (wanted + 0.1 * noise).requires_grad_()
    loss(found, wanted)["loss"].backward()
    assert found.grad is not None
    assert found.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def test_a_copy_of_the_loss_looks_with_its_own_network(features):
    """Each process that holds a shard trains a copy of the module, on its own device."""
    loss = perceptual_loss(features, 1.0)
    copied = copy.deepcopy(loss)
    looked = []
    loss.network.register_forward_hook(lambda *_: looked.append("original"))
    copied.network.register_forward_hook(lambda *_: looked.append("copy"))
    wanted, found = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    copied(found, wanted)
    assert looked == ["copy", "copy"]


def test_a_network_whose_file_lacks_weights(tmp_path):
    """transformers would draw them, and the features would be of chance."""
    save_resnet(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "layers.0" in name and name.endswith("convolution.weight"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"lacks 1 weights of the model that its config.json describes .{lost}"):
        perceptual_loss(tmp_path, 1.0)


def test_a_classifiers_checkpoint_without_a_pooling_layer(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    pixels = torch.zeros(1, 3, 16, 16)
    assert perceptual_loss(tmp_path, 1.0)(pixels, pixels)["loss"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_brightness_that_is_normalised_away_is_no_distance(clip_model):
    """Features are compared by direction: of a network that scales with its input, its length does not matter."""
    loss = perceptual_loss(clip_model, 1.0)
    straight = type(loss)(loss.network, lambda network, pixels: [pixels], 1.0)
    pixels = torch.rand(1, 3, 4, 4) + 0.1
    assert straight(0.5 * pixels, pixels)["perceptual"].item() == pytest.approx(0.0, abs=1e-6)
    assert straight(-pixels, pixels)["perceptual"].item() == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("kind", ["l1", "perceptual"])
def test_the_last_network_learns(tiny, clip_model, tmp_path, kind):
    # Predicting noise or v it could move a pixel by no more than the noise that timestep 0 has left.
    section = LAST | {"last_loss": kind, "process": ProcessRecipe(prediction_type="sample")}
    section |= {"features": clip_model} if kind == "perceptual" else {}
    recipe = tiny("super_res", section=section, steps=60, log_every_steps=1)
    task = make_task(recipe)
    names = set(task.module.state_dict())
    Trainer(task, recipe, tmp_path).run()
    assert all(name.startswith("network.") for name in names)  # the features' network is not trained, nor kept
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(row["loss"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.7 * first
    assert ("perceptual" in rows[0]) == (kind == "perceptual")
    assert (tmp_path / "model" / "super_res_last").is_dir()


def test_the_loss_is_of_the_clean_picture_as_it_would_be_drawn(tiny):
    task = make_task(tiny("super_res", section=LAST | {"last_loss": "l1"}))
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.02)
        batch = task.batch(0, 4, step_generator(0, 0))
        x_t = task.stage.process.add_noise(batch["x0"], batch["noise"], batch["t"])
        output = task.network(torch.cat([x_t, batch["enlarged"]], dim=1), batch["t"]).sample
        alpha, sigma = (getattr(task.stage.process.tables, name)[0] for name in ("alpha", "sigma"))
        drawn = alpha * x_t - sigma * output  # of a v-prediction
        found = task.module(batch)["loss"].item()
    assert found == pytest.approx((drawn - batch["x0"]).abs().mean().item(), rel=1e-4)
    assert math.isfinite(found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"last_loss": "l1"}, "needs only_last_step: set it"),
        (LAST | {"last_loss": "perceptual"}, "need each other"),
        (LAST | {"features": "x"}, "need each other"),
        (LAST | {"perceptual_weight": -1.0}, "perceptual_weight"),
        (LAST | {"last_loss": "l1", "process": MIN_SNR}, "'min_snr', but .* 'l1' has no weighting"),
        (LAST | {"last_loss": "perceptual", "features": "x", "process": MIN_SNR}, "'perceptual' has no weighting"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ConfigError, match=words):
        SuperResSettings(**settings)


def test_what_is_no_image_model(tmp_path):
    with pytest.raises(MissingFileError, match=r"has no config\.json; it must be a CLIP"):
        perceptual_loss(tmp_path, 1.0)
    save_resnet(tmp_path / "resnet")
    (tmp_path / "resnet" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match="is not an image model that transformers can load"):
        perceptual_loss(tmp_path / "resnet", 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": None}, "None.* must be 3 numbers"),
        ({"image_mean": [0.5, 0.5]}, "must be 3 numbers"),
        ({"image_std": ["a", "b", "c"]}, "must be 3 numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "above 0"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(tmp_path, settings, message):
    save_resnet(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        perceptual_loss(tmp_path, 1.0)


def test_a_network_that_takes_pictures_as_they_are(tmp_path):
    save_resnet(tmp_path)
    wanted, found = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    distances = []
    plain = {"do_normalize": False, "image_mean": [9] * 3}
    for settings in (plain, {"image_mean": [0] * 3, "image_std": [1] * 3}, {"image_mean": 0, "image_std": 1.0}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        distances.append(perceptual_loss(tmp_path, 1.0)(found, wanted)["perceptual"].item())
    assert distances[0] == distances[1] == distances[2]
