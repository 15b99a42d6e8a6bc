"""Check the arguments of `from_pretrained`: the type of the weights, and arguments that only diffusers has."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.layout import FURTHER
from unclip.errors import InputError, UnsafeFileError

if TYPE_CHECKING:
    import torch

IGNORED = {
    "custom_revision": "unclip does not run code of a model",
    "disable_mmap": "weights are memory-mapped where possible",
    "load_connected_pipeline": "a folder contains one pipeline",
    "low_cpu_mem_usage": "weights are always loaded without a second copy",
    "max_memory": "only one device is supported; see enable_model_cpu_offload",
    "mirror": "the hub's client has no mirrors; set the environment variable HF_ENDPOINT",
    "offload_folder": "only one device is supported; see enable_sequential_cpu_offload",
    "offload_state_dict": "weights are always loaded without a second copy",
    "provider": "ONNX is not read",
    "provider_options": "ONNX is not read",
    "requires_safety_checker": "unclip has no safety checker",
    "resume_download": "downloads are always resumed",
    "sess_options": "ONNX is not read",
    "trust_remote_code": "unclip does not run code of a model",
}
"""Arguments of diffusers' `from_pretrained` that have no effect here, with the reason."""

REFUSED = {
    "custom_pipeline": "unclip does not run code of a model; import the class instead, such as "
    "unclip.UnCLIPTextInterpolationPipeline or unclip.UnCLIPImageInterpolationPipeline",
    "force_download": "use `hf download NAME --force-download`",
    "from_flax": "only safetensors are read",
    "from_tf": "only safetensors are read",
    "ignore_mismatched_sizes": "weights must fit their network",
    "output_loading_info": "missing and unexpected weights are always an error",
    "pretrained_model_name_or_path": "give the model as the first argument",
    "proxies": "set the environment variable HTTPS_PROXY",
    "quantization_config": "weights cannot be quantised; torch_dtype=torch.bfloat16 halves their memory",
    "return_cached_folder": "use `hf download NAME`, which prints the folder",
    "safety_checker": "unclip has no safety checker; check the generated pictures yourself",
    "scheduler": "each stage has its own: prior_scheduler, decoder_scheduler, super_res_scheduler",
    "subfolder": "give the folder itself as the first argument",
    "use_auth_token": "it is called token",
    "use_flashpack": "only safetensors are read",
    "use_onnx": "only safetensors are read",
}
"""Arguments of diffusers' `from_pretrained` that unclip does not support, with the alternative."""


def accepted_arguments(
    arguments: Mapping[str, Any], method: Any, others: Collection[str] | None = ()
) -> dict[str, Any]:
    """Remove the arguments that unclip ignores, warn of them once, and return the others.

    Args:
        arguments: the keyword arguments that the signature of `from_pretrained` does not have.
        method: the method.
        others: further names that are allowed; None allows any.

    Raises: InputError for an argument that is unsupported or unknown.
    """
    where = f"{method.__self__.__name__}.{method.__name__}"
    left: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in arguments.items():
        if others and name in others:
            left[name] = value
            continue
        is_default = value is None or value is (name == "low_cpu_mem_usage")
        if name in REFUSED and not is_default:
            raise InputError(f"{where} does not support {name}: {REFUSED[name]}")
        if name in IGNORED and not is_default:
            ignored.append(f"{name} ({IGNORED[name]})")
        elif name in IGNORED or name in REFUSED:
            continue
        elif others is None:
            left[name] = value
        else:
            parameters = inspect.signature(method).parameters.values()
            names = dict.fromkeys([*(one.name for one in parameters if one.kind is not one.VAR_KEYWORD), *others])
            near = difflib.get_close_matches(name, [*names, *IGNORED, *REFUSED], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(n for n in names if n not in FURTHER)}"
            raise InputError(f"{where} has no argument{' or component' if others else ''} {name!r}; {hint}")
    if ignored:
        warnings.warn(f"{where} ignores {', '.join(ignored)}", UserWarning, stacklevel=3)
    return left


def weights_type(torch_dtype: Any, use_safetensors: object = None) -> torch.dtype | str | None:
    """The requested type of the weights: a torch dtype, "auto", "stored", or None for float32.

    Args:
        torch_dtype: a floating-point torch dtype, or its name with or without "torch."; "auto", the fastest type on the
            device; "stored", the type in the file; or None.
        use_safetensors: None or True; both have the same effect.

    Raises: InputError for any other type; UnsafeFileError for `use_safetensors=False`.
    """
    import torch

    if use_safetensors is not None and not use_safetensors:
        raise UnsafeFileError(
            "only safetensors are read; to convert pickles that you trust: unclip convert pickle --help"
        )
    if torch_dtype is None or (isinstance(torch_dtype, str) and torch_dtype in ("auto", "stored")):
        return torch_dtype
    found = getattr(torch, torch_dtype.removeprefix("torch."), None) if isinstance(torch_dtype, str) else torch_dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(
            f'torch_dtype is {torch_dtype!r}; it must be "auto", "stored", or a floating-point torch dtype or its '
            'name, such as torch.float16 or "bfloat16"'
        )
    return found
