"""The arguments of a call, and their effects."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unclip import (
    Cancelled,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    InputError,
    NonFiniteError,
    UnclipError,
    UnCLIPScheduler,
)

CLOSE = {"rtol": 0, "atol": 1e-5}
STAGES = ("prior", "decoder", "super_res")


class Counter:
    """Counts the calls of methods, and the rows of their first argument, until the test is over."""

    def __init__(self, monkeypatch):
        self.rows: dict[str, list[int]] = {}
        self.hooks = []
        self._monkeypatch = monkeypatch

    def watch(self, owner, method: str, name: str) -> None:
        original = getattr(owner, method)
        self.rows[name] = []

        def counted(*args, **kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            self.rows[name].append(len(first))
            return original(*args, **kwargs)

        self._monkeypatch.setattr(owner, method, counted)

    def watch_calls(self, network, name: str) -> None:
        rows = self.rows[name] = []
        self.hooks.append(network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0]))))


@pytest.fixture
def counter(monkeypatch):
    counter = Counter(monkeypatch)
    yield counter
    for hook in counter.hooks:
        hook.remove()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- seeds and batches ----


def test_a_picture_of_a_batch_is_the_picture_made_alone(make):
    batch = make(["a cat", "a red apple"], num_images_per_prompt=2, seed=40)
    assert batch.shape == (4, 3, 16, 16)
    for i, prompt in enumerate(["a cat", "a cat", "a red apple", "a red apple"]):
        torch.testing.assert_close(batch[i : i + 1], make(prompt, seed=40 + i), **CLOSE)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_a_list_of_seeds(make):
    batch = make("a cat", num_images_per_prompt=3, seed=[5, 2**64 - 1, 5])
    torch.testing.assert_close(batch[:1], make("a cat", seed=5), **CLOSE)
    torch.testing.assert_close(batch[1:2], make("a cat", seed=2**64 - 1), **CLOSE)
    torch.testing.assert_close(batch[2], batch[0], **CLOSE)


def test_a_seed_equals_a_generator_for_each_picture(make):
    both = make("a cat", num_images_per_prompt=2, seed=3)
    torch.testing.assert_close(both, make("a cat", num_images_per_prompt=2, generator=[generator(3), generator(4)]))


def test_a_variation_of_a_batch_is_the_one_made_alone(vary):
    pictures = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (30, 20), "blue")]
    batch = vary(pictures, num_images_per_prompt=2, seed=7)
    for i in range(4):
        torch.testing.assert_close(batch[i : i + 1], vary(pictures[i // 2], seed=7 + i), **CLOSE)


def test_no_seed_draws_from_the_global_generator(make):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = make("a cat"), make("a cat")
        torch.manual_seed(1)
        assert torch.equal(make("a cat"), first)
    assert not torch.equal(first, second)


def test_a_seed_leaves_the_global_generator_alone(make):
    before = torch.random.get_rng_state()
    make("a cat", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:the prompt has")  # each thread says it of the long prompt
def test_eight_threads_on_one_pipeline(make):
    prompts = ["a cat", "a red apple and a cat and a red apple and a cat", "", "an apple"] * 2
    alone = [make(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    found: dict[int, torch.Tensor | BaseException] = {}
    barrier = threading.Barrier(len(prompts))

    def work(seed: int) -> None:
        barrier.wait()
        try:
            for _ in range(3):
                found[seed] = make(prompts[seed], seed=seed)
        except BaseException as error:
            found[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, picture in enumerate(alone):
        assert isinstance(found[seed], torch.Tensor), found[seed]
        torch.testing.assert_close(found[seed], picture, **CLOSE)


def test_the_callers_tensors_stay_as_they_are(tiny_pipeline, tiny_variation, few):
    given = {
        "prior_latents": torch.randn(2, 16),
        "decoder_latents": torch.randn(2, 3, 8, 8),
        "super_res_latents": torch.randn(2, 3, 16, 16),
        "text_attention_mask": torch.ones(2, 11, dtype=torch.long),
    }
    output = (torch.randn(2, 16), torch.randn(2, 11, 16))
    before = copy.deepcopy((given, output))
    tiny_pipeline(text_model_output=output, seed=1, **given, **few)
    embeddings, pixels = torch.randn(1, 16), torch.randn(1, 3, 16, 16)
    before_too = embeddings.clone(), pixels.clone()
    tiny_variation(image_embeddings=embeddings, seed=1, decoder_num_inference_steps=1, super_res_num_inference_steps=1)
    tiny_variation(pixels, seed=1, decoder_num_inference_steps=1, super_res_num_inference_steps=1)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[0][name]), name
    assert all(map(torch.equal, output, before[1]))
    assert torch.equal(embeddings, before_too[0])
    assert torch.equal(pixels, before_too[1])


def test_a_list_of_prompts_stays_as_it_is(make):
    prompts, seeds = ["a cat", "a cat"], [1, 2]
    make(prompts, seed=seeds)
    assert prompts == ["a cat", "a cat"]
    assert seeds == [1, 2]


# ---- steps and schedulers ----


@pytest.mark.parametrize("stage", STAGES)
def test_one_step_of_a_stage(make, stage):
    picture = make("a cat", seed=1, **{f"{stage}_num_inference_steps": 1})
    assert picture.isfinite().all()


def test_one_step_everywhere(make):
    one = {f"{stage}_num_inference_steps": 1 for stage in STAGES}
    assert make("a cat", seed=1, **one).isfinite().all()


@pytest.mark.parametrize(("steps", "first", "last"), [(1, 1, 0), (2, 1, 1), (5, 4, 1)])
def test_the_last_step_of_super_resolution_has_its_own_network(tiny_pipeline, make, counter, steps, first, last):
    """A single step starts from pure noise, which only the first network was trained on."""
    counter.watch(tiny_pipeline.super_res_first, "forward", "first")
    counter.watch(tiny_pipeline.super_res_last, "forward", "last")
    make("a cat", seed=1, super_res_num_inference_steps=steps)
    assert (len(counter.rows["first"]), len(counter.rows["last"])) == (first, last)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scheduler", [UnCLIPScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_every_scheduler_fits_every_stage(own_pipeline, few, stage, scheduler):
    before = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    name = f"{stage}_scheduler"
    other = scheduler.from_config(getattr(own_pipeline, name).config)
    setattr(own_pipeline, name, other)
    after = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    assert after.isfinite().all()
    assert own_pipeline.components[name] is other
    assert torch.equal(before, after) == (scheduler is UnCLIPScheduler)


@pytest.mark.parametrize("steps", [1, 3])
def test_super_resolution_by_a_scheduler_that_does_not_end_at_0(own_pipeline, few, counter, steps):
    own_pipeline.super_res_scheduler = DPMSolverMultistepScheduler.from_config(own_pipeline.super_res_scheduler.config)
    counter.watch(own_pipeline.super_res_last, "forward", "last")
    own_pipeline("a cat", seed=1, **few | {"super_res_num_inference_steps": steps})
    assert counter.rows.get("last", []) == []  # its last network was tuned for timestep 0 alone


# ---- guidance and captions ----


@pytest.mark.parametrize(("prior", "decoder"), [(4.0, 8.0), (1.0, 8.0), (4.0, 1.0), (1.0, 1.0), (0.5, 8.0), (4.0, 0.0)])
def test_guidance_is_decided_for_each_stage(tiny_pipeline, make, counter, prior, decoder):
    counter.watch_calls(tiny_pipeline.prior, "prior")
    counter.watch_calls(tiny_pipeline.decoder, "decoder")
    make(["a cat", "an apple"], seed=1, prior_guidance_scale=prior, decoder_guidance_scale=decoder)
    assert counter.rows["prior"] == [4 if prior > 1 else 2] * 2
    assert counter.rows["decoder"] == [4 if decoder > 1 else 2] * 2


def test_a_scale_not_above_1_is_no_guidance(make):
    assert torch.equal(make("a cat", seed=1, prior_guidance_scale=0.3), make("a cat", seed=1, prior_guidance_scale=1))
    assert not torch.equal(make("a cat", seed=1, prior_guidance_scale=2), make("a cat", seed=1, prior_guidance_scale=1))


def test_the_empty_prompt_is_encoded_once(tiny_pipeline, make, counter):
    counter.watch(tiny_pipeline.text_encoder, "forward", "text")
    make(["a cat", "an apple", "a cat"], num_images_per_prompt=2, seed=1)
    assert counter.rows["text"] == [2, 1]  # two different captions, one empty


def test_without_guidance_nothing_is_encoded_for_it(tiny_pipeline, make, counter):
    counter.watch(tiny_pipeline.text_encoder, "forward", "text")
    make("a cat", seed=1, prior_guidance_scale=1, decoder_guidance_scale=1)
    assert counter.rows["text"] == [1]


def test_negative_prompt(make):
    plain = make("a cat", seed=1)
    assert torch.equal(make("a cat", seed=1, negative_prompt=""), plain)
    assert (make("a cat", seed=1, negative_prompt="a red apple") - plain).abs().max() > 1e-3


def test_a_negative_prompt_for_each_prompt(make):
    both = make(["a cat", "an apple"], seed=1, num_images_per_prompt=2, negative_prompt=["", "a cat"])
    torch.testing.assert_close(both[:2], make("a cat", seed=1, num_images_per_prompt=2), **CLOSE)
    alone = make("an apple", seed=3, num_images_per_prompt=2, negative_prompt="a cat")
    torch.testing.assert_close(both[2:], alone, **CLOSE)


def test_a_negative_prompt_without_guidance_changes_nothing(make):
    off = {"seed": 1, "prior_guidance_scale": 1, "decoder_guidance_scale": 1}
    assert torch.equal(make("a cat", **off), make("a cat", negative_prompt="an apple", **off))


def test_variations_take_captions(vary):
    picture = Image.new("RGB", (16, 16), "red")
    plain = vary(picture, seed=1)
    assert torch.equal(vary(picture, seed=1, prompt=""), plain)
    assert (vary(picture, seed=1, prompt="a cat") - plain).abs().max() > 1e-3
    assert (vary(picture, seed=1, negative_prompt="a cat") - plain).abs().max() > 1e-3
    both = vary([picture, picture], seed=1, prompt=["", "a cat"])
    torch.testing.assert_close(both[:1], plain, **CLOSE)
    torch.testing.assert_close(both[1:], vary(picture, seed=2, prompt="a cat"), **CLOSE)


# ---- embeddings in, intermediate results out ----


def test_image_embeddings_replace_the_prior(tiny_pipeline, make, counter, few):
    whole = tiny_pipeline("a cat", seed=1, output_type="pt", return_intermediates=True, **few)
    counter.watch(tiny_pipeline.prior, "prepare", "prior")
    embeddings = torch.cat([whole.image_embeddings, whole.image_embeddings + 1])
    pictures = make(["a cat", "a cat"], image_embeddings=embeddings, num_images_per_prompt=2, seed=1)
    assert counter.rows["prior"] == []
    assert pictures.shape == (4, 3, 16, 16)
    assert (pictures[0] - pictures[2]).abs().max() > 1e-3
    alone = make("a cat", image_embeddings=embeddings[1:], seed=3)
    torch.testing.assert_close(pictures[2:3], alone, **CLOSE)


def test_image_embeddings_alone_have_the_empty_caption(make, vary):
    embeddings = torch.randn(2, 16, generator=generator(1))
    pictures = make(image_embeddings=embeddings, seed=1)
    assert torch.equal(pictures, make(["", ""], image_embeddings=embeddings, seed=1))
    torch.testing.assert_close(pictures, vary(image_embeddings=embeddings, seed=1), **CLOSE)


def test_a_given_text_embedding_equals_the_prompt(tiny_pipeline, make):
    tokens = tiny_pipeline.tokenizer(["a cat"], padding="max_length", max_length=11, return_tensors="pt")
    with torch.no_grad():
        output = tiny_pipeline.text_encoder(tokens["input_ids"])
    mask = tokens["attention_mask"]
    expected = make("a cat", seed=1)
    assert torch.equal(make(text_model_output=output, text_attention_mask=mask, seed=1), expected)
    pair = (output.text_embeds, output.last_hidden_state)
    assert torch.equal(make(text_model_output=pair, text_attention_mask=mask.bool(), seed=1), expected)


def test_given_latents_are_the_first_noise(make):
    latents = {
        "prior_latents": torch.randn(1, 16, generator=generator(1)),
        "decoder_latents": torch.randn(1, 3, 8, 8, generator=generator(2)),
        "super_res_latents": torch.randn(1, 3, 16, 16, generator=generator(3)),
    }
    one = {f"{stage}_num_inference_steps": 1 for stage in STAGES}  # one step draws no noise of its own
    first = make("a cat", seed=1, **one, **latents)
    assert torch.equal(first, make("a cat", seed=2, **one, **latents))
    latents["decoder_latents"] = torch.zeros(1, 3, 8, 8)
    assert not torch.equal(first, make("a cat", seed=2, **one, **latents))


def test_latents_of_another_float_type(make):
    latents = torch.randn(1, 16, generator=generator(1)).half()
    both = [make("a cat", seed=1, prior_latents=x) for x in (latents, latents.double())]
    assert torch.equal(*both)


def test_intermediate_results(tiny_pipeline, few):
    output = tiny_pipeline("a cat", num_images_per_prompt=2, seed=1, return_intermediates=True, **few)
    assert output.image_embeddings.shape == (2, 16)
    assert output.image_embeddings.dtype == torch.float32
    assert [picture.size for picture in output.small_images] == [(8, 8)] * 2
    assert list(output) == ["images", "image_embeddings", "small_images"]
    as_tuple = tiny_pipeline("a cat", seed=1, return_intermediates=True, return_dict=False, **few)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 3


def test_intermediate_results_of_variations(tiny_variation):
    steps = {"decoder_num_inference_steps": 1, "super_res_num_inference_steps": 1}
    embeddings = torch.randn(1, 16)
    output = tiny_variation(image_embeddings=embeddings, seed=1, output_type="np", return_intermediates=True, **steps)
    assert torch.equal(output.image_embeddings, embeddings)
    assert output.small_images.shape == (1, 8, 8, 3)


# ---- output ----


def test_forms_of_output(tiny_pipeline, few):
    arguments = {"num_images_per_prompt": 2, "seed": 1, **few}
    forms = ("pt", "np", "pil")
    as_pt, as_np, as_pil = (tiny_pipeline("a cat", output_type=form, **arguments).images for form in forms)
    assert as_pt.shape == (2, 3, 16, 16)
    assert as_pt.dtype == torch.float32
    assert as_pt.min() >= 0
    assert as_pt.max() <= 1
    assert as_np.shape == (2, 16, 16, 3)
    assert as_np.dtype == np.float32
    assert np.array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in as_pil)
    assert np.array_equal(np.stack([np.asarray(p) for p in as_pil]), (as_np * 255).round().astype(np.uint8))


def test_pil_is_the_default_form(tiny_pipeline, few):
    output = tiny_pipeline("a cat", seed=1, **few)
    assert isinstance(output.images[0], Image.Image)
    assert output.images is output["images"]
    assert output.images is output[0]
    assert output[0:1] == (output.images,)
    assert output.keys() == ["images"]
    assert len(output) == 1
    assert dict(output) == {"images": output.images}
    with pytest.raises(KeyError):
        output["small_images"]


def test_a_plain_tuple(tiny_pipeline, tiny_variation, few):
    assert isinstance(tiny_pipeline("a cat", seed=1, return_dict=False, **few), tuple)
    (images,) = tiny_variation(Image.new("RGB", (9, 9)), 2, 1, 1, seed=1, return_dict=False)
    assert len(images) == 2


def test_the_order_of_arguments(tiny_pipeline):
    (images,) = tiny_pipeline("a cat", 2, 1, 2, 1, generator(1), None, None, None, None, None, 2.0, 3.0, "pt", False)
    assert images.shape == (2, 3, 16, 16)


# ---- results with NaN ----


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_embeddings_that_are_too_large(own_pipeline, vary, few, output_type):
    embeddings = torch.full((1, 16), 1e30)
    with pytest.raises(NonFiniteError, match=r"decoder's pictures: .* too large"):
        own_pipeline(image_embeddings=embeddings, seed=1, output_type=output_type, **few)
    with pytest.raises(NonFiniteError, match="decoder's pictures"):
        vary(image_embeddings=embeddings, seed=1, output_type=output_type)
    assert issubclass(NonFiniteError, UnclipError)
    own_pipeline.to(torch.float16)
    with pytest.raises(
        NonFiniteError, match=r"65504, the largest of float16.*torch_dtype=torch\.bfloat16 or torch\.float32"
    ):
        own_pipeline(image_embeddings=embeddings / 1e24, seed=1, output_type=output_type, **few)


def test_a_prior_that_returns_nan(own_pipeline, few):
    with torch.no_grad():
        own_pipeline.prior.clip_std.fill_(float("inf"))
    for make in (lambda: own_pipeline("a cat", seed=1, **few), lambda: own_pipeline.embed_captions("a cat", seed=1)):
        with pytest.raises(NonFiniteError, match=r"image embeddings: the result is NaN or infinite.* damaged"):
            make()


# ---- callbacks ----


def test_a_callback_gets_every_step(own_pipeline, make):
    told = []

    def callback(pipeline, step, timestep, about):
        told.append((about["stage"], step, timestep, about["num_steps"]))
        assert about["latents"].shape == about["x0"].shape
        assert about["latents"].dtype == torch.float32
        assert pipeline is own_pipeline

    steps = {"prior_num_inference_steps": 3, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 1}
    with_callback = own_pipeline("a cat", seed=1, output_type="pt", callback_on_step_end=callback, **steps).images
    assert told == [
        ("prior", 0, 999, 3),
        ("prior", 1, 500, 3),
        ("prior", 2, 0, 3),
        ("decoder", 0, 999, 2),
        ("decoder", 1, 0, 2),
        ("super_res", 0, 999, 1),
    ]
    assert torch.equal(with_callback, make("a cat", seed=1, **steps))


def test_a_callback_may_replace_the_latents(make):
    def callback(pipeline, step, timestep, about):
        if about["stage"] == "super_res" and step == about["num_steps"] - 1:
            return {"latents": torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)}

    assert torch.equal(make("a cat", seed=1, callback_on_step_end=callback), torch.full((1, 3, 16, 16), 0.75))


@pytest.mark.parametrize("stage", ["prior", "decoder", "super_res"])
def test_a_callback_that_returns_nan(make, stage):
    def callback(pipeline, step, timestep, about):
        return {"latents": about["latents"] * float("nan")} if about["stage"] == stage else None

    with pytest.raises(InputError, match="NaN or infinity"):
        make("a cat", seed=1, callback_on_step_end=callback)


def test_a_callback_may_return_what_it_was_given(make):
    assert torch.equal(make("a cat", seed=1, callback_on_step_end=lambda *given: given[3]), make("a cat", seed=1))


@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_may_stop_the_run(own_pipeline, few, stage):
    def callback(pipeline, step, timestep, about):
        return {"stop": about["stage"] == stage and step == 1}

    with pytest.raises(Cancelled, match=f"'{stage}' after step 2 of 2"):
        own_pipeline("a cat", seed=1, callback_on_step_end=callback, **few)
    first = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    assert torch.equal(first, own_pipeline("a cat", seed=1, output_type="pt", **few).images)


def test_variations_call_callbacks_too(vary):
    stages = []
    vary(image_embeddings=torch.zeros(1, 16), callback_on_step_end=lambda *given: stages.append(given[3]["stage"]))
    assert stages == ["decoder", "decoder", "super_res", "super_res"]


@pytest.mark.parametrize("answer", [3, "stop", {"latent": torch.zeros(1)}, {"latents": torch.zeros(5)}, {"latents": 1}])
def test_a_callbacks_answer_is_checked(make, answer):
    with pytest.raises(InputError):
        make("a cat", seed=1, callback_on_step_end=lambda *given: answer)


def test_a_callback_that_is_not_a_function(make):
    with pytest.raises(InputError, match="callback_on_step_end must be a function, not str"):
        make("a cat", callback_on_step_end="print")


def test_an_error_in_a_callback_comes_through(make):
    def callback(*given):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make("a cat", seed=1, callback_on_step_end=callback)


# ---- prepared once ----


def test_what_does_not_change_is_computed_once(tiny_pipeline, make, counter, monkeypatch):
    import unclip.stages.super_res as super_res

    counter.watch(tiny_pipeline.prior, "prepare", "prior")
    counter.watch(tiny_pipeline.decoder, "prepare", "decoder")
    counter.watch(tiny_pipeline.text_proj, "forward", "text_proj")
    counter.watch(tiny_pipeline.prior.encoder_hidden_states_proj, "forward", "the prior's text")
    for i, block in enumerate(tiny_pipeline.prior.transformer_blocks):
        counter.watch(block.attn1.to_k, "forward", f"keys {i}")
    attentions = [m for m in tiny_pipeline.decoder.modules() if hasattr(m, "add_k_proj")]
    for i, attention in enumerate(attentions):
        counter.watch(attention.add_k_proj, "forward", f"context keys {i}")
    enlarged = []
    original = super_res.enlarge
    monkeypatch.setattr(super_res, "enlarge", lambda *given: enlarged.append(1) or original(*given))
    make("a cat", seed=1, prior_num_inference_steps=5, decoder_num_inference_steps=4, super_res_num_inference_steps=3)
    for name in ("prior", "decoder", "text_proj", "the prior's text"):
        assert len(counter.rows[name]) == 1, name
    assert [len(counter.rows[f"keys {i}"]) for i in range(2)] == [6, 6]  # the text's once, and each step's own
    assert attentions
    assert all(len(counter.rows[f"context keys {i}"]) == 1 for i in range(len(attentions)))
    assert len(enlarged) == 1


# ---- memory ----


def test_networks_are_in_evaluation_mode_and_a_call_keeps_nothing(tiny_pipeline, few):
    gc.collect()
    output = tiny_pipeline("a cat", seed=1, output_type="pt", **few)
    assert not output.images.requires_grad
    for network in tiny_pipeline.networks.values():
        assert not any(module.training for module in network.modules())
        assert all(parameter.grad is None for parameter in network.parameters())
    kept = weakref.ref(output.images)
    del output
    gc.collect()
    assert kept() is None


def test_a_call_changes_no_state(tiny_pipeline, make):
    before = {name: dict(vars(part)) for name, part in tiny_pipeline.components.items() if hasattr(part, "_path")}
    weights = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in tiny_pipeline.networks.items()}
    assert len(before) == 3
    make("a cat", seed=1)
    for name, state in before.items():
        assert vars(getattr(tiny_pipeline, name)) == state
    for name, network in tiny_pipeline.networks.items():
        assert isinstance(network, nn.Module)
        assert all(torch.equal(value, weights[name][key]) for key, value in network.state_dict().items())


# ---- progress ----


def test_progress_bars(own_pipeline, few, capsys):
    own_pipeline.set_progress_bar_config()
    own_pipeline("a cat", seed=1, **few)
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in ("prior", "decoder", "super-resolution", "2/2"):
        assert words in shown.err
    own_pipeline.set_progress_bar_config(disable=True)
    own_pipeline("a cat", seed=1, **few)
    assert capsys.readouterr().err == ""
    own_pipeline.set_progress_bar_config(desc="mine")
    own_pipeline("a cat", seed=1, **few)
    assert "mine: 100%" in capsys.readouterr().err
