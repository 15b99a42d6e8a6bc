"""The public steps: they give the picture of a call, and take another sampler or another kind of decoder."""

from dataclasses import dataclass, replace

import pytest
import torch

from unclip import DDIMScheduler
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.diffusion.sampler import DDIMSampler
from unclip.pipelines.steps import Call, decode, embed, encode, enlarge, finish
from unclip.stages.decoder import DecoderStage


@pytest.fixture
def run_steps(tiny_pipeline):
    """Run the steps for "a cat" with seed 1; `change` replaces the decoder's run."""
    pipe = tiny_pipeline

    @torch.no_grad()
    def run(change=lambda decoder: decoder):
        decoder = change(pipe.decoder_run(2, 8.0))
        call = Call(pipe, NoiseSource(generators_from_seed(1, 1), 1))
        text, null = (encode(pipe.caption_encoder, [caption], 1, 1, pipe.device) for caption in ("a cat", ""))
        embeddings = embed(pipe.prior_run(2, 4.0), text, null, call)
        small = decode(decoder, text, null, embeddings, call)
        large = enlarge(pipe.super_res_runs(2), small, call)
        return finish(large, small, embeddings, call, output_type="pt", return_intermediates=True)

    return run


def test_the_steps_give_the_picture_of_a_call(run_steps, make):
    assert torch.equal(run_steps().images, make("a cat", seed=1))


def test_another_sampler(run_steps, own_pipeline, make, few):
    """A run with another sampler equals a pipeline with its scheduler."""
    own_pipeline.decoder_scheduler = DDIMScheduler.from_config(own_pipeline.decoder_scheduler.config)
    expected = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    found = run_steps(lambda decoder: replace(decoder, sampler=DDIMSampler(decoder.sampler.process)))
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found.images, make("a cat", seed=1))


@dataclass(frozen=True)
class MirroringDecoder:
    """A decoder with another `finish`, as one in latent space has."""

    inner: DecoderStage

    @property
    def process(self):
        return self.inner.process

    def prepare(self, condition):
        return self.inner.prepare(condition)

    def sample_shape(self, batch_size):
        return self.inner.sample_shape(batch_size)

    def finish(self, x0):
        return self.inner.finish(x0).flip(-1)


def test_another_decoder(run_steps):
    mirrored = run_steps(lambda decoder: replace(decoder, stage=MirroringDecoder(decoder.stage)))
    assert torch.equal(mirrored.small_images, run_steps().small_images.flip(-1))
