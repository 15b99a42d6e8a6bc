"""Files of DALLE2-pytorch and MindEye: what is read, what is refused, and the questions that are asked."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from packaging.version import Version

from unclip import CheckpointError, ConfigError, InputError, MissingFileError, UnsafeFileError, WeightsError
from unclip.checkpoints.dalle2 import read_prior_file
from unclip.checkpoints.families import recognised
from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
from unclip.pipelines.convert_dalle2 import convert_dalle2_prior
from unclip.pipelines.embedding_prior import EmbeddingPrior

SMALL = {"embedding_dim": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 6}
TEXT = SMALL | {"max_text_len": 3, "num_timesteps": 10, "use_text_encodings": True, "normalized": True}
GRID = SMALL | {"num_tokens": 4, "causal": False}


def package_state(settings=TEXT, old_null=False, seed=0, **more):
    """The weights of a network by the package's names, with its betas."""
    network = EmbeddingPriorNetwork(**settings, **more)
    network.initialize_for_training(torch.Generator().manual_seed(seed))
    state = {f"net.{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}
    state["net.causal_transformer.layers.0.0.rotary_emb.freqs"] = 10_000 ** (-torch.arange(0, 6, 2) / 6)
    if old_null:
        state["net.null_text_embed"] = state.pop("net.null_text_encodings")
        for name in ("null_text_embeds", "null_image_embed"):
            state.pop(f"net.{name}", None)
    bars = torch.cos((torch.linspace(0, 10, 11, dtype=torch.float64) / 10 + 0.008) / 1.008 * torch.pi / 2) ** 2
    return state | {"noise_scheduler.betas": (1 - bars[1:] / bars[:-1]).clamp(max=0.999).float()}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="prior.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def trainer_content(**more):
    """What DiffusionPriorTrainer.save writes."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    average = {"initted": torch.tensor([True]), "step": torch.tensor([5])}
    average |= {f"online_model.{name}": tensor for name, tensor in package_state(seed=1).items()}
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": {"lr_lambdas": [None]},
        "warmup_scheduler": optimizer,  # an object, as that of pytorch_warmup
        "model": package_state(seed=1),
        "version": Version("1.15.6"),
        "step": torch.tensor([5]),
        "ema": average | {f"ema_model.{name}": tensor for name, tensor in package_state(seed=2).items()},
        "ema_model": package_state(seed=2),
        **more,
    }


@pytest.mark.parametrize(("weights", "seed", "place"), [("ema", 2, "ema_model"), ("online", 1, "model")])
def test_a_trainer_s_file(saved, tmp_path, weights, seed, place):
    path = saved(trainer_content())
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)  # why torch alone does not read it
    found = read_prior_file(path, weights=weights)
    assert (found.version, found.source) == ((1, 15, 6), place)
    wanted = package_state(seed=seed)["net.null_image_embed"]
    assert torch.equal(found.state["null_image_embed"], wanted)
    convert_dalle2_prior(path, tmp_path / "out", weights=weights)
    prior = EmbeddingPrior.from_pretrained(tmp_path / "out")
    assert torch.equal(prior.prior.null_image_embed, wanted)
    assert prior.prior.config.use_text_encodings
    assert (prior.scheduler.process.num_timesteps, prior.scheduler.process.prediction_type) == (10, "sample")
    assert prior.scheduler.process.clip_range is None


def test_versions_in_the_form_of_older_libraries(saved):
    class Old:
        def __init__(self, text):
            self.text = text

        def __reduce__(self):
            return (Version, (self.text,))

    assert read_prior_file(saved(trainer_content(version=Old("1.4.6")))).version == (1, 4, 6)
    assert read_prior_file(saved(trainer_content(version="1.8.0"))).version == (1, 8, 0)


class Runs:
    """Its pickle creates a file when it is loaded by pickle."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        return (self.function, (f"touch {self.path}",))


@pytest.mark.parametrize("function", [os.system, eval, getattr])
def test_a_crafted_pickle_runs_nothing(saved, tmp_path, function):
    mark = tmp_path / "it_ran"
    path = saved(trainer_content(step=Runs(mark, function)))
    for read in (read_prior_file, lambda file: convert_dalle2_prior(file, tmp_path / "out")):
        with pytest.raises(UnsafeFileError, match="refused"):
            read(path)
    assert function.__name__ in str(recognised(path).missing)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_classes_of_optimizers_are_never_imported(saved, monkeypatch):
    """An inert object takes their place, so that not even a harmless constructor runs."""
    path = saved(trainer_content())
    monkeypatch.setattr(torch.optim.AdamW, "__setstate__", lambda *_: pytest.fail("it was called"))
    assert read_prior_file(path).version


def test_files_that_are_not_checkpoints(saved, tmp_path):
    old = tmp_path / "old.pth"
    torch.save(package_state(), old, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="zip format"):
        read_prior_file(old)
    with pytest.raises(WeightsError, match="no prior of DALLE2-pytorch"):
        read_prior_file(saved({"weight": torch.zeros(2)}))
    with pytest.raises(MissingFileError):
        read_prior_file(tmp_path / "nothing.pth")
    whole = saved(package_state(), "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        read_prior_file(tmp_path / "cut.pth")
    broken = package_state()
    broken["net.learned_query"][0] = float("nan")
    with pytest.raises(WeightsError, match="learned_query"):
        read_prior_file(saved(broken))


def test_questions(saved, tmp_path):
    out = tmp_path / "out"
    old = {"arithmetic": "1.4.3"}
    with pytest.raises(ConfigError, match=r"0\.23\.1, 0\.23\.3, 1\.4\.3 on.*Which one was it.*--package-version"):
        convert_dalle2_prior(saved(package_state(old_null=True, **old)), out)
    with pytest.raises(ConfigError, match=r"1\.9, 1\.10\.5 on"):
        convert_dalle2_prior(saved(package_state()), out)
    with pytest.raises(ConfigError, match=r"0\.15, 0\.16\.2 on"):
        convert_dalle2_prior(saved(package_state(arithmetic="0.16.2")), out)
    with pytest.raises(ConfigError, match=r"version 1\.9\.0 .* has other weights"):
        convert_dalle2_prior(saved(package_state(old_null=True, **old)), out, package_version="1.9.0")
    with pytest.raises(InputError, match=r"must look like 1\.15\.6"):
        convert_dalle2_prior(saved(package_state()), out, package_version="newest")
    with pytest.raises(ConfigError, match="Which project trained it"):
        convert_dalle2_prior(saved(package_state(GRID)), out)
    without = {name: value for name, value in package_state().items() if not name.endswith("freqs")}
    with pytest.raises(ConfigError, match="trained with rotary_emb"):
        convert_dalle2_prior(saved(without), out, package_version="1.15.6")
    assert not out.exists()
    made = convert_dalle2_prior(saved(package_state(old_null=True, **old)), out, package_version="1.8.0")
    assert EmbeddingPrior.from_pretrained(made).prior.config.arithmetic == "1.4.3"


def test_what_the_package_s_configuration_states(saved, tmp_path):
    path, config = saved(package_state()), tmp_path / "prior_config.json"

    def convert(**prior):
        config.write_text(json.dumps({"prior": prior}))
        made = convert_dalle2_prior(path, tmp_path / "out", package_version="1.15.6", config=config, overwrite=True)
        return EmbeddingPrior.from_pretrained(made)

    made = convert(predict_x_start=False, image_embed_scale=2.0, sampling_final_clamp_l2norm=True)
    assert made.scheduler.process.prediction_type == "epsilon"
    assert made.scheduler.process.clip_range == 1
    assert (made.prior.config.scale, made.prior.config.sampling_final_clamp_l2norm) == (2.0, True)
    assert convert(predict_v=True).scheduler.process.prediction_type == "v_prediction"
    assert not convert(condition_on_text_encodings=False).prior.config.use_text_encodings
    with pytest.raises(WeightsError, match="depth 1, but the configuration has 3"):
        convert(net={"depth": 3})
    with pytest.raises(ConfigError, match="self_cond"):
        convert(net={"self_cond": True})


def test_weights_that_do_not_fit(saved, tmp_path):
    for change, words in (
        (lambda s: s.pop("net.learned_query"), "lacks learned_query"),
        (lambda s: s.pop("net.causal_transformer.layers.0.0.to_q.weight"), "is not complete"),
        (lambda s: s.update({"net.extra": torch.zeros(2)}), "unknown extra"),
        (lambda s: s.update({"net.learned_query": torch.zeros(9)}), r"learned_query .* is \(9,\).*needs \(8,\)"),
    ):
        state = package_state()
        change(state)
        with pytest.raises(WeightsError, match=words):
            convert_dalle2_prior(saved(state), tmp_path / "out", package_version="1.15.6")
    odd = package_state() | {"noise_scheduler.betas": torch.full((10,), 0.03)}
    with pytest.raises(ConfigError, match="schedule of noise"):
        convert_dalle2_prior(saved(odd), tmp_path / "out", package_version="1.15.6")


def test_files_are_recognised_without_unpickling(saved, tmp_path, monkeypatch):
    files = {
        "trainer.pth": trainer_content(),
        "old.pth": package_state(old_null=True, arithmetic="1.4.3"),
        "grid.pth": {"model_state_dict": package_state(GRID)},
        "other.pth": {"weight": torch.zeros(2)},
        "karlo.ckpt": {"state_dict": {"model_first_steps.out.0.weight": torch.zeros(2)}},
    }
    paths = {name: saved(content, name) for name, content in files.items()}
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    found = {name: recognised(path) for name, path in paths.items()}
    assert found["trainer.pth"].name == "DALLE2-pytorch: a prior (trainer's file)"
    assert found["trainer.pth"].missing == ()
    assert found["trainer.pth"].next == f"unclip convert dalle2-prior {paths['trainer.pth']} --out DIR"
    assert found["old.pth"].missing == ("the version of DALLE2-pytorch that trained it",)
    assert "--package-version X.Y.Z" in found["old.pth"].next
    assert found["grid.pth"].name.startswith("MindEye: a prior on a grid of tokens")
    assert "--project mindeye1" in found["grid.pth"].next
    assert found["other.pth"] is None
    assert found["karlo.ckpt"].name == "Karlo's original super-resolution"
    assert "in trainer.pth" in recognised(tmp_path).name or "in grid.pth" in recognised(tmp_path).name


def test_damaged_files_are_not_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.pth", "w"):
        pass
    (tmp_path / "text.pth").write_text("nothing")
    assert recognised(tmp_path / "empty.pth") is None
    assert recognised(tmp_path / "text.pth") is None
    with zipfile.ZipFile(tmp_path / "odd.pth", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02X\xff\xff\xff\xff")
    with pytest.raises(CheckpointError, match="damaged"):
        recognised(tmp_path / "odd.pth")
