"""Which of a pipeline's networks a fingerprint is of.

Knows components by name; knows not what a fingerprint is kept with. Called by `manipulation.py`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from unclip.checkpoints.tensor_file import TILE, may_be_of, read_record, record_texts
from unclip.checkpoints.tensor_file import fingerprint as fingerprint_of
from unclip.checkpoints.weights import plain_state_dict
from unclip.errors import CheckpointError, InputError
from unclip.models.pca import PrincipalComponents
from unclip.pipelines.arguments import check_embeddings, check_latents
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.steps import GenerationPipeline
from unclip.stages.manipulation import BipartiteLatent


def fingerprint(pipe: GenerationPipeline) -> str:
    """Of the decoder: it tells which noise leads to which picture. Empty where the weights are away."""
    return _of(_decoder(pipe))


def super_res_fingerprints(pipe: GenerationPipeline, num_stages: int) -> list[str]:
    """As `fingerprint`, of the first super-resolution stages, one each."""
    return [_of(networks) for networks in _super_res(pipe, num_stages)]


def encoder_fingerprint(pipe: UnCLIPImageVariationPipeline) -> str:
    """As `fingerprint`, of the image encoder: it tells one space of embeddings from another."""
    return _of([pipe.image_encoder])


def has_decoder(pipe: GenerationPipeline, made: str) -> bool:
    """Whether a fingerprint is of this pipeline's decoder, or that cannot be known."""
    return _may_be(made, _decoder(pipe))


def has_super_res(pipe: GenerationPipeline, made: list[str]) -> bool:
    """As `has_decoder`, of its first super-resolution stages; those that it lacks are passed over."""
    stages = _super_res(pipe, len(made))
    return all(_may_be(one, networks) for one, networks in zip(made, stages, strict=False))


def has_encoder(pipe: UnCLIPImageVariationPipeline, made: str) -> bool:
    """As `has_decoder`, of its image encoder."""
    return _may_be(made, [pipe.image_encoder])


def _decoder(pipe: GenerationPipeline) -> list[nn.Module]:
    return [pipe.text_proj, pipe.decoder]


def _super_res(pipe: GenerationPipeline, num_stages: int) -> list[list[nn.Module]]:
    return [[part.first, part.last] for part in list(pipe.cascade.values())[:num_stages]]


def _of(networks: list[nn.Module]) -> str:
    return fingerprint_of(plain_state_dict(network) for network in networks)


def _may_be(made: str, networks: list[nn.Module]) -> bool:
    return may_be_of(made, [plain_state_dict(network) for network in networks])


class ModelFiles:
    """Writes and reads latents and components of one model, and refuses those of another.

    Args:
        variation: the model's parts.
    """

    def __init__(self, variation: UnCLIPImageVariationPipeline) -> None:
        self.variation = variation

    def save(
        self,
        latent: BipartiteLatent,
        path: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any] | None = None,
        about: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write a latent with fingerprints of this model's decoder, and of super-resolution where its noise is kept.

        Args:
            latent: of any number of rows.
            path: ends in .safetensors.
            settings: steps, guidance and prompt of the inversion, by `invert`'s argument names (and the tile, see
                `unclip.checkpoints.tensor_file`): decoding needs the same. `recorded_settings` reads them again, as the
                commands do.
            about: further texts to keep.
            overwrite: replace a file that is there.

        Raises: as `write_tensor_file`; InputError for settings of other names, or that are no numbers.
        """
        noise = super_res_fingerprints(self.variation, len(latent.super_res_noise))
        told = {
            **(about or {}),
            **record_texts(settings or {}),
            "fingerprint": fingerprint(self.variation),
            **({"super_res_fingerprints": ",".join(noise)} if noise else {}),
        }
        return latent.save(path, about=told, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str]) -> tuple[BipartiteLatent, dict[str, str]]:
        """Read a latent of this model, and the texts beside it; `recorded_settings` makes `decode`'s arguments of them.

        Raises: as `read_tensor_file`; CheckpointError when it is another model's.
        """
        latent, about = BipartiteLatent.load(path)
        if not has_decoder(self.variation, about.pop("fingerprint", "")):
            name = about.get("model")
            raise CheckpointError(
                f"{path} was made with {'the model ' + name if name else 'another model'}, and this is another one: a "
                "latent means nothing to any other. Invert the picture again with this model"
            )
        try:
            self.check_latent(latent)
        except InputError as problem:
            raise CheckpointError(f"{path} does not fit the model: {problem}") from problem
        if not has_super_res(self.variation, about.pop("super_res_fingerprints", "").split(",")):
            raise CheckpointError(
                f"{path} holds super-resolution's noise, which was found with other super-resolution networks than "
                "this model's and means nothing to these. Invert the picture again with this model"
            )
        return latent, about

    def save_components(
        self,
        components: PrincipalComponents,
        path: str | os.PathLike[str],
        *,
        about: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write components of this model's embeddings, with its image encoder's fingerprint; arguments as of `save`."""
        told = {**(about or {}), "image_encoder": encoder_fingerprint(self.variation)}
        return components.save(path, about=told, overwrite=overwrite)

    def load_components(self, path: str | os.PathLike[str]) -> PrincipalComponents:
        """Read components of this model's embeddings; those whose image encoder is not known pass.

        Raises: as `PrincipalComponents.load`; CheckpointError when they are of another image encoder or width.
        """
        components, about = PrincipalComponents.load_with_texts(path)
        width = self.variation.image_encoder.config.projection_dim
        known = has_encoder(self.variation, about.get("image_encoder", ""))
        if not known or components.dim != width:
            name = about.get("model")
            raise CheckpointError(
                f"{path} was fitted with the image encoder of {'the model ' + name if name else 'another model'}, and "
                "this one is another: its embeddings have other components. Fit them anew with this model"
            )
        return components

    def check_latent(self, latent: BipartiteLatent) -> None:
        """Raises: InputError for a latent whose sizes are not this model's, or that is not finite."""
        pipe = self.variation
        check_embeddings(latent.image_embedding, pipe.text_proj.config.clip_embeddings_dim)
        stages, noise = list(pipe.cascade), latent.super_res_noise
        if len(noise) > len(stages):
            raise InputError(f"it has noise of {len(noise)} super-resolution stages; this model has {len(stages)}")
        for name, given in zip(["decoder", *stages], (latent.decoder_latents, *noise), strict=False):
            check_latents(given, f"{name}_latents", (len(latent), *pipe._sample_shape(name)))


def recorded_settings(about: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `decode` that a latent's texts tell, as `Manipulator.save` or `unclip invert` wrote them.

    What the file does not say is left out. Raises: CheckpointError for a text that is no number.
    """
    found = read_record(about, "the latent's file")
    return {name: value for name, value in found.items() if name != TILE}
