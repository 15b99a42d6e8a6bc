"""Tiny pipelines of random weights, for every test that needs one.

`tiny_components()` builds fresh parts; `tiny_pipeline` and `tiny_variation` are shared by the whole session and never
changed; `own_pipeline` and `own_variation` belong to one test, which may do with them what it likes.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

torch.set_num_threads(int(os.environ.get("UNCLIP_TEST_THREADS", "1")))
# A shell's background job is started with Ctrl-C ignored; the tests of Ctrl-C are of processes that are not.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

CONTEXT = 11  # with four extra tokens 15: no level of the decoder has as many pixels
FEW = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}

PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "embedding_dim": 16,
    "num_embeddings": CONTEXT,
}
DECODER = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RES = {
    "sample_size": 16,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "norm_num_groups": 4,
    "add_attention": False,
}
TEXT_PROJ = {
    "clip_extra_context_tokens": 4,
    "clip_embeddings_dim": 16,
    "time_embed_dim": 32,
    "cross_attention_dim": 12,
}
CONFIGS = {"prior": PRIOR, "decoder": DECODER, "super_res": SUPER_RES, "text_proj": TEXT_PROJ}
VARIATION_ONLY = ("image_encoder", "feature_extractor")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the cache of the person who runs it; subprocesses inherit this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def little_room():
    """Within `little_room(size)` no file can grow beyond so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Random weights that leave nothing at zero and keep activations in their range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_scale = (name.endswith("weight") and parameter.dim() == 1) or name.endswith("clip_std")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + float(is_scale))
    return network.eval()


def tiny_components(super_res: dict[str, Any] | None = None) -> dict[str, Any]:
    """All components of both pipelines; `super_res` overrides settings of the super-resolution networks."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from unclip import PriorTransformer, UnCLIPScheduler, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel
    from unclip.training.clip import image_processor, train_tokenizer

    tokenizer = train_tokenizer(["a red apple", "a cat"], vocabulary_size=520, context_length=CONTEXT)
    clip = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    end = len(tokenizer) - 1
    text_config = CLIPTextConfig(
        **clip,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision_config = CLIPVisionConfig(**clip, image_size=16, patch_size=8)
    wide = SUPER_RES | (super_res or {})
    return {
        "text_encoder": randomize(CLIPTextModelWithProjection(text_config), 1),
        "tokenizer": tokenizer,
        "prior": randomize(PriorTransformer(**PRIOR), 2),
        "text_proj": randomize(UnCLIPTextProjModel(**TEXT_PROJ), 3),
        "decoder": randomize(UNet2DConditionModel(**DECODER), 4),
        "super_res_first": randomize(UNet2DModel(**wide), 5),
        "super_res_last": randomize(UNet2DModel(**wide), 6),
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
        "image_encoder": randomize(CLIPVisionModelWithProjection(vision_config), 7),
        "feature_extractor": image_processor(16),
    }


def build(kind: str, components: dict[str, Any]) -> Any:
    """A quiet pipeline, "text", "variation" or "inpaint", of those components that it has."""
    from unclip import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline

    kinds = {"text": UnCLIPPipeline, "variation": UnCLIPImageVariationPipeline, "inpaint": UnCLIPInpaintPipeline}
    cls = kinds[kind]
    pipeline = cls(**{name: part for name, part in components.items() if name in cls.component_names()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session", name="tiny_components")
def _tiny_components() -> Callable[..., dict[str, Any]]:
    return tiny_components


@pytest.fixture(scope="session")
def tiny_configs() -> dict[str, dict[str, Any]]:
    return CONFIGS


@pytest.fixture(scope="session")
def build_pipeline() -> Callable[[str, dict[str, Any]], Any]:
    return build


@pytest.fixture(scope="session")
def _shared_components() -> dict[str, Any]:
    return tiny_components()


@pytest.fixture(scope="session")
def tiny_pipeline(_shared_components):
    return build("text", _shared_components)


@pytest.fixture(scope="session")
def tiny_variation(_shared_components):
    return build("variation", _shared_components)


@pytest.fixture(scope="session")
def tiny_inpaint(_shared_components):
    return build("inpaint", _shared_components)


@pytest.fixture
def own_pipeline():
    return build("text", tiny_components())


@pytest.fixture
def own_variation():
    return build("variation", tiny_components())


@pytest.fixture
def few() -> dict[str, int]:
    """Two steps a stage, by argument name."""
    return dict(FEW)


@pytest.fixture
def make(tiny_pipeline):
    """Run the shared pipeline in few steps; returns float32 pictures [batch, 3, 16, 16]."""

    def run(*args: Any, **arguments: Any) -> torch.Tensor:
        return tiny_pipeline(*args, **{**FEW, "output_type": "pt", **arguments}).images

    return run


@pytest.fixture
def vary(tiny_variation):
    """Run the shared variation pipeline in few steps; returns float32 pictures."""
    steps = {name: count for name, count in FEW.items() if not name.startswith("prior")}

    def run(*args: Any, **arguments: Any) -> torch.Tensor:
        return tiny_variation(*args, **{**steps, "output_type": "pt", **arguments}).images

    return run
