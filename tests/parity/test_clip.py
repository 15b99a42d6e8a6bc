"""The same weights in transformers' CLIP classes and in ours give the same tensors."""

import importlib.resources
import json

import pytest
import torch
import transformers

from unclip import ConfigError, InputError, WeightsError
from unclip.clip.networks import CLIPImageEncoder, CLIPImageEncoderConfig, CLIPTextEncoder, CLIPTextEncoderConfig

from ..rounding import assert_equal_but_rounding

END, VOCABULARY, CONTEXT = 29, 31, 9
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": END, "bos_token_id": 28}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
BUILT_IN = importlib.resources.files("unclip") / "assets" / "emoji"
KINDS = {
    "text": (CLIPTextEncoder, transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig, TEXT),
    "vision": (CLIPImageEncoder, transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig, VISION),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def twins(kind, folder, dtype=torch.float32, **settings):
    """Transformers' model and ours, read from one folder that transformers wrote."""
    ours, theirs, config, base = KINDS[kind]
    torch.manual_seed(0)
    reference = theirs(config(**{**base, **settings})).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            is_scale = name.endswith("weight") and parameter.dim() == 1
            parameter.normal_(mean=float(is_scale), std=0.3)
    reference.save_pretrained(folder)
    return theirs.from_pretrained(folder, dtype=dtype).eval(), ours.from_pretrained(folder, torch_dtype=dtype)


def captions(length=CONTEXT):
    """Token numbers [4, length]; the captions end at different places, the last nowhere, with padding of more ends."""
    ids = torch.randint(0, 28, (4, length), generator=torch.Generator().manual_seed(1))
    for row, place in enumerate((1, length // 2, length - 1)):
        ids[row, place:] = END
    return ids


def pictures(**settings):
    side = {**VISION, **settings}["image_size"]
    return torch.randn(3, settings.get("num_channels", 3), side, side, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def compare_text(agree):
    def compare(reference, ours, ids, mask=None):
        mine = ours(ids, mask)
        agree("networks", of_text(mine), lambda: of_text(reference(input_ids=ids, attention_mask=mask)), [reference])
        return mine

    return torch.no_grad()(compare)


@pytest.fixture
def compare_vision(agree):
    def compare(reference, ours, pixels):
        mine = ours(pixels)
        agree("networks", of_vision(mine), lambda: of_vision(reference(pixel_values=pixels)), [reference])
        return mine

    return torch.no_grad()(compare)


def of_text(output):
    return output.text_embeds, output.last_hidden_state


def of_vision(output):
    return output.image_embeds, output.last_hidden_state


# ---- captions ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 1, "num_hidden_layers": 1},
        {"layer_norm_eps": 1e-2},
        {"eos_token_id": 2},
        {"eos_token_id": 5, "pad_token_id": 1},
        {"projection_dim": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 4, CONTEXT])
def test_captions(compare_text, tmp_path, settings, length):
    reference, ours = twins("text", tmp_path, **settings)
    mine = compare_text(reference, ours, captions(length))
    assert mine.text_embeds.shape == (4, settings.get("projection_dim", 10))
    assert mine.last_hidden_state.shape == (4, length, 24)


def test_the_two_rules_of_where_a_caption_ends(compare_text, tmp_path):
    """The first end-of-text token; or, in old files, which call it 2, the largest number."""
    ids = torch.tensor([[28, 3, END, 30, 4]])
    found = {}
    for end in (END, 2):
        reference, ours = twins("text", tmp_path / str(end), eos_token_id=end)
        found[end] = compare_text(reference, ours, ids)
    assert torch.equal(found[END].last_hidden_state, found[2].last_hidden_state)
    assert not torch.allclose(found[END].text_embeds, found[2].text_embeds)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_masks(agree, tmp_path, side):
    reference, ours = twins("text", tmp_path)
    mask = torch.ones(4, CONTEXT, dtype=torch.long)
    if side == "right":
        mask[1, 5:] = mask[2, 2:] = 0
    elif side == "left":
        mask[1, :3] = mask[2, :5] = 0
    else:
        mask[:, 1::3] = 0
    with torch.no_grad():
        mine = ours(captions(), mask)
        assert torch.equal(ours(captions(), mask.bool()).text_embeds, mine.text_embeds)
        assert not torch.allclose(ours(captions()).last_hidden_state, mine.last_hidden_state, atol=1e-3)
    seen = mask.bool().cumsum(1) > 0  # before the first token that is seen, nothing means anything
    assert mine.last_hidden_state.isfinite().all()

    def theirs():
        return reference(input_ids=captions(), attention_mask=mask).last_hidden_state[seen]

    agree("networks", mine.last_hidden_state[seen], theirs, [reference])


def test_later_tokens_change_nothing_before_them(tmp_path):
    _, ours = twins("text", tmp_path)
    ids = captions()
    other = ids.clone()
    other[:, 5:] = 7

    def before(ids):
        return ours(ids).last_hidden_state[:, :5]

    assert_equal_but_rounding(before(ids), lambda: before(other), [ours])


# ---- pictures ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_act": "gelu"},
        {"image_size": 18},  # the last two rows and columns make no patch
        {"patch_size": 16},
        {"num_channels": 1, "num_hidden_layers": 1},
        {"layer_norm_eps": 1e-2, "projection_dim": 30},
    ],
    ids=str,
)
def test_pictures(compare_vision, tmp_path, settings):
    reference, ours = twins("vision", tmp_path, **settings)
    mine = compare_vision(reference, ours, pictures(**settings))
    assert mine.image_embeds.shape == (3, settings.get("projection_dim", 10))


# ---- types ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_half_types(tmp_path, dtype, kind):
    """As near as transformers to what these weights give in float32, however the processor rounds on the way.

    The two differ from each other by as much: each rounds at its own places. Where the CPU emulates the type, ours
    computes in float32 and is nearer.
    """
    reference, ours = twins(kind, tmp_path, dtype)
    given = {"input_ids": captions()} if kind == "text" else {"pixel_values": pictures().to(dtype)}
    mine, theirs = ours(*given.values()), reference(**given)
    exact = reference.float()(**{name: x if kind == "text" else x.float() for name, x in given.items()})
    for name in (f"{'text' if kind == 'text' else 'image'}_embeds", "last_hidden_state"):
        assert getattr(mine, name).dtype == getattr(theirs, name).dtype == dtype

        def error(found, name=name):
            return float((getattr(found, name).float() - getattr(exact, name)).square().mean().sqrt())

        assert error(mine) <= 4 * error(theirs)
        assert error(mine) > 0


# ---- the built-in model ----


def test_the_built_in_text_encoder(compare_text):
    folder = BUILT_IN / "text_encoder"
    reference = transformers.CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    ours = CLIPTextEncoder.from_pretrained(str(folder))
    ids = torch.randint(0, 4094, (5, 32), generator=torch.Generator().manual_seed(3))
    for row in range(5):
        ids[row, 3 + 6 * row :] = 4095
    compare_text(reference, ours, ids)
    compare_text(reference, ours, ids, (torch.arange(32) < torch.tensor([[4], [10], [16], [22], [28]])).long())


def test_the_built_in_image_encoder(compare_vision):
    folder = BUILT_IN / "image_encoder"
    reference = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    ours = CLIPImageEncoder.from_pretrained(str(folder))
    compare_vision(reference, ours, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)))


# ---- folders ----


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_transformers_reads_what_ours_writes(tmp_path, kind):
    reference, ours = twins(kind, tmp_path / "theirs", hidden_act="gelu")
    ours.save_pretrained(tmp_path / "ours")
    again, about = KINDS[kind][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    for name, value in reference.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.config.hidden_act == "gelu"
    ours.save_pretrained(tmp_path / "ours")  # over itself
    assert dict(type(ours).from_pretrained(tmp_path / "ours").config) == dict(ours.config)


def test_tables_of_positions_in_old_files_are_passed_over(compare_text, tmp_path):
    from safetensors.torch import load_file, save_file

    reference, _ = twins("text", tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"text_model.embeddings.position_ids": torch.arange(CONTEXT)[None]}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    compare_text(reference, CLIPTextEncoder.from_pretrained(tmp_path), captions())
    save_file(load_file(file) | {"text_model.more.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"text_model\.more\.weight"):
        CLIPTextEncoder.from_pretrained(tmp_path)


def test_defaults_are_those_of_transformers():
    """A folder may leave out whatever has its default."""
    for ours, theirs in (
        (CLIPTextEncoderConfig(), transformers.CLIPTextConfig()),
        (CLIPImageEncoderConfig(), transformers.CLIPVisionConfig()),
    ):
        assert dict(ours) == {name: getattr(theirs, name) for name in ours}


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "gelu_new"},
        {"attention_dropout": 0.1},
        {"model_type": "clip"},
        {"eos_token_id": [1, 2]},
        {"num_attention_heads": 5},
        {"hidden_size": 1 << 20},
        {"projection_dim": None},
        {"layer_norm_eps": "small"},
        {"quantization_config": {"bits": 4}},
        {"text_config": {}},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(tmp_path, settings):
    twins("text", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CLIPTextEncoder.from_pretrained(tmp_path)


def test_wrong_shapes(tmp_path):
    _, text = twins("text", tmp_path / "text")
    _, vision = twins("vision", tmp_path / "vision")
    for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(1, CONTEXT + 1, dtype=torch.long)):
        with pytest.raises(InputError, match="input_ids is"):
            text(ids)
    with pytest.raises(InputError, match="attention_mask is"):
        text(captions(), torch.ones(4, 3))
    for pixels in (torch.zeros(1, 3, 8, 16), torch.zeros(3, 16, 16), torch.zeros(1, 1, 16, 16)):
        with pytest.raises(InputError, match="pixel_values is"):
            vision(pixels)


def test_a_fresh_one_is_drawn():
    ours = CLIPTextEncoder(TEXT | {"model_type": "clip_text_model"})
    assert ours.text_model.embeddings.token_embedding.weight.std() > 0.5
