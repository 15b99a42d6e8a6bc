"""What parity does not show: prepared halves, slices, types, layouts, hooks, initial weights, bad shapes."""

import copy
import threading
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from unclip.errors import InputError
from unclip.models import PriorTransformer, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel, kernels, layers

from ..rounding import assert_equal_but_rounding

PRIOR = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5)
DECODER = dict(
    in_channels=3,
    out_channels=6,
    layers_per_block=1,
    block_out_channels=(8, 24),
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=8,
    norm_num_groups=4,
    class_embed_type="identity",
    resnet_time_scale_shift="scale_shift",
)
SUPER_RES = dict(
    in_channels=6,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D",) * 2,
    up_block_types=("ResnetUpsampleBlock2D",) * 2,
    norm_num_groups=4,
    add_attention=False,
)
TEXT_PROJ = dict(clip_embeddings_dim=16, time_embed_dim=24, cross_attention_dim=20)


def prior_case():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5]).bool()
    x, embedding, text = torch.randn(2, 16), torch.randn(2, 16), torch.randn(2, 5, 16)
    return PriorTransformer(PRIOR).initialize_for_training().eval(), (x, 7, embedding, text, mask)


def decoder_case():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    x, context, labels = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 12), torch.randn(2, 32)
    return UNet2DConditionModel(DECODER).eval(), (x, 7, context, labels, mask)


def super_res_case():
    torch.manual_seed(0)
    return UNet2DModel(SUPER_RES).eval(), (torch.randn(2, 6, 4, 4), torch.tensor([1, 500]))


def text_proj_case():
    torch.manual_seed(0)
    model = UnCLIPTextProjModel(TEXT_PROJ)
    torch.nn.init.normal_(model.learned_classifier_free_guidance_embeddings)
    images, texts, tokens = torch.randn(3, 16), torch.randn(3, 16), torch.randn(3, 5, 16)
    return model, dict(image_embeddings=images, prompt_embeds=texts, text_encoder_hidden_states=tokens)


CASES = [prior_case, decoder_case, super_res_case]


# Prepare once, step many


@torch.no_grad()
def test_a_prior_prefix_serves_many_steps_and_equals_the_whole_sequence(monkeypatch):
    model, (_, _, embedding, text, mask) = prior_case()
    prefix = model.prepare(embedding, text, mask)
    # The whole sequence at once, causally masked, without the prepared path.
    causal = torch.full((9, 9), layers.MASKED).triu_(1)
    bias = layers.mask_bias(torch.nn.functional.pad(mask.float(), (0, 4), value=1.0), torch.float32) + causal
    for t in (0, 400):
        x = torch.randn(2, 16)

        def at_once(x=x, t=t):
            tokens = torch.cat([model._text_tokens(embedding, text), model._step_tokens(x, t)], dim=1)
            tokens = tokens + model.positional_embedding
            for block in model.transformer_blocks:
                tokens, _ = block(tokens, bias)
            return model.proj_to_clip_embeddings(model.norm_out(tokens))[:, -1]

        assert_equal_but_rounding(model(x, t, prefix=prefix)[0], at_once, [model])


@torch.no_grad()
def test_a_prior_does_not_need_the_padding():
    model, (x, _, embedding, text, _) = prior_case()
    torch.nn.init.normal_(model.positional_embedding)
    num_tokens = text.shape[1]
    for kept in range(1, num_tokens + 1):
        mask = torch.arange(num_tokens).expand(2, -1) < torch.tensor([[kept], [max(1, kept - 1)]])
        short = model(x, 7, prefix=model.prepare(embedding, text[:, :kept], mask[:, :kept]))[0]
        assert_equal_but_rounding(
            short, lambda mask=mask: model(x, 7, prefix=model.prepare(embedding, text, mask))[0], [model]
        )
    seen = torch.ones(2, num_tokens)
    for bad_text, bad_mask in ((text, seen[:, 1:]), (text[:, 1:], seen), (torch.cat([text, text], 1), seen)):
        with pytest.raises(InputError):
            model.prepare(embedding, bad_text, bad_mask)


@torch.no_grad()
def test_a_unet_context_serves_many_steps():
    model, (_, _, context, labels, mask) = decoder_case()
    prepared = model.prepare(context, mask)
    assert len(prepared.layers) == 4
    assert prepared.bias is not None
    for t in (0, 400):
        x = torch.randn(2, 3, 4, 6)
        expected = model(x, t, context, labels, mask).sample
        torch.testing.assert_close(model(x, t, class_labels=labels, context=prepared)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case):
    model, inputs = case()
    model(*inputs)[0].square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == ({"clip_mean", "clip_std"} if isinstance(model, PriorTransformer) else set())


@torch.no_grad()
def test_text_proj_gives_the_learned_embedding_to_rows_without_an_image():
    model, inputs = text_proj_case()
    given = torch.tensor([True, False, True])
    tokens, addition = model(given=given, **inputs)
    replaced = inputs["image_embeddings"].clone()
    replaced[1] = model.learned_classifier_free_guidance_embeddings
    expected = model(given=None, **(inputs | {"image_embeddings": replaced}))
    torch.testing.assert_close((tokens, addition), expected)
    assert not torch.allclose(addition[1], model(given=None, **inputs)[1][1])


def test_the_learned_embedding_gets_its_gradient_from_rows_without_an_image():
    model, inputs = text_proj_case()
    model(given=torch.tensor([True, False, True]), **inputs)[1].sum().backward()
    assert model.learned_classifier_free_guidance_embeddings.grad.abs().sum() > 0  # pyright: ignore


# Memory, types, layouts


@pytest.mark.parametrize("slice_size", ["auto", "max", 1, 2, 3, 4, 6, 100])
@pytest.mark.parametrize("case", [prior_case, decoder_case])
@torch.no_grad()
def test_slicing_computes_less_at_a_time_and_the_same(case, slice_size, monkeypatch):
    model, inputs = case()
    maps = []

    def counted(queries, keys, values, bias):
        maps.append(queries.shape[0] * queries.shape[1])
        return kernels.attention(queries, keys, values, bias)

    monkeypatch.setattr(layers, "attention", counted)
    whole = model(*inputs)[0]
    assert set(maps) == {6}  # two rows, three heads
    maps.clear()
    model.enable_attention_slicing(slice_size)
    assert_equal_but_rounding(whole, lambda: model(*inputs)[0], [model])
    assert max(maps) <= {"auto": 2, "max": 1}.get(slice_size, slice_size)
    maps.clear()
    model.disable_attention_slicing()
    model(*inputs)
    assert set(maps) == {6}


@pytest.mark.parametrize("slice_size", [0, -1, 1.5, True, "half"])
def test_bad_slices(slice_size):
    with pytest.raises(InputError, match="slice_size"):
        prior_case()[0].enable_attention_slicing(slice_size)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bfloat16_weights(case):
    model, inputs = case()
    wide = copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    halved = [i.bfloat16() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in inputs]
    got = model(*halved)[0]
    assert got.dtype == torch.bfloat16
    assert_equal_but_rounding(got, lambda: wide(*inputs)[0], [wide], dtype=torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_autocast_trains(case):
    model, inputs = case()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs)[0]
    got.float().square().mean().backward()
    assert_equal_but_rounding(got, lambda: model(*inputs)[0], [model], dtype=torch.bfloat16)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_kernels_equal_pytorchs():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    bias = torch.where(torch.rand(2, 1, 5, 7) < 0.3, layers.MASKED, 0.0)
    for given in (None, bias):

        def plain(given=given):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given)

        assert_equal_but_rounding(kernels.attention(q, k, v, given), plain, [q, k, v])
        halved = None if given is None else given.bfloat16()
        got = kernels.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), halved)
        assert_equal_but_rounding(got, plain, [q, k, v], dtype=torch.bfloat16)
    norm, x = kernels.GroupNorm(4, 8), torch.randn(2, 8, 3, 3)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert_equal_but_rounding(norm(x.bfloat16()), lambda: norm(x), [norm, x], dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [prior_case, decoder_case, super_res_case])
@torch.no_grad()
def test_a_half_type_that_the_cpu_only_emulates_is_computed_in_float32(case, dtype, monkeypatch):
    seen = []
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        own = getattr(torch.nn.functional, name)

        def watched(x, *args, own=own, **kwargs):
            seen.append(x.dtype)
            return own(x, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, name, watched)
    model, inputs = case()
    wide = copy.deepcopy(model)
    model.to(dtype)
    halved = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    monkeypatch.setattr(kernels, "_cpu_computes", lambda dtype: True)
    seen.clear()
    model(*halved)
    assert dtype in seen
    monkeypatch.setattr(kernels, "_cpu_computes", lambda dtype: False)
    seen.clear()
    got = model(*halved)[0]
    assert set(seen) == {torch.float32}
    assert got.dtype == dtype
    assert_equal_but_rounding(got, lambda: wide(*inputs)[0], [wide], dtype=dtype)
    assert not kernels.is_emulated(torch.float32, torch.device("cpu"))
    assert not kernels.is_emulated(dtype, torch.device("cuda"))


@pytest.mark.parametrize("case", [decoder_case, super_res_case])
@torch.no_grad()
def test_channels_last_stays_so_and_changes_nothing(case):
    model, (x, *rest) = case()
    plain = model(x, *rest).sample
    model.to(memory_format=torch.channels_last)
    strides = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(
                lambda m, i, o: strides.append(o.is_contiguous(memory_format=torch.channels_last))
            )
    assert_equal_but_rounding(plain, lambda: model(x.to(memory_format=torch.channels_last), *rest).sample, [model])
    assert len(strides) > 10
    assert all(strides)


@pytest.mark.parametrize("case", CASES)
def test_there_are_no_buffers_and_no_state_beside_the_parameters(case):
    model, _ = case()
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_number_as_timestep_is_one_row_made_on_the_device():
    model, (x, _, *rest) = decoder_case()
    with torch.no_grad():
        for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7])):
            got = model(x, timestep, *rest).sample
            assert_equal_but_rounding(got, lambda: model(x, torch.tensor([7, 7]), *rest).sample, [model])
    # On the meta device any wait for a value would raise.
    with torch.device("meta"):
        model = UNet2DConditionModel(DECODER)
        assert model(x.to("meta"), 7, *(i.to("meta") for i in rest)).sample.shape == (2, 6, 4, 6)


# Hooks


class Recorder(ModelHook):
    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append("pre")
        return args, kwargs

    def post_forward(self, module, output):
        self.calls.append("post")
        return output


@torch.no_grad()
def test_hooks_act_on_every_entry_point_once():
    model, (x, t, embedding, text, mask) = prior_case()
    expected = model(x, t, embedding, text, mask)[0]
    hook = Recorder()
    add_hook_to_module(model, hook)
    for call, num_entries, value in (
        (lambda: model(x, t, embedding, text, mask)[0], 1, expected),  # though it reads the text inside
        (lambda: model(x, t, prefix=model.prepare(embedding, text, mask))[0], 2, expected),
        (lambda: model.post_process_latents(model.whiten(x)), 2, x),
    ):
        hook.calls.clear()
        torch.testing.assert_close(call(), value)
        assert hook.calls == ["pre", "post"] * num_entries

    with pytest.raises(InputError):
        model.prepare(embedding, text, mask[:, :2])
    hook.calls.clear()
    torch.testing.assert_close(model(x, t, embedding, text, mask)[0], expected)  # an error leaves nothing behind
    assert hook.calls == ["pre", "post"]
    remove_hook_from_module(model)
    model.prepare(embedding, text, mask)
    assert hook.calls == ["pre", "post"]


@torch.no_grad()
def test_diffusers_hooks_act_too():
    """Group offloading installs such hooks, on whole networks and on their blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.hooks import HookRegistry
        from diffusers.hooks import ModelHook as DiffusersHook

    class Counter(DiffusersHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, (x, t, context, labels, mask) = decoder_case()
    expected = model(x, t, context, labels, mask).sample
    outer, inner = Counter(), Counter()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(outer, "outer")
    HookRegistry.check_if_exists_or_initialize(model.mid_block).register_hook(inner, "inner")
    prepared = model.prepare(context, mask)
    assert (outer.calls, inner.calls) == (1, 1)
    torch.testing.assert_close(model(x, t, class_labels=labels, context=prepared)[0], expected)
    assert (outer.calls, inner.calls) == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_sequential_offload_leaves_no_parameter_behind(case):
    """accelerate's sequential offload keeps weights on the meta device between calls: a parameter used outside a
    hooked call would be without data."""
    from accelerate import cpu_offload

    model, inputs = case()
    expected = model(*inputs)[0]
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.device.type == "cpu"
    torch.testing.assert_close(model(*inputs)[0], expected)
    if isinstance(model, PriorTransformer):
        x, t, *text = inputs
        torch.testing.assert_close(model(x, t, prefix=model.prepare(*text))[0], expected)
        torch.testing.assert_close(model.post_process_latents(model.whiten(x)), x)
    elif isinstance(model, UNet2DConditionModel):
        x, t, context, labels, mask = inputs
        torch.testing.assert_close(model(x, t, class_labels=labels, context=model.prepare(context, mask))[0], expected)


@torch.no_grad()
def test_threads_do_not_meet_in_a_hooked_module():
    model, (x, t, *text) = prior_case()
    expected = model(x, t, *text)[0]
    add_hook_to_module(model, Recorder())
    results: list[torch.Tensor] = []

    @torch.no_grad()
    def work():
        results.extend(model(x, t, prefix=model.prepare(*text))[0] for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results:
        torch.testing.assert_close(result, expected)


# Initial weights


@pytest.mark.parametrize(
    ("cls", "config"), [(PriorTransformer, PRIOR), (UNet2DConditionModel, DECODER), (UNet2DModel, SUPER_RES)]
)
def test_initial_weights_depend_on_the_generator_alone(cls, config):
    states = []
    for seed in (1, 1, 2):
        model = cls.from_config(config).initialize_for_training(torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    same = {name: torch.equal(states[0][name], states[1][name]) for name in states[0]}
    assert all(same.values()), same
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_fresh_unet_puts_out_zero_and_a_fresh_prior_whitens_by_nothing():
    model, inputs = decoder_case()
    assert model.initialize_for_training()(*inputs).sample.abs().max() == 0
    prior = prior_case()[0]
    assert prior.clip_std.min() == 1
    assert prior.clip_mean.abs().max() == 0
    assert 0 < prior.positional_embedding.std() < 0.02


# Bad shapes


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (prior_case, {0: torch.randn(2, 15)}, "hidden_states"),
        (prior_case, {0: torch.randn(3, 16)}, "batch"),
        (prior_case, {0: torch.randn(2, 2, 16)}, "additional_embeddings"),
        (prior_case, {1: torch.tensor([1, 2, 3])}, "timesteps"),
        (prior_case, {2: torch.randn(2, 17)}, "proj_embedding"),
        (prior_case, {3: torch.randn(2, 5, 17)}, "encoder_hidden_states"),
        (prior_case, {3: None}, "encoder_hidden_states"),
        (prior_case, {4: torch.ones(2, 6)}, "attention_mask"),
        (prior_case, {4: None, 3: torch.randn(2, 3, 16)}, "positions"),
        (decoder_case, {0: torch.randn(2, 3, 5, 6)}, "multiple of 2"),
        (decoder_case, {0: torch.randn(2, 4, 4, 6)}, "3, height"),
        (decoder_case, {2: torch.randn(2, 3, 13)}, "12"),
        (decoder_case, {3: None}, "class_labels"),
        (decoder_case, {4: torch.ones(2, 4)}, "attention_mask"),
        (super_res_case, {0: torch.randn(2, 6, 4)}, "height"),
    ],
)
def test_bad_shapes_are_named(case, changes, words):
    model, inputs = case()
    with pytest.raises(InputError, match=words):
        model(*(changes.get(i, value) for i, value in enumerate(inputs)))


def test_labels_for_a_network_that_takes_none():
    model, (x, t) = super_res_case()
    with pytest.raises(InputError, match="class_labels"):
        model(x, t, torch.zeros(2, 32))


@pytest.mark.parametrize("kind", ["decoder", "super_res_first"])
@torch.no_grad()
def test_deep_features(tiny_pipeline, kind):
    """With the deep levels of the same input the output is exact; with those of another input it is not."""
    network = getattr(tiny_pipeline, kind)
    x, other = torch.randn(2, 2, network.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    more = {}
    if kind == "decoder":
        more = {"context": network.prepare(torch.randn(2, 15, 12)), "class_labels": torch.randn(2, 32)}
    whole = network(x, 500, **more)
    kept = network(x, 500, **more, keep_deep=True)
    assert len(whole) == 1
    assert torch.equal(kept.sample, whole.sample)
    assert torch.equal(network(x, 500, **more, deep=kept.deep).sample, whole.sample)
    of_other = network(other, 500, **more, keep_deep=True)
    reused = network(x, 500, **more, deep=of_other.deep, keep_deep=True)
    assert torch.equal(reused.deep, of_other.deep)
    difference = (reused.sample - whole.sample).abs().mean()
    assert 0 < difference < (of_other.sample - whole.sample).abs().mean()
