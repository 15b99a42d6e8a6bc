"""Which of a pipeline's networks a fingerprint is of.

Knows components by name; knows not what a fingerprint is kept with. Called by `manipulation.py`.
"""

from torch import nn

from unclip.checkpoints.fingerprint import fingerprint as fingerprint_of
from unclip.checkpoints.fingerprint import may_be_of
from unclip.checkpoints.offloaded import plain_state_dict
from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline


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
