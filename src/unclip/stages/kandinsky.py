"""Kandinsky's decoder: how its network is prepared for a condition, and the region that inpainting keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip.encoders import Batched, TextEmbedding
from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.models.kandinsky import KandinskyUNet
from unclip.models.layers import timestep_rows


@dataclass(frozen=True)
class KandinskyCondition(Batched):
    """The condition of Kandinsky's decoders.

    Attributes:
        image_embedding: [batch, image_embedding_dim], not whitened. In the null condition, the negative embedding.
        text: the caption, which only Kandinsky 2.1 has.
        known: further input channels [batch, channels, height, width], which only the networks for inpainting have: the
            latents of the kept region, 0 elsewhere, and 1 where a cell is kept.
    """

    image_embedding: Tensor
    text: TextEmbedding | None = None
    known: Tensor | None = None


def kandinsky_denoiser(unet: KandinskyUNet, process: DiffusionProcess) -> Callable[[KandinskyCondition], Denoiser]:
    """The `denoiser` of a `LatentStage`. A variance that the process does not use is left out of the outputs."""

    def prepare(condition: KandinskyCondition) -> Denoiser:
        dtype, text, known = unet.dtype, condition.text, condition.known
        texts = () if text is None else (text.hidden_states.to(dtype), text.embeds.to(dtype))
        tokens, addition = unet.project(condition.image_embedding.to(dtype), *texts)
        context = unet.prepare(tokens)

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            x = x_t if known is None else torch.cat([x_t, known], dim=1)
            output = unet(x.to(dtype), timestep_rows(t, x_t), class_labels=addition, context=context).sample.float()
            return output if process.learns_variance else output[:, : x_t.shape[1]]

        return denoise

    return prepare


def kept_cells(region: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of latents that inpainting keeps: bool [batch, 1, height, width].

    A cell is repainted if the pixel in its corner is, or if one of its neighbours is repainted: those beside it, those
    above and below, and two of the four at its corners, as in the reference.

    Args:
        region: bool [batch, 1, height, width] of the picture, true where it is repainted.
        size: height and width of the latents.
    """
    drawn = F.interpolate(region.float(), size, mode="nearest")
    cross = region.new_tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=drawn.dtype)
    return F.conv2d(drawn, cross[None, None], padding=1) == 0
