"""The layout of a pipeline's folder: components, classes, and configurations derived from the shapes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from unclip.checkpoints.files import file_size, safe_join
from unclip.checkpoints.tensor_file import LIMIT_BYTES, may_be_of
from unclip.errors import CheckpointError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

API_VERSION = "0.26.3"
"""The value of `_diffusers_version` in written folders: the version of the layout."""

PRIOR_CLIP_RANGE = 10.0
"""Range to which Karlo's own code clamps the prior's prediction; the published diffusers folders have 5."""

DECODER_SIZE_PX = 64
SUPER_RES_SIZE_PX = 256

CLASSES: dict[str, tuple[str, str]] = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "prior_scheduler": ("diffusers", "UnCLIPScheduler"),
    "decoder_scheduler": ("diffusers", "UnCLIPScheduler"),
    "super_res_scheduler": ("diffusers", "UnCLIPScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
}
SHARED = (
    *("decoder", "text_encoder", "tokenizer", "text_proj", "super_res_first", "super_res_last"),
    *("decoder_scheduler", "super_res_scheduler"),
)
TEXT_TO_IMAGE = ("prior", "prior_scheduler", *SHARED)
VARIATION = (*SHARED, "feature_extractor", "image_encoder")

PROBE_FILE = "probe.safetensors"
"""Principal components of the image embeddings, an optional file beside a pipeline's components."""

CONCEPTS_FILE = "concepts.safetensors"
"""The concepts that a model knows, an optional file beside a pipeline's components."""

STATISTICS_FILE = "embedding_statistics.safetensors"
"""The distribution of the image embeddings, an optional file beside a pipeline's components."""

FURTHER_SUPER_RES = tuple(f"super_res_{number}" for number in range(2, 10))
"""Super-resolution stages beyond the first (such as 256 → 1024 px), the prefixes of their components."""
FURTHER = tuple(f"{stage}_{part}" for stage in FURTHER_SUPER_RES for part in ("first", "last", "scheduler"))
"""Optional components of every pipeline's folder. Other loaders ignore them."""


KANDINSKY = {
    "KandinskyPriorPipeline": "Kandinsky 2.1: the prior",
    "KandinskyPipeline": "Kandinsky 2.1: the decoder",
    "KandinskyImg2ImgPipeline": "Kandinsky 2.1: the decoder, for image to image",
    "KandinskyInpaintPipeline": "Kandinsky 2.1: the decoder for inpainting",
    "KandinskyCombinedPipeline": "Kandinsky 2.1: prior and decoder",
    "KandinskyImg2ImgCombinedPipeline": "Kandinsky 2.1: prior and decoder, for image to image",
    "KandinskyInpaintCombinedPipeline": "Kandinsky 2.1: prior and decoder for inpainting",
    "KandinskyV22PriorPipeline": "Kandinsky 2.2: the prior",
    "KandinskyV22Pipeline": "Kandinsky 2.2: the decoder",
    "KandinskyV22Img2ImgPipeline": "Kandinsky 2.2: the decoder, for image to image",
    "KandinskyV22InpaintPipeline": "Kandinsky 2.2: the decoder for inpainting",
    "KandinskyV22CombinedPipeline": "Kandinsky 2.2: prior and decoder",
    "KandinskyV22Img2ImgCombinedPipeline": "Kandinsky 2.2: prior and decoder, for image to image",
    "KandinskyV22InpaintCombinedPipeline": "Kandinsky 2.2: prior and decoder for inpainting",
}
"""What a Kandinsky folder is, by the class that its model_index.json names. These are the names of pipelines here."""


def kandinsky_next(index: Mapping[str, Any]) -> str:
    """The command or the line of Python that uses a Kandinsky folder; empty for another folder."""
    name = str(index.get("_class_name"))
    if name not in KANDINSKY:
        return ""
    if "Inpaint" in name:
        return f"in Python: {name}.from_pretrained(FOLDER)"
    if "Combined" in name:
        return "unclip generate CAPTION --model FOLDER"
    return "unclip convert kandinsky --prior FOLDER --decoder FOLDER --out DIR"


def model_index(class_name: str, components: Iterable[str]) -> dict[str, Any]:
    """The content of model_index.json."""
    parts = {name: list(CLASSES[name]) for name in components}
    return {"_class_name": class_name, "_diffusers_version": API_VERSION, **parts}


def scheduler_configs(prior_clip_range: float = PRIOR_CLIP_RANGE) -> dict[str, dict[str, Any]]:
    """The contents of scheduler_config.json of Karlo's three schedulers, by component name."""
    kinds = {
        "prior_scheduler": ("fixed_small_log", "sample", prior_clip_range),
        "decoder_scheduler": ("learned_range", "epsilon", 1.0),
        "super_res_scheduler": ("fixed_small_log", "epsilon", 1.0),
    }
    return {
        name: {
            **_header(name),
            "num_train_timesteps": 1000,
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": variance_type,
            "prediction_type": prediction_type,
            "clip_sample": True,
            "clip_sample_range": float(clip_range),
        }
        for name, (variance_type, prediction_type, clip_range) in kinds.items()
    }


def prior_config(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """config.json of the prior with these weights (folder layout names)."""
    width, embedding_dim = state["proj_in.weight"].shape
    return {
        **_header("prior"),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": _count(state, "transformer_blocks."),
        "embedding_dim": embedding_dim,
        "num_embeddings": state["positional_embedding"].shape[1] - 4,
        "additional_embeddings": 4,  # text embedding, timestep, noisy image embedding, the position of the output
        "dropout": 0.0,
    }


def text_proj_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of the text projection with these weights."""
    cross_attention_dim = state["encoder_hidden_states_proj.weight"].shape[0]
    return {
        **_header("text_proj"),
        "clip_extra_context_tokens": state["clip_extra_context_tokens_proj.weight"].shape[0] // cross_attention_dim,
        "clip_embeddings_dim": state["learned_classifier_free_guidance_embeddings"].shape[0],
        "time_embed_dim": state["embedding_proj.weight"].shape[0],
        "cross_attention_dim": cross_attention_dim,
    }


def decoder_config(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """config.json of the decoder with these weights."""
    plain = _unet_config(state)
    num_blocks = len(plain["block_out_channels"])
    return {
        **_header("decoder"),
        **plain,
        "sample_size": DECODER_SIZE_PX,
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * (num_blocks - 1)],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * (num_blocks - 1), "ResnetUpsampleBlock2D"],
        "cross_attention_dim": state["mid_block.attentions.0.add_k_proj.weight"].shape[1],
        "class_embed_type": "identity",
        "attention_head_dim": head_dim,
    }


def super_res_config(state: Mapping[str, Tensor], component: str) -> dict[str, Any]:
    """config.json of a super-resolution network with these weights."""
    plain = _unet_config(state)
    num_blocks = len(plain["block_out_channels"])
    return {
        **_header(component),
        **plain,
        "sample_size": SUPER_RES_SIZE_PX,
        "down_block_types": ["ResnetDownsampleBlock2D"] * num_blocks,
        "up_block_types": ["ResnetUpsampleBlock2D"] * num_blocks,
        "add_attention": False,
    }


def check_widths(
    prior: Mapping[str, Any],
    text_proj: Mapping[str, Any],
    decoder: Mapping[str, Any],
    clip: Mapping[str, Any],
    time_embed_dim: int,
) -> None:
    """Raise WeightsError when the configurations of the components do not fit together."""
    rows = (
        ("the prior's embedding", prior["embedding_dim"], "the text encoder's", clip["projection_dim"]),
        ("the prior's embedding", prior["embedding_dim"], "the text encoder's hidden", clip["hidden_size"]),
        ("the prior's context", prior["num_embeddings"], "the text encoder's", clip["max_position_embeddings"]),
        ("the prior's embedding", prior["embedding_dim"], "the text projection's", text_proj["clip_embeddings_dim"]),
        ("the decoder's context", decoder["cross_attention_dim"], "the text's", text_proj["cross_attention_dim"]),
        ("the decoder's time embedding", time_embed_dim, "the text projection's", text_proj["time_embed_dim"]),
    )
    for one, width, other, other_width in rows:
        if width != other_width:
            raise WeightsError(f"{one} width is {width}, {other} {other_width}; these files belong to different models")


def _unet_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    num_blocks = _count(state, "down_blocks.")
    first = "down_blocks.0.resnets.0."
    doubled = state[first + "time_emb_proj.weight"].shape[0] == 2 * state[first + "conv1.weight"].shape[0]
    widths = [state[f"down_blocks.{b}.resnets.0.conv1.weight"].shape[0] for b in range(num_blocks)]
    time_width = state["time_embedding.linear_1.weight"].shape[0]
    # The published folders omit the default, which is Karlo's width; only another width is written.
    own_time_width = {} if time_width == 4 * widths[0] else {"time_embedding_dim": time_width}
    return {
        **own_time_width,
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "layers_per_block": _count(state, "down_blocks.0.resnets."),
        "block_out_channels": widths,
        "resnet_time_scale_shift": "scale_shift" if doubled else "default",
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _header(component: str) -> dict[str, Any]:
    return {"_class_name": CLASSES[component][1], "_diffusers_version": API_VERSION}


def _count(names: Iterable[str], start: str) -> int:
    return len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})


@dataclass(frozen=True)
class ProbeFile:
    """A folder's `probe.safetensors`.

    Attributes:
        content: the bytes of the file.
        image_encoder: the fingerprint of the image encoder of the components; empty where the file does not state it
            or is damaged (reading the components then raises).
    """

    content: bytes
    image_encoder: str

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The file of a folder; None where there is none. Raises: CheckpointError for a file that is too large."""
        from safetensors import SafetensorError, safe_open

        path = safe_join(folder, PROBE_FILE)
        if not path.exists():
            return None
        if file_size(path) > LIMIT_BYTES:
            raise CheckpointError(f"{path} has more than {LIMIT_BYTES:,} bytes, the limit for this file: remove it")
        try:
            with safe_open(path, framework="pt") as file:
                return cls(path.read_bytes(), (file.metadata() or {}).get("image_encoder", ""))
        except (SafetensorError, OSError):
            return cls(path.read_bytes(), "")

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / PROBE_FILE).write_bytes(self.content)

    def may_be_of(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it belongs to the image encoder with these weights, or its image encoder is unknown."""
        return may_be_of(self.image_encoder, [state])
