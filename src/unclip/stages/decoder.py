"""The decoder as a stage: image embedding and caption → small picture (paper §2.1)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.models.layers import timestep_rows
from unclip.models.text_proj import UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel
from unclip.stages.stage import DecoderCondition, Size, reusing, size_px


@dataclass(frozen=True)
class DecoderStage:
    """Diffuses small pictures [batch, 3, height, width].

    Attributes:
        size: height and width; None: a square of the network's `sample_size`.
        reuse: the deep levels are computed in every `reuse`-th step; see `reusing`.
    """

    decoder: UNet2DConditionModel
    text_proj: UnCLIPTextProjModel
    process: DiffusionProcess
    size: Size | None = None
    reuse: int = 1

    def prepare(self, condition: DecoderCondition) -> Denoiser:
        """Compute the context tokens, and their keys and values in every cross-attention, once."""
        text, dtype = condition.text, self.decoder.dtype
        projected_dtype = self.text_proj.dtype
        tokens, time_embedding = self.text_proj(
            image_embeddings=condition.image_embedding.to(projected_dtype),
            given=condition.given,
            prompt_embeds=text.embeds.to(projected_dtype),
            text_encoder_hidden_states=text.hidden_states.to(projected_dtype),
        )
        mask = F.pad(text.mask, (self.text_proj.config.clip_extra_context_tokens, 0), value=True)
        context = self.decoder.prepare(tokens.to(dtype), mask)
        added = time_embedding.to(dtype)
        network = reusing(self.decoder, self.reuse)

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            rows = timestep_rows(t, x_t)
            return network(x_t.to(dtype), rows, class_labels=added, context=context).float()

        return denoise

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.decoder.config
        size = self.size or (size_px(config.sample_size),) * 2
        return (batch_size, config.in_channels, *size)

    def finish(self, x0: Tensor) -> Tensor:
        """A picture in [-1, 1]."""
        return x0.clamp(-1, 1)
