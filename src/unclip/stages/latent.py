"""A decoder in latent space as a stage: it diffuses the latents of an autoencoder (Rombach et al. 2112.10752)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol

from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.stages.stage import Condition, Size


class Autoencoder(Protocol):
    """Converts pictures to latents and back."""

    @property
    def factor(self) -> int:
        """Pixels for each cell of the latents, along one side."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def scale(self) -> float:
        """The factor of the latents that are diffused, relative to those that the network computes."""
        ...

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, height, width] in [-1, 1] → latents [batch, channels, h, w], times `scale`; float32.

        h is height / `factor`.
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents, times `scale` → pictures, float32, about in [-1, 1]."""
        ...


@dataclass(frozen=True)
class LatentStage(Generic[Condition]):
    """Diffuses latents [batch, channels, height, width] and decodes them.

    Attributes:
        denoiser: prepares the network for a condition. Its outputs have the latents' channels, or twice as many if
            the process learns its variance.
        autoencoder: of the latents.
        process: of the network.
        size: height and width of the latents in cells; the pictures are `autoencoder.factor` times as large.
        decodes: False: the result is the latents.
    """

    denoiser: Callable[[Condition], Denoiser]
    autoencoder: Autoencoder
    process: DiffusionProcess
    size: Size
    decodes: bool = True

    def prepare(self, condition: Condition) -> Denoiser:
        return self.denoiser(condition)

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, self.autoencoder.channels, *self.size)

    def finish(self, x0: Tensor) -> Tensor:
        """Pictures in [-1, 1]; or the latents as they are."""
        return self.autoencoder.decode_latents(x0).clamp(-1, 1) if self.decodes else x0
