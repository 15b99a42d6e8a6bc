"""Inception's published layout, on random weights."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unclip.errors import MissingFileError, UnsafeFileError, WeightsError
from unclip.evaluation.inception import FEATURES, Inception, InceptionFeatures
from unclip.evaluation.measures import distances
from unclip.pipelines.convert import convert_pickle


def weights(classes):
    """Random weights that keep activations in their range, as published: counters and classifiers too."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception(fid=True).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[name] = torch.ones(shape) if name.endswith(("weight", "var")) else torch.zeros(shape)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    state |= {"fc.weight": torch.zeros(classes, FEATURES), "fc.bias": torch.zeros(classes)}
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("inception")
    state = weights(1008)
    save_file(state, place / "inception.safetensors")
    other = {"fc.weight": torch.zeros(1000, FEATURES), "fc.bias": torch.zeros(1000)}
    save_file(state | other, place / "torchvision.safetensors")
    return place


@pytest.fixture(scope="module")
def features(folder):
    return InceptionFeatures.load(folder)


def pictures():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (2, 40, 60, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(noise[0]), Image.fromarray(noise[1]), Image.new("L", (30, 30), 90)]


def test_layout():
    """Numbers of the published network: parameters without classifiers, tensors by kind, shapes here and there."""
    with torch.device("meta"):
        network = Inception(fid=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568
    state = network.state_dict()
    assert sum(name.endswith(".conv.weight") for name in state) == 94
    assert len(state) == 94 * 5  # and the four of its norm
    assert {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.bn.running_var": (32,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }.items() <= {name: tuple(value.shape) for name, value in state.items()}.items()


def test_sizes_inside():
    """35×35 of 288 channels, 17×17 of 768, 8×8 of 2048 (Szegedy et al., table 1)."""
    with torch.device("meta"):
        network, x = Inception(fid=True), torch.zeros(1, 3, 299, 299)
    sizes = {}
    for name in ("Mixed_5d", "Mixed_6e", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(lambda m, i, out, n=name: sizes.update({n: out.shape[1:]}))
    assert network(x).shape == (1, FEATURES)
    assert {name: tuple(size) for name, size in sizes.items()} == {
        "Mixed_5d": (288, 35, 35), "Mixed_6e": (768, 17, 17), "Mixed_7c": (2048, 8, 8),
    }  # fmt: skip


def test_features(features):
    found = features.look(pictures())
    assert (found.shape, found.dtype) == ((3, FEATURES), torch.float32)
    assert found.isfinite().all()
    torch.testing.assert_close(features.look(pictures()[:1]), found[:1], rtol=1e-3, atol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3
    assert (features.is_fid, "FID" in features.name) == (True, True)


def test_pictures_are_stretched_and_scaled(features, monkeypatch):
    seen = []
    monkeypatch.setattr(features.network, "forward", lambda x: seen.append(x) or x.mean(dim=(2, 3)))
    features.look([Image.new("RGB", (30, 60), (255, 0, 51))])
    assert seen[0].shape == (1, 3, 299, 299)
    torch.testing.assert_close(seen[0][0, :, 150, 150], torch.tensor([1.0, -1.0, -0.6]))


def test_the_two_kinds_of_weights(features, folder):
    other = InceptionFeatures.load(folder / "torchvision.safetensors")
    assert (other.is_fid, "FID" in other.name) == (False, False)
    one = pictures()[:1]
    assert (other.look(one) - features.look(one)).abs().max() > 1e-4  # their poolings differ at the border


def test_only_its_own_distance_is_called_fid(features):
    looked = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = distances((looked[0], looked[1]), features, (looked[0], looked[1]))
    assert "fid" in found["feature_distance"]
    assert "fid" not in found["distance"]
    assert distances((looked[0][:1], looked[1])) == {}


def test_a_state_dict_that_is_trusted_can_be_converted(features, tmp_path):
    """As the guide says it."""
    old = tmp_path / "old"
    old.mkdir()
    torch.save(weights(1008), old / "pytorch_model.bin")
    convert_pickle(old, tmp_path / "new")
    torch.testing.assert_close(InceptionFeatures.load(tmp_path / "new").look(pictures()), features.look(pictures()))


@pytest.mark.parametrize("name", ["inception.pt", "inception.pth", "weights.bin", "weights.onnx"])
def test_what_could_run_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeFileError, match="convert pickle"):
        InceptionFeatures.load(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        InceptionFeatures.load(tmp_path / "x.safetensors")
    with pytest.raises(MissingFileError, match=r"inception\.safetensors"):
        InceptionFeatures.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeFileError, match="only pickles"):
        InceptionFeatures.load(tmp_path)


def test_other_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.zeros(10, FEATURES)}, path)
    with pytest.raises(WeightsError, match=r"1008 .* or 1000 outputs"):
        InceptionFeatures.load(tmp_path)
    save_file({"fc.weight": torch.zeros(1008, FEATURES), "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}, path)
    with pytest.raises(WeightsError, match="missing"):
        InceptionFeatures.load(path)
    path.write_bytes(b"broken")
    with pytest.raises(WeightsError, match="damaged"):
        InceptionFeatures.load(path)
