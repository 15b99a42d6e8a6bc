"""`unclip rerun`: make a picture again from the texts in its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.inputs import check_exists, looks_like_path
from unclip.cli.provenance import ELSEWHERE, RecordedCommand, Replay, replaying
from unclip.errors import InputError
from unclip.pipelines.session import MADE_WITH, pick_device, read_texts
from unclip.settings import SAMPLERS, SETTINGS

EXAMPLES = options.examples(
    "unclip rerun a-red-apple-42.png",
    "unclip rerun a-red-apple-42.png --decoder-steps 50 --out better",
    "unclip rerun cat-variation-7.png --inputs photos --model models/mine",
)
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OPTIONS = {
    **{row.name: row.option for row in SETTINGS.values()},
    "sampler": "--sampler",
    "height": "--height",
    "width": "--width",
    "super_res_tile_px": "--tile",
    "dtype": "--dtype",
}
"""The options by the names of the recorded settings."""
SEVERAL = ("-n", "--num-images", "--frames", "--sweep", "--dims", "--grid", "--film")
"""With one of these options all pictures of the command are made."""
OWN_DEFAULTS = ("out", "overwrite", "as_json", "cpu_offload", "quiet")
"""Options that may come from the configuration file and the environment; others would change the picture."""


def rerun(
    ctx: typer.Context,
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG file that unclip made.")],
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the pictures and latents that it was made from.",
            show_default="the current folder, then that of PICTURE",
        ),
    ] = None,
) -> None:
    """Make a picture again from the metadata in its file.

    All other options are passed on to the command that made the picture, and override the recorded ones. A warning
    names what has changed: the version of unclip or PyTorch, the device, the model's weights. If nothing has, the new
    file is identical, byte for byte. With -n, --frames, --sweep or --dims all pictures of the command are made.
    """
    check_exists(picture)
    texts = read_texts(picture)
    made = _checked(texts, picture)
    root = ctx.find_root()
    command: Any = root.command
    path = made["command"].split(" ")
    for name in path:
        command = getattr(command, "commands", {}).get(name)
    if not isinstance(command, RecordedCommand):
        raise InputError(f"{picture} was made by {made['command']!r:.80}, which is not a command that makes pictures")
    folders = [Path(), picture.parent] if inputs is None else [inputs]
    arguments, positional = _arguments(command, texts, made, folders, ctx.args)
    place, size = (0, 1) if "--batch-size" in ctx.args else made["batch"]
    only = not any(argument.partition("=")[0] in SEVERAL for argument in ctx.args)
    own = _own_defaults(root.default_map or {}, path)
    for param in command.params:
        if param.name not in OWN_DEFAULTS:
            param.envvar = None
    with (
        replaying(Replay(made, made["index"], place, size, only)),
        command.make_context(
            " ".join(path), [*arguments, *ctx.args, "--", *positional], root, default_map=own
        ) as inner,
    ):
        command.invoke(inner)  # type: ignore[arg-type]


def _checked(texts: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The recorded command, options and environment. Raises: InputError when the file does not record enough."""
    if "grid" in texts:
        raise InputError(f"{picture} is a sheet of several pictures: name one of the pictures")
    made = texts.get(MADE_WITH) or _guessed(texts)
    if not isinstance(made, dict) or not str(texts.get("seed", "")).isdecimal():
        raise InputError(f"{picture} does not say how it was made: it has no texts of unclip, or not enough of them")
    batch, index = made.get("batch"), made.get("index")
    sound = (
        isinstance(made.get("command"), str)
        and isinstance(made.get("options"), dict)
        and not ELSEWHERE & set(made["options"])
        and type(index) is int
        and isinstance(batch, list)
        and [type(number) for number in batch] == [int, int]
        and 0 <= batch[0] < batch[1] <= options.MAX_BATCH
        and isinstance(texts.get("settings", {}), dict)
    )
    if not sound:
        raise InputError(f"{picture} does not say how it was made: its text {MADE_WITH!r} is damaged")
    version = texts.get("Software", "").removeprefix("unclip ")
    return {"unclip": version or None, **made}


def _guessed(texts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same for a picture from before version 0.2, which records no command; None where it cannot be known."""
    settings = texts.get("settings", {})
    words = {name: texts[name] for name in ("prompt", "negative", "mask") if name in texts}
    edits = {"strength": "strength", "num_resamples": "resamples", "jump_length": "jump"}
    if "image" not in texts:
        known = "prompt" in texts and "blend" not in texts
        command, given = "generate" if known else None, {name: words[name] for name in words if name == "negative"}
    elif "from" in texts:
        command = "edit" if "strength" in texts else None
        given = {"source": texts["from"], "target": texts.get("to", ""), "strength": texts.get("strength")}
        given |= {"text_space": True} if settings.get("text_space") else {}
    elif "strength" in settings:
        command = "inpaint" if "num_resamples" in settings else "redraw"
        given = {**words, **{edits[name]: settings[name] for name in edits if name in settings}}
        given |= {"embedding_from": settings["embedding_from"]} if "embedding_from" in settings else {}
    else:
        command = None if "pca" in texts or "row" in texts else "vary"
        given = words | ({"keep_structure": True, "eta": texts["eta"]} if "eta" in texts else {})
    return {"command": command, "options": given, "index": 0, "batch": [0, 1]} if command else None


def _arguments(
    command: Any, texts: Mapping[str, Any], made: Mapping[str, Any], folders: list[Path], given: list[str]
) -> tuple[list[str], list[str]]:
    """The options and the positional arguments of the command."""
    recorded = dict(made["options"])
    options_of = {param.name: param for param in command.params}
    positional = []
    found = [f"--seed={texts['seed']}"]
    if "--model" not in given and "-m" not in given:
        found.append(f"--model={_model(texts.get('model', ''), folders)}")
    settings = texts.get("settings", {})
    for name, option in OPTIONS.items():
        value = settings.get(name)
        if value is None or not any(option in param.opts for param in command.params):
            continue
        if name in ("sampler", "height", "width") and recorded.get("keep_structure"):
            continue
        if name == "sampler" and value not in SAMPLERS:
            continue  # the stages have different samplers
        found.append(f"{option}={','.join(map(str, value)) if isinstance(value, list) else value}")
    if "--device" not in given:
        found += _device(made.get("device", ""))
    if "images" in options_of or "image" in options_of:
        positional.append(_input(texts.get("image", ""), folders))
    if "prompts" in options_of:
        positional.append(texts.get("prompt", ""))
    for name, value in recorded.items():
        param = options_of.get(name)
        if param is None:
            raise InputError(f"the picture was made with the option {name}, which this version does not have")
        if param.param_type_name == "argument":
            positional += [_part(each, folders) for each in (value if isinstance(value, list) else [value])]
        elif isinstance(value, bool):
            found += [_long(param)] * value
        else:
            found.append(f"{_long(param)}={_input(value, folders) if name in ('mask', 'pca') else value}")
    return found, positional


def _model(name: str, folders: list[Path]) -> str:
    """A hub id, a built-in name, or the folder of this name."""
    for folder in folders:
        if (folder / name / "model_index.json").is_file():
            return str(folder / name)
    return name


def _device(recorded: str) -> list[str]:
    """The option for the device that a picture was made on, if this machine has one of its kind."""
    kind = recorded.partition(" ")[0]
    if not kind:
        return []
    try:
        pick_device(kind)
    except InputError:
        return []  # the warning of what differs names both
    return [f"--device={kind}"]


def _long(param: Any) -> str:
    return next(name for name in param.opts if name.startswith("--"))


def _input(name: str, folders: list[Path]) -> str:
    """The path of the file of this name. Raises: InputError when it is in none of the folders."""
    for folder in folders:
        if name and (folder / Path(name).name).is_file():
            return str(folder / Path(name).name)
    looked = " or ".join(repr(str(folder)) for folder in folders)
    raise InputError(f"the picture was made of the file {name!r:.200}, which is not in {looked}: give --inputs DIR")


def _part(text: str, folders: list[Path]) -> str:
    """A file's path or a caption, with its weight if it has one."""
    head, colon, weight = text.rpartition(":")
    for name, rest in ((text, ""), (head, colon + weight)):
        for folder in folders:
            if 0 < len(name) < 255 and (folder / name).is_file():
                return f"{folder / name}{rest}"
    if looks_like_path(text) or (head and looks_like_path(head)):
        _input(text, folders)
    return text


def _own_defaults(default_map: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        default_map = default_map.get(name, {})
    return {name: value for name, value in default_map.items() if name in OWN_DEFAULTS}
