"""`unclip rerun`: make a picture again from the texts in its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.inputs import check_exists, looks_like_path
from unclip.cli.options import argument, option
from unclip.cli.provenance import ELSEWHERE, RecordedCommand, Replay, replaying
from unclip.errors import InputError
from unclip.pipelines.session import MADE_WITH, pick_device, read_texts
from unclip.settings import SAMPLERS, SETTINGS

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
OPTIONS = {row.name: row.option for row in SETTINGS.values()} | {
    **{name: f"--{name}" for name in ("sampler", "height", "width", "dtype")},
    "super_res_tile_px": "--tile",
}
"""The options by the names of the recorded settings."""
SEVERAL = ("-n", "--num-images", "--frames", "--sweep", "--dims", "--grid", "--film")
"""With one of these options all pictures of the command are made."""
OWN_DEFAULTS = ("out", "overwrite", "as_json", "cpu_offload", "quiet")
"""Options that may come from the configuration file and the environment; others would change the picture."""


def rerun(
    ctx: typer.Context,
    picture: Annotated[Path, argument("PICTURE")],
    inputs: Annotated[Path | None, option("DIR", default="the current folder, then that of PICTURE")] = None,
) -> None:
    """Make a picture again from the metadata in its file.

    All other options are passed on to the command that made the picture, and override the recorded ones. A warning
    names what has changed: the version of unclip or PyTorch, the device, the model's weights. If nothing has, the new
    file is identical, byte for byte. With -n, --frames, --sweep or --dims all pictures of the command are made.

    Args:
        picture: A PNG file that unclip made.
        inputs: Folder of the pictures and latents that the picture was made from.

    Examples:
        unclip rerun a-red-apple-42.png
        unclip rerun a-red-apple-42.png --decoder-steps 50 --out better
        unclip rerun cat-variation-7.png --inputs photos --model models/mine
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
    place, size, prompts = (0, 1, []) if "--batch-size" in ctx.args else (*made["batch"], made.get("prompts", []))
    only = not any(argument.partition("=")[0] in SEVERAL for argument in ctx.args)
    own = root.default_map or {}
    for name in path:
        own = own.get(name, {})
    own = {name: value for name, value in own.items() if name in OWN_DEFAULTS}
    for param in command.params:
        if param.name not in OWN_DEFAULTS:
            param.envvar = None
    given = [*arguments, *ctx.args, "--", *positional]
    replay = Replay(made, made["index"], place, size, prompts, only)
    with replaying(replay), command.make_context(" ".join(path), given, root, default_map=own) as inner:
        command.invoke(inner)  # type: ignore[arg-type]


def _checked(texts: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The recorded command, options and environment. Raises: InputError when the file does not record enough."""
    if "grid" in texts:
        raise InputError(f"{picture} is a sheet of several pictures: name one of the pictures")
    made: Any = None
    try:
        made = texts.get(MADE_WITH) or _guessed(texts)
        (place, size), prompts = made["batch"], made.get("prompts", [])
        sound = (
            isinstance(made["command"], str)
            and not ELSEWHERE.intersection(dict(made["options"]))
            and all(type(number) is int for number in (made["index"], place, size, *prompts))
            and 0 <= place < size <= options.MAX_BATCH
            and (not prompts or (len(prompts) == size and set(prompts) <= set(range(size))))
            and isinstance(texts.get("settings", {}), dict)
            and texts["seed"].isdecimal()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{picture} does not record how it was made: the metadata of unclip is missing or damaged")
    return {"unclip": texts.get("Software", "").removeprefix("unclip "), **made}


def _guessed(texts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same for a picture from before version 0.2, which records no command; None if the command is unknown."""
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
    params = {param.name: param for param in command.params}
    names = {name for param in command.params for name in param.opts}
    found, positional = [f"--seed={texts['seed']}"], []
    if "--model" not in given and "-m" not in given:
        model = texts.get("model", "")
        homes = [str(folder / model) for folder in folders if (folder / model / "model_index.json").is_file()]
        found.append(f"--model={next(iter(homes), model)}")
    recorded = {"dtype": "float32", **texts.get("settings", {})}  # the only type before it was recorded
    if any(argument.partition("=")[0] == "--preset" for argument in given):
        recorded = {name: value for name, value in recorded.items() if name not in (*SETTINGS, "sampler")}
    for name, long in OPTIONS.items():
        value = recorded.get(name)
        own_size = name in ("sampler", "height", "width") and made["options"].get("keep_structure")
        several = name == "sampler" and value not in SAMPLERS  # the stages have different samplers
        if value is not None and long in names and not own_size and not several:
            found.append(f"{long}={','.join(map(str, value)) if isinstance(value, list) else value}")
    if "--device" not in given:
        found += _device(made.get("device", ""))
    if "images" in params or "image" in params:
        positional.append(_input(texts.get("image", ""), folders))
    if "prompts" in params:
        positional.append(texts.get("prompt", ""))
    for name, value in made["options"].items():
        param = params.get(name)
        if param is None:
            raise InputError(f"the picture was made with the option {name}, which this version does not have")
        long = next((each for each in param.opts if each.startswith("--")), "")
        if param.param_type_name == "argument":
            positional += [_part(each, folders) for each in (value if isinstance(value, list) else [value])]
        elif isinstance(value, bool):
            found += [long] * value
        else:
            found.append(f"{long}={_input(value, folders) if name in ('mask', 'pca', 'translator') else value}")
    return found, positional


def _device(recorded: str) -> list[str]:
    """The option for the device that a picture was made on, if this machine has a device of this kind."""
    kind = recorded.partition(" ")[0]
    try:
        return [f"--device={pick_device(kind)}"]
    except InputError:
        return []  # the warning of what differs names both


def _input(name: str, folders: list[Path]) -> str:
    """The path of the file of this name. Raises: InputError when it is in none of the folders."""
    for folder in folders:
        if name and (folder / Path(name).name).is_file():
            return str(folder / Path(name).name)
    looked = " or ".join(repr(str(folder)) for folder in folders)
    raise InputError(
        f"the picture was made from the file {name!r:.200}, which is not in {looked}: give its folder with --inputs"
    )


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
