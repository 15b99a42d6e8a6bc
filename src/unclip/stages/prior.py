"""The prior as a stage: caption → image embedding (paper §2.2).

Knows `PriorTransformer` and its whitening; knows no schedule. Called by pipelines and by training.
"""

from dataclasses import dataclass

from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.models.embeddings import timestep_rows
from unclip.models.prior import PriorTransformer
from unclip.stages.condition import PriorCondition


@dataclass(frozen=True)
class PriorStage:
    """Diffuses whitened image embeddings [batch, embedding_dim]."""

    prior: PriorTransformer
    process: DiffusionProcess

    def prepare(self, condition: PriorCondition) -> Denoiser:
        """The text's tokens pass through the transformer once; causality keeps them as they are at every step."""
        text, dtype = condition.text, self.prior.dtype
        prefix = self.prior.prepare(text.embeds.to(dtype), text.hidden_states.to(dtype), text.mask)

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            output = self.prior(x_t.to(dtype), timestep_rows(t, x_t.device), prefix=prefix)
            return output.predicted_image_embedding.float()

        return denoise

    def sample_shape(self, condition: PriorCondition) -> tuple[int, ...]:
        return (len(condition), self.prior.config.embedding_dim)

    def finish(self, x0: Tensor) -> Tensor:
        """Un-whitens: the embedding as CLIP's image encoder would give it."""
        return self.prior.post_process_latents(x0)
