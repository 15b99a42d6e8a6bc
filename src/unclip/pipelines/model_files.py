"""Files that belong to one model: latents and principal components, with fingerprints of the model's networks."""

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
from unclip.pipelines.unified import StableVariation
from unclip.stages.manipulation import BipartiteLatent


def fingerprint(pipe: UnCLIPImageVariationPipeline | StableVariation) -> str:
    """The fingerprint of a pipeline's decoder; empty when its weights are on the meta device."""
    return _made_by(pipe.decoder_networks)


class ModelFiles:
    """Writes and reads latents and principal components of one model, and refuses those of another model.

    Args:
        variation: the model's pipeline.
    """

    def __init__(self, variation: UnCLIPImageVariationPipeline | StableVariation) -> None:
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
        """Write a latent with fingerprints of the decoder, and of the super-resolution stages whose noise it has.

        Args:
            latent: any number of rows.
            path: ends in .safetensors.
            settings: steps, guidance and prompt of the inversion, by `invert`'s argument names (and the tile, see
                `unclip.checkpoints.tensor_file`). Decoding needs the same; `recorded_settings` reads them.
            about: further texts for the file.
            overwrite: replace an existing file.

        Raises: as `write_tensor_file`; InputError for unknown settings, or values that are not numbers.
        """
        noise = [_made_by(networks) for networks in _super_res(self.variation)[: len(latent.super_res_noise)]]
        texts = {**(about or {}), **record_texts(settings or {}), "fingerprint": fingerprint(self.variation)}
        if noise:
            texts["super_res_fingerprints"] = ",".join(noise)
        return latent.save(path, about=texts, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str]) -> tuple[BipartiteLatent, dict[str, str]]:
        """Read a latent of this model, and the texts in its file; `recorded_settings` makes `decode` arguments of them.

        Raises: as `read_tensor_file`; CheckpointError when it belongs to another model.
        """
        latent, about = BipartiteLatent.load(path)
        if not _may_be_made_by(about.pop("fingerprint", ""), self.variation.decoder_networks):
            raise CheckpointError(
                f"{path} was made with {_model(about)}, not with this one, and cannot be used with it. "
                "Invert the picture again with this model"
            )
        try:
            self.check_latent(latent)
        except InputError as problem:
            raise CheckpointError(f"{path} does not fit the model: {problem}") from problem
        noise = about.pop("super_res_fingerprints", "").split(",")
        if not all(map(_may_be_made_by, noise, _super_res(self.variation))):
            raise CheckpointError(
                f"{path} has super-resolution noise of other super-resolution networks than those of this model. "
                "Invert the picture again with this model"
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
        """Write components of this model's embeddings, with its image encoder's fingerprint; arguments as in `save`."""
        texts = {**(about or {}), "image_encoder": _made_by([self.variation.image_encoder])}
        return components.save(path, about=texts, overwrite=overwrite)

    def load_components(self, path: str | os.PathLike[str]) -> PrincipalComponents:
        """Read components of this model's embeddings; a file without a fingerprint is accepted.

        Raises: as `PrincipalComponents.load`; CheckpointError for components of another image encoder or width.
        """
        components, about = PrincipalComponents.load_with_texts(path)
        encoder = self.variation.image_encoder
        known = _may_be_made_by(about.get("image_encoder", ""), [encoder])
        if not known or components.dim != encoder.config.projection_dim:
            raise CheckpointError(
                f"{path} was fitted with the image encoder of {_model(about)}, but this model has another one. Fit "
                "the components again with this model"
            )
        return components

    def check_latent(self, latent: BipartiteLatent) -> None:
        """Raises: InputError for a latent of other sizes than this model's, or that is not finite."""
        pipe, noise = self.variation, latent.super_res_noise
        check_embeddings(latent.image_embedding, pipe.embedding_dim)
        stages = {"decoder": pipe.decoder_stage(), **pipe.super_res_stages()}
        if len(noise) >= len(stages):
            raise InputError(
                f"it has noise of {len(noise)} super-resolution stages, but this model has {len(stages) - 1} stages"
            )
        for (name, stage), given in zip(stages.items(), (latent.decoder_latents, *noise), strict=False):
            check_latents(given, f"{name}_latents", stage.sample_shape(len(latent)))


def recorded_settings(about: Mapping[str, str]) -> dict[str, Any]:
    """The `decode` arguments in a latent's texts, as `Manipulator.save` or `unclip invert` wrote them.

    Settings that the file does not have are left out. Raises: CheckpointError for a text that is not a number.
    """
    found = read_record(about, "the latent's file")
    return {name: value for name, value in found.items() if name != TILE}


def _super_res(pipe: UnCLIPImageVariationPipeline | StableVariation) -> list[list[nn.Module]]:
    return [[part.first, part.last] for part in pipe.cascade.values()]


def _made_by(networks: list[nn.Module]) -> str:
    return fingerprint_of(plain_state_dict(network) for network in networks)


def _may_be_made_by(made: str, networks: list[nn.Module]) -> bool:
    """Whether a fingerprint is of these networks, or that cannot be known."""
    return may_be_of(made, [plain_state_dict(network) for network in networks])


def _model(about: Mapping[str, str]) -> str:
    return f"the model {about['model']}" if "model" in about else "another model"
