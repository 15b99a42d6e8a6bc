"""PyTorch's hooks and compiler act on every network of a pipeline, and compiled components are saved as plain ones."""

import shutil

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from unclip import AutoregressivePrior, UNet2DConditionModel
from unclip.checkpoints.weights import original
from unclip.errors import ConfigError
from unclip.pipelines.model_files import fingerprint
from unclip.pipelines.pipeline import Pipeline

STEPS = {"prior_num_inference_steps": 4, "decoder_num_inference_steps": 3, "super_res_num_inference_steps": 3}
CALLS = {"text_encoder": 2, "prior": 4, "text_proj": 1, "decoder": 3, "super_res_first": 2, "super_res_last": 1}
"""How often each network computes: once a step; the text encoder once for the prompts, once for the empty one."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def draw(pipe, prompt="a cat", **arguments):
    return pipe(prompt, seed=1, output_type="pt", **STEPS | arguments).images


@pytest.fixture
def autoregressive(tiny_components, build_pipeline):
    prior = AutoregressivePrior(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=11,
        num_components=5, num_buckets=8, num_dot_buckets=4,
    ).initialize_for_training(torch.Generator().manual_seed(0))  # fmt: skip
    return build_pipeline("text", tiny_components() | {"prior": prior.eval(), "prior_scheduler": None})


# ---- hooks ----


def test_every_network_of_a_pipeline_fires_its_hooks_once_a_step(own_pipeline):
    fired, plain = [], draw(own_pipeline)
    for name, network in own_pipeline.networks.items():
        network.register_forward_pre_hook(lambda m, args, n=name: fired.append((n, "pre")))
        network.register_forward_pre_hook(lambda m, args, kw, n=name: fired.append((n, "pre kw")), with_kwargs=True)
        network.register_forward_hook(lambda m, args, out, n=name: fired.append((n, "post")))
        network.register_forward_hook(
            lambda m, args, kw, out, n=name: fired.append((n, "post kw")), with_kwargs=True, always_call=True
        )
    assert torch.equal(draw(own_pipeline), plain)
    for name in own_pipeline.networks:
        for kind in ("pre", "pre kw", "post", "post kw"):
            assert fired.count((name, kind)) == CALLS[name], (name, kind)


@pytest.mark.parametrize("inner", ["decoder.mid_block", "prior.transformer_blocks.0", "super_res_first.conv_in"])
def test_parts_of_networks_fire_their_hooks_too(own_pipeline, inner):
    name, _, path = inner.partition(".")
    fired = []
    own_pipeline.networks[name].get_submodule(path).register_forward_hook(lambda *about: fired.append(1))
    draw(own_pipeline)
    assert len(fired) in (CALLS[name], CALLS[name] + (name == "prior"))  # the prior's blocks read the text once, too


def test_an_autoregressive_prior_fires_its_hooks_once_a_code(autoregressive):
    fired = []
    autoregressive.prior.register_forward_hook(lambda *about: fired.append(1))
    draw(autoregressive)
    assert len(fired) == 5


def test_variations_and_their_image_encoder(own_variation):
    fired = []
    for name, network in own_variation.networks.items():
        network.register_forward_hook(lambda *about, n=name: fired.append(n))
    picture = Image.new("RGB", (16, 16), "red")
    own_variation(picture, decoder_num_inference_steps=3, super_res_num_inference_steps=3)
    expected = {name: CALLS.get(name, 1) for name in own_variation.networks}
    assert {name: fired.count(name) for name in own_variation.networks} == expected


@pytest.mark.parametrize("name", ["prior", "decoder", "super_res_first", "super_res_last", "text_proj"])
def test_what_a_hook_changes_changes_the_picture(own_pipeline, name):
    plain = draw(own_pipeline)
    network = own_pipeline.networks[name]

    def doubled(module, arguments, output):
        parts = [2 * part for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)

    handle = network.register_forward_hook(doubled)
    assert not torch.equal(draw(own_pipeline), plain)
    handle.remove()

    def halved(module, arguments, keywords):
        changed = {key: value / 2 for key, value in keywords.items() if key in ("class_labels", "image_embeddings")}
        return tuple(argument / 2 for argument in arguments), keywords | changed

    handle = network.register_forward_pre_hook(halved, with_kwargs=True)
    assert not torch.equal(draw(own_pipeline), plain)
    handle.remove()
    assert torch.equal(draw(own_pipeline), plain)


def test_a_hook_that_raises_and_one_that_is_always_called(own_pipeline):
    called = []
    own_pipeline.decoder.conv_out.register_forward_hook(lambda *about: 1 / 0)
    own_pipeline.decoder.register_forward_hook(lambda *about: called.append(about[-1]), always_call=True)
    with pytest.raises(ZeroDivisionError):
        draw(own_pipeline)
    assert called == [None]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # text_proj is called with keywords
def test_backward_hooks_fire_in_the_loss_of_a_stage(own_pipeline):
    from unclip.clip.encoders import TextEmbedding
    from unclip.stages.decoder import DecoderStage
    from unclip.stages.stage import DecoderCondition

    stage = DecoderStage(own_pipeline.decoder, own_pipeline.text_proj, own_pipeline.decoder_scheduler.process)
    text = TextEmbedding(torch.randn(2, 16), torch.randn(2, 11, 16), torch.ones(2, 11, dtype=torch.bool))
    condition = DecoderCondition.of(text, torch.randn(2, 16))
    fired = []
    for network in (own_pipeline.decoder, own_pipeline.text_proj):
        network.register_full_backward_hook(lambda m, gi, go: fired.append((type(m).__name__, go[0] is not None)))
        network.register_full_backward_pre_hook(lambda m, go: fired.append("before"))
    x = torch.randn(stage.sample_shape(len(condition)), requires_grad=True)
    stage.prepare(condition)(x, 500).square().mean().backward()
    assert x.grad is not None
    assert ("UNet2DConditionModel", True) in fired
    assert ("UnCLIPTextProjModel", True) in fired
    assert fired.count("before") == 2


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_hooks_beside_offloading(own_pipeline, kind):
    plain = draw(own_pipeline)
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    fired = []
    for name, network in own_pipeline.networks.items():
        network.register_forward_hook(lambda *about, n=name: fired.append(n))
    assert torch.equal(draw(own_pipeline), plain)
    assert {name: fired.count(name) for name in own_pipeline.networks} == CALLS


# ---- compilation ----


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_compiled_once_whatever_the_step(own_pipeline, name, in_place):
    plain, counter = draw(own_pipeline), CompileCounter()
    more = {"prior_num_inference_steps": 7, "decoder_num_inference_steps": 5, "super_res_num_inference_steps": 2}
    is_ours = name != "text_encoder"
    if in_place:
        own_pipeline.networks[name].compile(backend=counter, fullgraph=is_ours)
    else:
        setattr(own_pipeline, name, torch.compile(own_pipeline.networks[name], backend=counter, fullgraph=is_ours))
    torch.testing.assert_close(draw(own_pipeline), plain, rtol=0, atol=1e-5)
    frames = counter.frame_count
    assert frames == 1 if is_ours else frames >= 1
    draw(own_pipeline, "a red apple", **more)
    assert counter.frame_count == frames


def test_a_compiled_autoregressive_prior(autoregressive):
    plain, counter = draw(autoregressive), CompileCounter()
    autoregressive.prior = torch.compile(autoregressive.prior, backend=counter)
    torch.testing.assert_close(draw(autoregressive), plain, rtol=0, atol=1e-5)
    assert counter.frame_count >= 1
    frames = counter.frame_count
    draw(autoregressive, "a red apple")
    assert counter.frame_count == frames


def test_compiled_parts_and_a_compiled_forward(own_pipeline):
    plain, counter = draw(own_pipeline), CompileCounter()
    own_pipeline.decoder.mid_block = torch.compile(own_pipeline.decoder.mid_block, backend=counter)
    own_pipeline.prior.forward = torch.compile(own_pipeline.prior.forward, backend=counter)
    torch.testing.assert_close(draw(own_pipeline), plain, rtol=0, atol=1e-5)
    assert counter.frame_count >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_a_compiled_network_offloads(own_pipeline, kind):
    plain = draw(own_pipeline)
    own_pipeline.decoder = torch.compile(own_pipeline.decoder, backend="eager")
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    torch.testing.assert_close(draw(own_pipeline), plain, rtol=0, atol=1e-5)
    own_pipeline.remove_all_hooks()
    torch.testing.assert_close(draw(own_pipeline), plain, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it imports its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler")
@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_compiled_code_gives_the_same_picture(own_pipeline, name):
    plain = draw(own_pipeline)
    setattr(own_pipeline, name, torch.compile(own_pipeline.networks[name], fullgraph=True))
    torch.testing.assert_close(draw(own_pipeline), plain, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_components_are_accepted_shared_and_saved_as_plain_ones(own_pipeline, tmp_path):
    plain, made = draw(own_pipeline), fingerprint(own_pipeline)
    own_pipeline.save_pretrained(tmp_path / "plain")
    compiled = {name: torch.compile(part, backend="eager") for name, part in own_pipeline.networks.items()}
    pipe = type(own_pipeline)(**own_pipeline.components | compiled)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-5)
    assert fingerprint(pipe) == made
    assert type(pipe).from_pipe(pipe).decoder is pipe.decoder
    pipe.save_pretrained(tmp_path / "compiled")
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    for file in files:
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    read = type(pipe).from_pretrained(tmp_path / "compiled")
    read.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(read), plain, rtol=0, atol=1e-5)


def test_networks_with_compiled_parts_are_saved_by_their_own_names(own_pipeline, tmp_path):
    plain = draw(own_pipeline)
    own_pipeline.save_pretrained(tmp_path / "plain")
    for owner, part in (
        (own_pipeline.decoder, "mid_block"),
        (own_pipeline.text_encoder, "text_projection"),
        (own_pipeline.prior, "proj_in"),
    ):
        setattr(owner, part, torch.compile(getattr(owner, part), backend="eager"))
    own_pipeline.decoder = torch.compile(own_pipeline.decoder, backend="eager")
    own_pipeline.save_pretrained(tmp_path / "parts")
    read = type(own_pipeline).from_pretrained(tmp_path / "parts")
    read.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(read), plain, rtol=0, atol=1e-5)
    own_pipeline.decoder.save_pretrained(tmp_path / "alone")
    alone = UNet2DConditionModel.from_pretrained(tmp_path / "alone")
    assert alone.state_dict().keys() == read.decoder.state_dict().keys()


def test_an_offloaded_compiled_network_is_saved(own_pipeline, tmp_path):
    plain = draw(own_pipeline)
    own_pipeline.decoder = torch.compile(own_pipeline.decoder, backend="eager")
    own_pipeline.enable_sequential_cpu_offload(device="cpu")
    own_pipeline.save_pretrained(tmp_path / "saved")
    read = type(own_pipeline).from_pretrained(tmp_path / "saved")
    read.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(read), plain, rtol=0, atol=1e-5)


def test_a_compiled_network_of_another_kind_is_refused(own_pipeline):
    with pytest.raises(ConfigError, match="component 'decoder' is a"):
        own_pipeline.decoder = torch.compile(own_pipeline.prior, backend="eager")
    with pytest.raises(ConfigError, match="component 'prior' is a"):
        own_pipeline.prior = torch.compile(torch.nn.Linear(1, 1), backend="eager")


def test_only_compiled_modules_are_unwrapped():
    module = torch.nn.Linear(1, 1)
    assert original(module) is module
    assert original(torch.compile(module, backend="eager")) is module
    assert original("a text") == "a text"
    assert isinstance(original(Pipeline), type)
