"""A decoder in latent space: the loop samples latents, and the stage's result is pictures."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from unclip.clip.encoders import Batched
from unclip.diffusion.loop import NoiseSource
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import DDIMSampler
from unclip.stages.latent import LatentStage
from unclip.stages.stage import sample

PROCESS = DiffusionProcess(prediction_type="sample", clip_range=None)


class Pooling:
    """An autoencoder without weights: the latents are means of 4×4 pixels, times `scale`."""

    factor, channels, scale = 4, 3, 0.5

    def encode_pictures(self, pictures):
        return self.scale * F.avg_pool2d(pictures, self.factor)

    def decode_latents(self, latents):
        return F.interpolate(latents / self.scale, scale_factor=self.factor)


@dataclass(frozen=True)
class Colour(Batched):
    colour: torch.Tensor
    shade: torch.Tensor | None = None


def towards_the_colour(condition):
    return lambda x_t, t: 0.5 * condition.colour[:, :, None, None].expand_as(x_t)


def run(stage, condition, **more):
    path = {"sampler": DDIMSampler(stage.process), "timesteps": (999, 500, 0)}
    return sample(stage, condition, noise=NoiseSource(torch.Generator().manual_seed(0), 2), **path, **more)


def test_latents_are_sampled_and_decoded():
    colours = torch.tensor([[0.25, 0.5, -1.5], [1, -1, 0]])
    stage = LatentStage(towards_the_colour, Pooling(), PROCESS, (2, 3))
    pictures = run(stage, Colour(colours))
    assert pictures.shape == (2, 3, 8, 12)
    torch.testing.assert_close(pictures, colours.clamp(-1, 1)[:, :, None, None].expand_as(pictures))
    latents = run(LatentStage(towards_the_colour, Pooling(), PROCESS, (2, 3), decodes=False), Colour(colours))
    torch.testing.assert_close(latents, 0.5 * colours[:, :, None, None].expand(2, 3, 2, 3))


def test_guidance_is_that_of_any_stage():
    given, null = torch.full((2, 3), 0.2), torch.full((2, 3), 0.1)
    stage = LatentStage(towards_the_colour, Pooling(), PROCESS, (1, 1))
    pictures = run(stage, Colour(given), null=Colour(null), guidance_scale=3.0)
    torch.testing.assert_close(pictures, torch.full((2, 3, 4, 4), 0.4))


@pytest.mark.parametrize("shade", [None, torch.ones(2, 1)])
def test_a_condition_may_lack_a_part(shade):
    joined = Colour(torch.zeros(2, 3), shade).join(Colour(torch.ones(2, 3), shade)).repeat(2).select([0, 7])
    assert joined.colour.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert (joined.shade is None) == (shade is None)
