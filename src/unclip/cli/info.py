"""`unclip info`: the contents of a model's folder, from configurations and headers; no weights are loaded."""

import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.checkpoints.families import Family, recognised
from unclip.checkpoints.files import file_size, read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.recommended import EXACT, Preset, read_presets
from unclip.checkpoints.weights import DEFAULT_STEM, TRANSFORMERS_STEM, open_weights
from unclip.cli import options
from unclip.cli.messages import error, printable
from unclip.cli.options import argument, flag
from unclip.errors import CheckpointError, MissingFileError, UnclipError
from unclip.pipelines.session import model_name, silence_later

CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
SIZES = (
    "sample_size", "image_size", "patch_size", "block_out_channels", "layers_per_block", "cross_attention_dim",
    "num_layers", "num_hidden_layers", "num_attention_heads", "embedding_dim", "hidden_size", "projection_dim",
    "max_position_embeddings", "vocab_size", "clip_embeddings_dim",
)  # fmt: skip
"""The settings that say how large a network is, in the order in which they are shown."""
PLAIN_WIDTH = 240
"""Columns of a table that goes into a file or a pipe, where nothing should be wrapped."""


@dataclass(frozen=True)
class Component:
    """One part of a model as its files describe it.

    Attributes:
        parameters: number of weights; 0 for a part that has none.
        size_bytes: size of the weights' files.
        dtype: types of the weights.
        sizes: settings that say how large the part is.
        settings: settings of a scheduler.
        problem: the reason why it cannot be read.
    """

    class_name: str
    parameters: int = 0
    size_bytes: int = 0
    dtype: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def info(
    *,
    model: Annotated[str, argument("MODEL")] = "unclip-emoji",
    as_json: Annotated[bool, flag("--json")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Show the components of a model.

    The output lists components, sizes, schedulers and the licence. Only headers and configurations are read, no
    weights. MODEL may also be the folder of one component, or the model/ folder of a training run. Of a file of
    another project (.pth, .ckpt, .safetensors) or a folder of such files, the output names the family, what is
    missing, and the command that converts it. Nothing is unpickled.

    Args:
        model: A model's folder, a hub id (owner/name), a built-in name, or a file.
        as_json: Print one JSON object instead of tables.

    Examples:
        unclip info unclip-emoji
        unclip info models/mine --json
    """
    silence_later(downloads=quiet)
    if Path(model).is_file():
        folder, family, components = Path(model), recognised(Path(model)), {}
        if family is None:
            raise CheckpointError(f"{model} is not a file of a known family; name a model's folder, or see the guides")
    else:
        folder = resolve(model)
        family, components = recognised(folder), {}
        if family is None or has_components(folder):
            components = read_components(folder)
    problems = [f"component {name!r}: {part.problem}" for name, part in components.items() if part.problem]
    presets: dict[str, Preset] = {EXACT: {}}
    try:
        presets = read_presets(folder) if folder.is_dir() else presets
    except UnclipError as problem:
        problems.append(str(problem))
    papers = {"licence": licence(folder), "model_card": first_file(folder, ("README*", "MODEL_CARD*", "model_card*"))}
    if as_json:
        parts = {name: {k: v for k, v in asdict(part).items() if v} for name, part in components.items()}
        about = {"model": model_name(model), "folder": str(folder), **papers}
        about["family"] = None if family is None else asdict(family)
        settings = {"generation_defaults": presets.pop(EXACT), "presets": presets}
        print(json.dumps({**about, **settings, "components": parts}), flush=True)
    else:
        show(f"{model_name(model)} ({folder})", family, components, presets, papers)
    for problem in problems:
        error(problem)
    if problems:
        raise typer.Exit(1)


def has_components(folder: Path) -> bool:
    """Whether a folder has a pipeline, or components."""
    places = (folder, *(entry for entry in folder.iterdir() if entry.is_dir()))
    return (folder / "model_index.json").is_file() or any(_config_name(place) for place in places)


def read_components(folder: Path) -> dict[str, Component]:
    """The components in a pipeline's folder, in a folder of components, or in one component's folder.

    Raises: CheckpointError for another folder.
    """
    if (folder / "model_index.json").is_file():
        index = read_json(safe_join(folder, "model_index.json"))
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
        named = {name: entry[1] for name, entry in entries.items() if isinstance(entry[1], str)}
        return {name: read_component(folder, name, class_name) for name, class_name in named.items()}
    if _config_name(folder):
        return {folder.resolve().name: read_component(folder.resolve().parent, folder.resolve().name, "")}
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _config_name(entry))
    if not found:
        raise CheckpointError(f"{folder} has no model_index.json and no component with a config.json; is it a model?")
    return {name: read_component(folder, name, "") for name in found}


def read_component(folder: Path, name: str, class_name: str) -> Component:
    """One component; an error in it becomes its `problem`."""
    try:
        place = safe_join(folder, name)
        if not place.is_dir():
            raise MissingFileError(f"the folder {place} does not exist")
        config_name = _config_name(place)
        config = read_json(safe_join(place, config_name)) if config_name else {}
        class_name = class_name or _own_class(config)
        if config_name == "scheduler_config.json":
            return Component(class_name, settings={key: config[key] for key in config if not key.startswith("_")})
        sizes = {key: config[key] for key in SIZES if config.get(key) is not None}
        if config_name != "config.json":
            return Component(class_name, sizes=sizes)
        is_text_encoder = class_name.startswith(("CLIP", "MultilingualCLIP"))
        stem = TRANSFORMERS_STEM if is_text_encoder else DEFAULT_STEM
        weights = open_weights(place, stem=stem, variant=_variant(place, stem))
        kinds: Counter[str] = Counter()
        for tensor in weights.values():
            kinds[tensor.dtype] += tensor.nbytes
        return Component(
            class_name,
            parameters=sum(math.prod(tensor.shape) for tensor in weights.values()),
            size_bytes=sum(file_size(file) for file in weights.files),
            dtype=", ".join(DTYPES.get(kind, kind) for kind, _ in kinds.most_common()),
            sizes=sizes,
        )
    except UnclipError as problem:
        return Component(class_name, problem=str(problem))


def licence(folder: Path) -> str | None:
    """The licence file, or the licence in the head of the model card; None for a single file."""
    file = first_file(folder, ("LICENSE*", "LICENCE*", "license*"))
    card = first_file(folder, ("README*",))
    if file is None and card is not None:
        head = (folder / card).read_bytes()[:10_000].decode("utf-8", "replace")
        found = re.search(r"\A---\n(?:.*\n)*?license:[ \t]*(\S+)", head)
        return found[1] if found else None
    return file


def first_file(folder: Path, patterns: tuple[str, ...]) -> str | None:
    """The name of the first file in the folder that fits one of the patterns."""
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()), None)


def show(
    title: str,
    family: Family | None,
    components: dict[str, Component],
    presets: dict[str, Preset],
    papers: dict[str, str | None],
) -> None:
    """Print everything as tables; plain text when stdout is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    on_terminal = sys.stdout.isatty()
    page = sys.stdout if on_terminal else io.StringIO()
    width = None if on_terminal else PLAIN_WIDTH
    console = Console(file=page, width=width, markup=False, emoji=False, highlight=False)

    def print_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
        made = Table(box=box.SIMPLE_HEAD if on_terminal else None, pad_edge=False)
        for column in columns:
            justify = "right" if column in ("parameters", "on disk") else "left"
            made.add_column(column, justify=justify, no_wrap=column not in ("sizes", "settings"), overflow="fold")
        for row in rows:
            made.add_row(*map(printable, row))
        if rows:
            console.print(made, "")

    parts = []
    for name, part in components.items():
        cells = [f"{part.parameters:,}", megabytes(part.size_bytes)] if part.parameters else ["", ""]
        sizes = "cannot be read" if part.problem else listed(part.sizes)
        if not part.settings:
            parts.append([name, part.class_name, *cells, part.dtype, sizes])
    total = [part for part in components.values() if part.parameters]
    if len(total) > 1:
        size_bytes = sum(part.size_bytes for part in total)
        parts.append(["total", "", f"{sum(part.parameters for part in total):,}", megabytes(size_bytes)])
    console.print(printable(title))
    if family is not None:
        console.print(printable(f"family: {family.name}"))
        for label, text in (("missing", ", ".join(family.missing)), ("next", family.next)):
            if text:
                console.print(printable(f"{label}: {text}"), soft_wrap=True)
    console.print("")
    print_table(("component", "class", "parameters", "on disk", "dtype", "sizes"), parts)
    schedulers = [[name, part.class_name, listed(part.settings)] for name, part in components.items() if part.settings]
    print_table(("scheduler", "class", "settings"), schedulers)
    defaults = presets[EXACT]
    if components:
        console.print(printable(f"recommended: {listed(defaults) or 'nothing in particular'}"))
    for name, preset in presets.items():
        if name != EXACT:
            own = {key: value for key, value in preset.items() if defaults.get(key) != value}
            console.print(printable(f"preset {name}: {listed(own)}"))
    for paper, file in papers.items():
        console.print(printable(f"{paper.replace('_', ' ')}: {file or 'none here'}"))
    if isinstance(page, io.StringIO):
        print("\n".join(line.rstrip() for line in page.getvalue().splitlines()), flush=True)


def listed(values: dict[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())


def megabytes(size_bytes: int) -> str:
    """A size in MB or GB."""
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:,.2f} GB"


def _config_name(folder: Path) -> str | None:
    return next((name for name in CONFIGS if (folder / name).is_file()), None)


def _own_class(config: dict[str, Any]) -> str:
    """The class that a component's own configuration names."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    names = (first, *(config.get(key) for key in ("_class_name", "image_processor_type", "tokenizer_class")))
    return next((str(name) for name in names if name), "")


def _variant(folder: Path, stem: str) -> str | None:
    """None if there are plain weights; else the existing variant."""
    pattern = re.compile(re.escape(stem) + r"(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")
    found = filter(None, (pattern.fullmatch(path.name) for path in folder.iterdir()))
    return min((match[1] or match[2] or "" for match in found), default="") or None
