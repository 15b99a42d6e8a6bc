"""Recognises the checkpoints of the unCLIP family, folders and files, from headers and names; nothing is unpickled."""

import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unclip.checkpoints.dalle2 import MARK, arithmetic_of, is_inert
from unclip.checkpoints.files import file_size, read_json, safe_join
from unclip.checkpoints.layout import KANDINSKY, kandinsky_next
from unclip.checkpoints.weights import read_header
from unclip.errors import CheckpointError, ConfigError, UnclipError

PICKLES = (".pth", ".pt", ".ckpt", ".th", ".bin")
LARGEST_PICKLE_BYTES = 64 << 20
KARLO = "--prior FILE --decoder FILE --super-res FILE --stats FILE --clip openai/clip-vit-large-patch14 --out DIR"
TRANSLATOR = {"source_mean", "target_mean", "weight"}
"""Tensors of a file of `unclip train translator`."""
PIPELINES = {
    "UnCLIPPipeline": "unCLIP, text to image (Karlo's layout)",
    "UnCLIPImageVariationPipeline": "unCLIP, image variations (Karlo's layout)",
    "UnCLIPInpaintPipeline": "unCLIP, inpainting (Karlo's layout)",
    "StableUnCLIPPipeline": "Stable unCLIP, text to image",
    "StableUnCLIPImg2ImgPipeline": "Stable unCLIP, image variations",
    **KANDINSKY,
}
"""What a pipeline's folder is, by the class that its model_index.json names."""


@dataclass(frozen=True)
class Family:
    """What a folder or a file is.

    Attributes:
        name: the family and the part.
        missing: what it lacks to be used.
        next: a command, or a line of Python, that converts or uses it; empty for a folder that commands take as it is.
    """

    name: str
    missing: tuple[str, ...] = ()
    next: str = ""


@dataclass(frozen=True)
class Texts:
    """The texts and the classes in a pickle, which is not unpickled."""

    texts: frozenset[str]
    classes: frozenset[str]


def recognised(path: Path) -> Family | None:
    """What `path` is; None if it is nothing that is known.

    Raises: CheckpointError for a damaged file.
    """
    return _of_folder(path) if path.is_dir() else _of_file(path)


# -- files ---------------------------------------------------------------------------------------------------------


def _of_file(path: Path) -> Family | None:
    if path.suffix == ".safetensors":
        header = read_header(path)
        if header.keys() >= TRANSLATOR:
            target, source = header["weight"].shape
            use = f"unclip decode EMBEDDINGS --translator {path}"
            return Family(f"a translator of embeddings, from width {source} to width {target}", (), use)
        return _of_names(path, set(header), None)
    if path.suffix in PICKLES and (found := pickle_texts(path)) is not None:
        return _of_names(path, found.texts, found)
    return None


def _of_names(path: Path, names: Iterable[str], pickled: Texts | None) -> Family | None:
    """The family of a file whose tensors, and for pickles other texts, have these names."""
    marks = sorted((name for name in names if name.endswith(MARK)), key=len, reverse=True)
    if marks:
        starts = [mark.removesuffix(MARK) for mark in marks]
        return _dalle2(path, {name.removeprefix(start) for name in names for start in starts}, pickled)
    for mark, part in _KARLO_MARKS.items():
        if any(name.startswith(mark) for name in names):
            return Family(f"Karlo's original {part}", (), f"unclip convert karlo {KARLO}")
    return None


_KARLO_MARKS = {
    "model_first_steps.": "super-resolution",
    "model.cf_param": "decoder",
    "model.transformer.resblocks.": "prior",
}


def _dalle2(path: Path, names: set[str], pickled: Texts | None) -> Family:
    texts = pickled.texts if pickled else set()
    is_grid, has_version = "null_brain_embeds" in names, "version" in texts
    kind = "trainer's file" if texts & {"optimizer", "optimizer_state_dict"} else "state dict"
    who = "MindEye: a prior on a grid of tokens" if is_grid else "DALLE2-pytorch: a prior"
    options = " --project mindeye1 (or mindeye2)" if is_grid else ""
    missing: tuple[str, ...] = ()
    if not is_grid and not has_version:
        try:
            arithmetic_of(names, None, str(path))
        except ConfigError:
            missing = ("the version of DALLE2-pytorch that trained it",)
            options = " --package-version X.Y.Z"
    if not is_grid and (path.parent / "prior_config.json").is_file():
        options += f" --config {path.parent / 'prior_config.json'}"
    refused = sorted(name for name in (pickled.classes if pickled else ()) if not _is_plain(name))
    if refused:
        missing += (f"safe contents: it has {', '.join(refused)[:120]} and is refused",)
    return Family(f"{who} ({kind})", missing, f"unclip convert dalle2-prior {path}{options} --out DIR")


def _is_plain(name: str) -> bool:
    return name.startswith(("torch._utils.", "torch.", "collections.OrderedDict")) or is_inert(name)


def pickle_texts(path: Path) -> Texts | None:
    """The texts and classes in the pickle of a file in torch's zip format; None for another file.

    Raises: CheckpointError for a damaged file, or a pickle that is too large.
    """
    texts: set[str] = set()
    classes: set[str] = set()
    recent: list[str] = []
    file_size(path)
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            entry = next((info for info in file.infolist() if info.filename.endswith("data.pkl")), None)
            if entry is None:
                return None
            if entry.file_size > LARGEST_PICKLE_BYTES:
                raise CheckpointError(f"{path} has a pickle of {entry.file_size:,} bytes: it is not a checkpoint")
            content = file.read(entry)
        for code, argument, _ in pickletools.genops(content):
            if code.name == "STACK_GLOBAL":
                classes.add(".".join(recent))
            elif not isinstance(argument, str):
                continue
            elif code.name in ("GLOBAL", "INST"):
                classes.add(argument.replace(" ", "."))
            else:
                texts.add(argument)
                recent = [*recent[-1:], argument]
    except (zipfile.BadZipFile, ValueError, OSError) as problem:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint: {str(problem)[:200]}") from problem
    return Texts(frozenset(texts), frozenset(classes))


# -- folders -------------------------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> Family | None:
    index = folder / "model_index.json"
    if index.is_file():
        return _of_pipeline(folder, read_json(safe_join(folder, index.name)))
    if (folder / "config.json").is_file():
        return _of_component(read_json(safe_join(folder, "config.json")), folder)
    if (folder / "prior" / "config.json").is_file():
        found = _of_component(read_json(safe_join(folder / "prior", "config.json")), folder)
        if found is not None:
            has_scheduler = (folder / "prior_scheduler").is_dir() or found.name.startswith("ECLIPSE")
            return Family(found.name, found.missing if has_scheduler else ("prior_scheduler",), found.next)
    files = sorted(path for path in folder.iterdir() if path.suffix in (*PICKLES, ".safetensors"))
    for path in files:
        try:
            found = _of_file(path)
        except UnclipError:
            continue
        if found is not None:
            return Family(f"{found.name}, in {path.name}", found.missing, found.next)
    return None


def _of_pipeline(folder: Path, index: dict[str, Any]) -> Family | None:
    name = PIPELINES.get(str(index.get("_class_name")))
    if name is None:
        return None
    parts = [key for key, entry in index.items() if isinstance(entry, list) and entry != [None, None]]
    missing = tuple(f"the folder {part}" for part in parts if not (folder / part).is_dir())
    prior = folder / "prior" / "config.json"
    found = _of_component(read_json(safe_join(folder / "prior", "config.json")), folder) if prior.is_file() else None
    if "image_normalizer" in parts and "the folder image_normalizer" not in missing:
        width = read_json(safe_join(folder / "image_normalizer", "config.json")).get("embedding_dim", 768)
        size = {768: "small, CLIP ViT-L/14", 1024: "large, CLIP ViT-H/14"}.get(width, "of another size")
        name = f"{name} ({size}, width {width})"
        missing += () if find_spec("diffusers") else ("diffusers: pip install 'unclip[family]'",)
    return Family(name if found is None else f"{name}, with: {found.name}", missing, kandinsky_next(index))


def _of_component(config: dict[str, Any], folder: Path) -> Family | None:
    """What a network is besides a plain part of Karlo's pipeline."""
    return next((found for rule in _COMPONENTS if (found := rule(config, folder)) is not None), None)


def _eclipse(config: dict[str, Any], folder: Path) -> Family | None:
    defaults = {"added_emb_type": "prd", "encoder_hid_proj_type": "linear", "additional_embeddings": 4}
    settings = tuple(config.get(key, value) for key, value in defaults.items())
    if config.get("_class_name") != "PriorTransformer" or settings != ("prd", "linear", 3):
        return None
    width = config.get("embedding_dim", 768)
    whose, pipeline = {
        768: ("Karlo's (CLIP ViT-L/14)", "UnCLIPPipeline.from_pretrained(KARLO"),
        1280: ("Kandinsky 2.2's (CLIP ViT-bigG/14)", "KandinskyV22PriorPipeline.from_pretrained(KANDINSKY_PRIOR"),
    }.get(width, ("another", ""))
    use = f"in Python: {pipeline}, prior=PriorTransformer.from_pretrained({str(folder)!r}))" if pipeline else ""
    return Family(f"ECLIPSE: a prior for {whose} decoder, width {width}", ("a decoder",), use)


def _lambda_eclipse(config: dict[str, Any], folder: Path) -> Family | None:
    if config.get("_class_name") != "PriorTransformer" or "embedding_control" not in str(sorted(config)):
        return None
    return Family("λ-ECLIPSE: a prior with a control embedding, which is not supported")


def _vectors(config: dict[str, Any], folder: Path) -> Family | None:
    is_own = config.get("_class_name") == "PriorTransformer" and config.get("num_embeddings") == 1
    if not is_own or not config.get("embedding_proj_dim"):
        return None
    dims = f"vectors of width {config['embedding_proj_dim']} → embeddings of width {config.get('embedding_dim', 768)}"
    return Family(f"a prior on vectors: {dims}", (), f"in Python: VectorPrior.from_pretrained({str(folder)!r})")


def _embeddings(config: dict[str, Any], folder: Path) -> Family | None:
    if config.get("_class_name") != "EmbeddingPriorNetwork":
        return None
    tokens, dim = config.get("num_tokens"), config.get("embedding_dim")
    target = f"grids of {tokens} tokens of width {dim}" if tokens else f"embeddings of width {dim}"
    arithmetic = f"arithmetic of DALLE2-pytorch from {config.get('arithmetic')} on"
    use = f"in Python: EmbeddingPrior.from_pretrained({str(folder)!r})"
    return Family(f"a prior of {target}, {arithmetic}", (), use)


_COMPONENTS: tuple[Callable[[dict[str, Any], Path], Family | None], ...] = (
    _lambda_eclipse,
    _eclipse,
    _vectors,
    _embeddings,
)
