"""A tiny random model on disk, and the command line run in this process."""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from unclip.cli.main import app

FEW_STEPS = ["--prior-steps", "2", "--decoder-steps", "2", "--super-res-steps", "2"]
FEW_DECODER_STEPS = ["--decoder-steps", "2", "--super-res-steps", "2"]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture(autouse=True)
def no_defaults_of_a_person(monkeypatch):
    """Neither variables nor the file of whoever runs the tests; float32, whatever type this machine computes fast."""
    for name in [name for name in os.environ if name.startswith("UNCLIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNCLIP_CONFIG", os.devnull)
    monkeypatch.setenv("UNCLIP_DTYPE", "float32")


@pytest.fixture
def unclip():
    """Runs a command: `unclip("generate", "a cat", stdin=…)`."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Done:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="unclip")
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image folder without an image encoder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe, _ = _pipelines()
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, text_to_image: Path) -> Path:
    """A text-to-image folder that holds an image encoder too, as the built-in model does."""
    base = tmp_path_factory.mktemp("models")
    folder = shutil.copytree(text_to_image, base / "tiny")
    _, variation = _pipelines()
    variation.save_pretrained(base / "variation")
    index = json.loads((folder / "model_index.json").read_text())
    more = json.loads((base / "variation" / "model_index.json").read_text())
    for name in ("image_encoder", "feature_extractor"):
        shutil.copytree(base / "variation" / name, folder / name)
        index[name] = more[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def variation(model: Path) -> Path:
    """A folder for variations alone."""
    return model.parent / "variation"


def _pipelines():
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )
    from transformers.utils import logging

    from unclip import (
        PriorTransformer,
        UnCLIPImageVariationPipeline,
        UnCLIPPipeline,
        UnCLIPScheduler,
        UnCLIPTextProjModel,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from unclip.training.clip import image_processor, train_tokenizer

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = train_tokenizer(["a red apple", "a cat"], vocabulary_size=520, context_length=12)
        size = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
        size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        last = len(tokenizer) - 1
        text = CLIPTextConfig(
            **size,
            vocab_size=len(tokenizer),
            max_position_embeddings=12,
            bos_token_id=last - 1,
            eos_token_id=last,
            pad_token_id=last,
        )
        prior = PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=32, num_embeddings=12
        )
        prior.initialize_for_training(torch.Generator().manual_seed(0))
        decoder = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=24,
            class_embed_type="identity",
            attention_head_dim=16,
            resnet_time_scale_shift="scale_shift",
        )

        def super_res() -> UNet2DModel:
            return UNet2DModel(
                sample_size=32,
                in_channels=6,
                out_channels=3,
                block_out_channels=(32, 32),
                layers_per_block=1,
                down_block_types=("ResnetDownsampleBlock2D",) * 2,
                up_block_types=("ResnetUpsampleBlock2D",) * 2,
                add_attention=False,
            ).eval()

        pipe = UnCLIPPipeline(
            text_encoder=CLIPTextModelWithProjection(text).eval(),
            tokenizer=tokenizer,
            prior=prior.eval(),
            text_proj=UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=24).eval(),
            decoder=decoder.eval(),
            super_res_first=super_res(),
            super_res_last=super_res(),
            prior_scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
            decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
            super_res_scheduler=UnCLIPScheduler(),
        )
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**size, image_size=32, patch_size=8)).eval()
        variation = UnCLIPImageVariationPipeline.from_pipe(
            pipe, image_encoder=encoder, feature_extractor=image_processor(32)
        )
    return pipe, variation
