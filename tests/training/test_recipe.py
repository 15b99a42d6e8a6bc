"""Recipes: what is read, and what is refused with a message that helps."""

import dataclasses
import json
import os
import re
import time
import typing
from pathlib import Path

import pytest

from unclip.errors import ConfigError, MissingDependencyError
from unclip.limits import Range
from unclip.training import recipe as recipe_module
from unclip.training.recipe import ProcessRecipe, read_recipe
from unclip.training.sections import Section
from unclip.training.task import settled

ROOT = Path(__file__).parents[2] / "recipes"
PRIOR = 'stage = "prior"\ndata = "set"\n'


@pytest.fixture
def read(tmp_path):
    def reader(text: str, **overrides):
        (tmp_path / "recipe.toml").write_text(text)
        return read_recipe(tmp_path / "recipe.toml", **overrides)

    return reader


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_of_the_repository_is_valid(path):
    recipe = read_recipe(path)
    sources = recipe.data if isinstance(recipe.data, tuple) else (recipe.data,)
    assert all(source.parent.parent.name == "runs" for source in sources)
    stage = re.sub("(_(more|composed|words|last|2))+$", "", path.stem)
    assert recipe.stage == {"judge": "clip"}.get(stage, stage)
    start = recipe.start_from  # the package's, that of another recipe's run, or an earlier version
    runs = ("runs", "emoji")
    assert (
        start is None
        or start.parts[-4:] in ((*runs, "judge", "model"), (*runs, "prior_words", "model"))
        or start.parts[-3:] == (*runs, "v4")
        or (start / "feature_extractor").is_dir()
    )
    json.dumps(recipe.as_dict())
    process = getattr(getattr(settled(recipe), recipe.stage), "process", None)
    if process is not None:
        kinds = {"prior": ("sample", 5.0)}.get(recipe.stage, ("v_prediction", 1.0))
        assert (process.prediction_type, process.clip_range) == kinds
        assert process.variance_type == "fixed_small_log"


def test_paths_are_relative_to_the_file(read, tmp_path):
    recipe = read(PRIOR + '[prior]\nclip = "../clip"\n')
    assert recipe.data == tmp_path / "set"
    assert recipe.prior.clip == tmp_path / ".." / "clip"
    assert read('stage = "prior"\ndata = "/set"\n[prior]').data == Path("/set")
    assert read('stage = "prior"\ndata = "https://host/{0..3}.tar"\n[prior]').data == "https://host/{0..3}.tar"


def test_sections_and_free_tables(read):
    recipe = read(
        PRIOR + "[optimizer]\nlearning_rate = 1\n[prior.process]\nnum_timesteps = 10\n[prior.model]\nnum_layers = 3\n"
    )
    assert recipe.optimizer.learning_rate == 1.0
    assert isinstance(recipe.optimizer.learning_rate, float)
    assert recipe.prior.process.num_timesteps == 10
    assert recipe.prior.model == {"num_layers": 3}
    assert recipe.prior.text_drop == 0.1


@pytest.mark.parametrize("stage", ["prior", "decoder", "super_res"])
def test_a_process_says_only_what_differs_from_the_stages_own(read, stage):
    text = f'stage = "{stage}"\ndata = "set"\n[{stage}]\n'

    def process(more: str = ""):
        return getattr(settled(read(text + more)), stage).process

    own = process()
    found = process(f'[{stage}.process]\nweighting = "min_snr"\n')
    assert found == dataclasses.replace(own, weighting="min_snr")
    if stage == "prior":
        assert (found.prediction_type, found.clip_range) == ("sample", 5.0)
    if stage == "decoder":
        assert found.variance_type == "learned_range"
    assert process(f"[{stage}.process]\n") == own
    assert (own.num_timesteps, own.beta_schedule, own.weighting) == (1000, "squaredcos_cap_v2", "simple")


def test_a_weighting_that_there_is_none_of(read):
    text = PRIOR + '[prior.process]\nweighting = "{}"\n'
    assert read(text.format("min_snr")).prior.process.weighting == "min_snr"
    with pytest.raises(
        ConfigError, match=r"prior\.process\.weighting is 'min-snr'; it must be one of 'simple', 'min_snr'"
    ):
        read(text.format("min-snr"))


def test_overrides(read):
    assert read(PRIOR + "steps = 5\n[prior]\n", steps=7).steps == 7
    assert read(PRIOR + "steps = 5\n[prior]\n", steps=None).steps == 5
    with pytest.raises(ConfigError, match="steps is a value of type int; it must be from 1"):
        read(PRIOR + "[prior]\n", steps=10**5000)


def test_the_recipe_as_plain_data(read):
    plain = read(PRIOR + '[prior]\nclip = "c"\n').as_dict()
    assert plain["prior"]["clip"].endswith("/c")
    assert "decoder" not in plain
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRIOR + "depth = 1\n[prior]", "unknown key depth"),
        (PRIOR + "[prior]\ndepth = 1", r"unknown key prior\.depth"),
        (PRIOR + "[prior.process]\nsteps = 1", r"unknown key prior\.process\.steps"),
        (PRIOR, r"needs a section \[prior\]"),
        (PRIOR + "[prior]\n[clip]", r"must not have a section \[clip\]"),
        ('stage = "prior"\n[prior]', "the setting data is missing"),
        ('data = "x"\n[prior]', "the setting stage is missing"),
        ('stage = "prio"\ndata = "x"', "stage is 'prio'; it must be one of 'clip'"),
        (PRIOR + 'steps = "5"\n[prior]', "steps is '5'; it must be int"),
        (PRIOR + "steps = 5.5\n[prior]", r"steps is 5\.5; it must be int"),
        (PRIOR + "steps = true\n[prior]", "steps is True; it must be int"),
        (PRIOR + "ema_decay = true\n[prior]", "ema_decay is True; it must be float"),
        ('stage = "prior"\ndata = 3\n[prior]', "data is 3; it must be a path"),
        ('stage = "prior"\ndata = "a\\u0000b"\n[prior]', "it must be a path"),
        (PRIOR + "prior = 3", r"prior is 3; it must be a section \[prior\]"),
        (PRIOR + "optimizer = 3\n[prior]", "optimizer is 3; it must be a section"),
        (PRIOR + "[prior]\nmodel = 3", r"prior\.model is 3; it must be a section"),
        (PRIOR + "steps = 0\n[prior]", "steps is 0; it must be from 1 to 1,000,000,000"),
        (PRIOR + "seed = -1\n[prior]", "seed is -1; it must be from 0 to"),
        (
            PRIOR + "seed = 18446744073709551616\n[prior]",
            "seed is 18446744073709551616; it must be from 0 to 18,446,744,073,709,551,615",
        ),
        (PRIOR + "ema_decay = 1.0\n[prior]", r"ema_decay is 1\.0; it must be from 0 to below 1"),
        (PRIOR + "batch_size = 10\naccumulation = 3\n[prior]", "not a multiple of accumulation 3"),
        (PRIOR + "max_skipped_share = 1.01\n[prior]", r"max_skipped_share is 1\.01; it must be from 0 to 1"),
        (PRIOR + "save_every_s = nan\n[prior]", "save_every_s is nan"),
        (PRIOR + "[optimizer]\nlearning_rate = inf\n[prior]", r"optimizer\.learning_rate is inf"),
        (PRIOR + "[prior]\ntext_drop = 1.5", r"prior\.text_drop is 1\.5; it must be from 0 to 1"),
        ('stage = "clip"\ndata = "x"\n[clip]\ncontext_length = 2', r"clip\.context_length is 2"),
        ("stage = ", "cannot be read as TOML"),
    ],
)
def test_bad_recipes(read, text, words):
    with pytest.raises(ConfigError, match=words):
        read(text)


CLIP = 'stage = "clip"\ndata = "set"\n[clip]\n'
SUPER_RES = 'stage = "super_res"\ndata = "set"\n[super_res]\n'
LORA = PRIOR + 'start_from = "m"\n[prior]\n[lora]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRIOR + "batch_size = 1000000000000\n[prior]", "batch_size is 1000000000000; it must be from 1 to"),
        (PRIOR + "steps = 100000000000000000000\n[prior]", "it must be finite, and at most 2"),
        (PRIOR + f"steps = {'9' * 400}\n[prior]", "steps is 9{40}; it must be finite"),
        (PRIOR + f"steps = {'9' * 5000}\n[prior]", "cannot be read as TOML"),
        (PRIOR + f"steps = 0x{'f' * 16_000}\n[prior]", "steps is a value of type int; it must be finite"),
        (PRIOR + "steps = -5\n[prior]", "steps is -5"),
        (PRIOR + "accumulation = 0\n[prior]", "accumulation is 0"),
        (PRIOR + "reader_workers = 1000000000\n[prior]", "reader_workers is 1000000000; it must be from 1 to 1,024"),
        (PRIOR + "save_every_s = -1\n[prior]", "save_every_s is -1"),
        (PRIOR + "[optimizer]\neps = 1e-300\n[prior]", r"optimizer\.eps is 1e-300"),
        (PRIOR + "[optimizer]\nlearning_rate = 1e300\n[prior]", r"optimizer\.learning_rate is 1e\+300"),
        (PRIOR + "[optimizer]\nbeta1 = 1\n[prior]", r"optimizer\.beta1 is 1\.0; it must be from 0 to below 1"),
        (PRIOR + "[optimizer]\nwarmup_steps = -1\n[prior]", r"optimizer\.warmup_steps is -1"),
        (PRIOR + "[prior.process]\nclip_range = 1e300", r"process\.clip_range is 1e\+300"),
        (PRIOR + "[prior.model]\nnorm_eps = nan", r"prior\.model\.norm_eps is nan; it must be finite"),
        (PRIOR + "[prior.model]\nx = 2020-01-01", r"prior\.model\.x is a date"),
        (PRIOR + f"[prior.model]\nx = {'9' * 40}", r"prior\.model\.x is 9{40}; it must be finite"),
        (PRIOR + f'[prior.model]\nx = "{"x" * 10**6}"', r"it has 1,000,\d+ bytes"),
        (PRIOR + f"{'x' * 5000} = 1\n[prior]", "its name is too long"),
        (f'stage = "prior"\ndata = "{"x" * 10**4}"\n[prior]', "data is a text of 10,000 characters"),
        (PRIOR + f"[prior]\nx = {'[' * 8_000}{']' * 8_000}", "recursion depth"),
        (PRIOR + f"[prior]\nx = {'[' * 100}{']' * 100}", "nested too deeply"),
        (PRIOR + f"[prior]\nx = {'[' * 20_000}{']' * 20_000}", "a line of more than 16,384 characters"),
        (PRIOR + f"[prior]\nx = {'[' * 100_000}{']' * 100_000}", "has .* bytes; at most 65,536"),
        (PRIOR + f"[prior.{'.'.join('a' * 8_000)}]", "nested too deeply"),
        (PRIOR + f"[prior]\nx = {'{a=' * 50}1{'}' * 50}", "nested too deeply"),
        ("#" * 2**21, "bytes; at most"),
        ('stage = "prior"\ndata = "~nobody-of-that-name/x"\n[prior]', "home directory"),
        ('stage = "prior"\ndata = "set"\n[prior]\nclip = "~nobody-of-that-name/x"', "prior.clip is .* home directory"),
        ('stage = "prior"\ndata = "x/{0..999999999999}.tar"\n[prior]', "more than 1,000,000 shards"),
        ('stage = "prior"\ndata = "x/{0..9999}/{0..9999}.tar"\n[prior]', "more than 1,000,000 shards"),
        ('stage = "prior"\ndata = ["https://host/{0..99999999}.tar"]\n[prior]', "more than 1,000,000 shards"),
        ('stage = "prior"\ndata = []\n[prior]', r"data is \[\]; it must be a path"),
        (CLIP + "projection_dim = 1000000000", r"clip\.projection_dim is 1000000000; it must be from 1 to 16,384"),
        (CLIP + "vocabulary_size = 100", r"clip\.vocabulary_size is 100; it must be from 514"),
        (CLIP + "text_layers = 1000", r"clip\.text_layers is 1000; it must be from 1 to 256"),
        (CLIP + "image_size = 100000", r"clip\.image_size is 100000"),
        (CLIP + "weight_power = 400", r"clip\.weight_power is 400"),
        (CLIP + "context_length = 1000000", r"clip\.context_length is 1000000"),
        (SUPER_RES + "blur_sigma = 1e-300", r"super_res\.blur_sigma is 1e-300; it must be from 0\.01 to 100"),
        (SUPER_RES + "low_res_size = 1000000000", r"super_res\.low_res_size is 1000000000"),
        (SUPER_RES + "crop_size = 0", r"super_res\.crop_size is 0"),
        (SUPER_RES + "noise = -0.1", r"super_res\.noise is -0\.1"),
        (LORA + "rank = 1000000000", r"lora\.rank is 1000000000"),
        (LORA + "dropout = 2.0", r"lora\.dropout is 2\.0"),
        (LORA + "targets = []", r"the number of entries in lora\.targets is 0"),
    ],
    ids=lambda text: text[:60] if len(text) < 200 else f"{text[:40]}...",
)
def test_numbers_and_texts_without_measure(read, text, words):
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=words) as refusal:
        read(text)
    assert time.perf_counter() - begun < 1
    assert len(str(refusal.value)) < 1000


def test_every_number_has_limits():
    """A new setting must say its own."""
    for name, kind in vars(recipe_module).items():
        if isinstance(kind, type) and issubclass(kind, Section) and kind not in (Section, ProcessRecipe):
            hints = typing.get_type_hints(kind, include_extras=True)
            for field in dataclasses.fields(kind):
                if typing.get_type_hints(kind)[field.name] in (int, float):
                    limits = [each for each in hints[field.name].__metadata__ if isinstance(each, Range)]
                    assert limits, f"{name}.{field.name}"
                    assert limits[0].high < float("inf")
                    assert field.default in limits[0], f"{name}.{field.name}"
                    assert float("nan") not in limits[0]


@pytest.mark.parametrize(
    ("process", "words"),
    [
        ("num_timesteps = 0", "num_timesteps is 0"),
        ("num_timesteps = 1000000000", "num_timesteps is 1000000000"),
        ('beta_schedule = "x"', "beta_schedule"),
        ("beta_start = 2.0\nbeta_schedule = 'linear'", "beta"),
        ('prediction_type = ""', "prediction_type"),
    ],
)
def test_a_process_that_there_is_none_of(read, process, words):
    with pytest.raises(ConfigError, match=rf"\[prior\.process\] cannot be used: .*{words}"):
        settled(read(PRIOR + f"[prior.process]\n{process}"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_place_of_a_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_recipe(tmp_path)


def test_a_byte_order_mark(tmp_path):
    (tmp_path / "recipe.toml").write_text("\ufeff" + PRIOR + "[prior]", encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml").stage == "prior"


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'stage = "\xe9"')
    with pytest.raises(ConfigError, match="utf-8"):
        read_recipe(tmp_path / "latin.toml")


def test_further_settings_of_a_clip(read):
    text = 'stage = "clip"\ndata = "set"\n[clip]\ntext_heads = 2\n[clip.text_config]\nhidden_size = 8\n'
    recipe = read(text)
    assert recipe.clip.text_config == {"hidden_size": 8}
    assert recipe.as_dict()["clip"]["text_config"] == {"hidden_size": 8}
    with pytest.raises(ConfigError, match=r"clip.text_config is 3; it must be a section \[clip.text_config\]"):
        read('stage = "clip"\ndata = "set"\n[clip]\ntext_config = 3\n')


def test_trackers(read, monkeypatch):
    assert read(TRACKED.format('["tensorboard"]')).trackers == ("tensorboard",)
    for value, words in (
        ('["nobody"]', "it must be one of 'tensorboard'"),
        ('"tensorboard"', "must be a list"),
        ("[1]", "one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(TRACKED.format(value))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        read(TRACKED.format('["wandb"]'))


TRACKED = 'stage = "prior"\ndata = "set"\ntrackers = {}\n[prior]\n'
