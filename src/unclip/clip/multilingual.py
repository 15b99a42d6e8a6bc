"""The multilingual text encoder of Kandinsky 2.1: XLM-RoBERTa with a projection into CLIP's space.

Source: Carlsson et al. 2022, "Cross-lingual and Multilingual CLIP". The network is transformers' own; the class has the
keys of diffusers' MultilingualCLIP. Importing this module imports transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, XLMRobertaConfig, XLMRobertaModel

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.weights import TRANSFORMERS_STEM, check_finite, check_fit, open_weights, read_tensors
from unclip.clip.encoders import TextEmbedding, check_prompt
from unclip.errors import CheckpointError, ConfigError

CONTEXT = 77
"""Tokens of a caption, start and end included; shorter ones are padded."""
TABLES = ("position_ids",)
"""Endings of the names of tensors in older files that are not weights."""


class MCLIPConfig(XLMRobertaConfig):
    """Settings of `MultilingualCLIP`, with the keys of diffusers' class of this name.

    Args:
        transformerDimensions: width of the hidden states.
        numDims: width of the projected embedding.
        settings: those of transformers' XLMRobertaConfig.
    """

    model_type = "M-CLIP"

    def __init__(self, transformerDimensions: int = 1024, numDims: int = 768, **settings: Any) -> None:
        self.transformerDimensions = transformerDimensions
        self.numDims = numDims
        super().__init__(**settings)


class MultilingualCLIP(PreTrainedModel):
    """XLM-RoBERTa, and the projection of the mean of its hidden states."""

    config_class = MCLIPConfig

    def __init__(self, config: MCLIPConfig) -> None:
        super().__init__(config)
        self.transformer = XLMRobertaModel(config)
        self.LinearTransformation = nn.Linear(config.transformerDimensions, config.numDims)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings [batch, numDims] and hidden states [batch, tokens, width] of tokens [batch, tokens]."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        shares = attention_mask.to(states.dtype)[:, :, None]
        return self.LinearTransformation((states * shares).sum(dim=1) / shares.sum(dim=1)), states


@dataclass(frozen=True)
class MultilingualTextEncoder:
    """The multilingual text encoder with its tokenizer."""

    text_encoder: MultilingualCLIP
    tokenizer: Any

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> TextEmbedding:
        """Encode captions of any language, each cut off or padded to 77 tokens.

        Raises: InputError for a value that is not a string, or has over 100,000 characters.
        """
        for prompt in prompts:
            check_prompt(prompt)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
        )
        mask = tokens["attention_mask"].to(device)
        embeds, states = self.text_encoder(tokens["input_ids"].to(device), mask)
        return TextEmbedding(embeds, states, mask.bool())


def read_multilingual(folder: Path, dtype: torch.dtype | None, variant: str | None) -> MultilingualCLIP:
    """Read the text encoder; names, shapes and values are checked first.

    Raises: CheckpointError for a file that is missing or does not fit; ConfigError for unusable settings.
    """
    settings = read_json(safe_join(folder, "config.json"))
    try:
        config = MCLIPConfig(**{name: value for name, value in settings.items() if not name.startswith("_")})
        with torch.device("meta"):
            wanted = MultilingualCLIP(config).state_dict()
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ConfigError(f"{folder / 'config.json'} has unusable settings: {problem}") from problem
    index = open_weights(folder, stem=TRANSFORMERS_STEM, variant=variant).without(TABLES)
    check_fit({name: tuple(value.shape) for name, value in wanted.items()}, index, folder)
    for name, tensor in read_tensors(index):
        check_finite(tensor, name, str(folder))
    model = MultilingualCLIP.from_pretrained(
        folder,
        config=config,
        dtype=dtype or torch.float32,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval()


def read_multilingual_tokenizer(folder: Path) -> Any:
    """Read XLM-RoBERTa's tokenizer. Raises: CheckpointError without its files."""
    from transformers import XLMRobertaTokenizer

    for path in sorted(folder.glob("*.json")):
        read_json(safe_join(folder, path.name))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "sentencepiece.bpe.model")):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor sentencepiece.bpe.model")
    return XLMRobertaTokenizer.from_pretrained(folder, local_files_only=True)
