"""`unclip serve`: the HTTP server."""

from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options
from unclip.errors import MissingDependencyError

EXAMPLES = options.examples(
    "unclip serve",
    "unclip serve --model mine=models/mine --model unclip-emoji --port 8080",
    "unclip serve --host 0.0.0.0 --api-keys-file keys.txt",
    "unclip serve --device cuda:0 --device cuda:1 --dtype bfloat16",
)
PACKAGES = ("fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client", "pydantic", "pydantic_settings")


def _option(*names: str, default: str, help: str, metavar: str = "N", **words: object) -> typer.models.OptionInfo:
    return typer.Option(*names, metavar=metavar, help=help, show_default=default, **words)  # type: ignore[arg-type]


def serve(
    *,
    model: Annotated[
        list[str] | None,
        _option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            default="unclip-emoji",
            help="A model's folder, a hub id or a built-in name, and its name in requests. May be repeated; the first "
            "one is the default.",
        ),
    ] = None,
    host: Annotated[str | None, _option("--host", metavar="ADDRESS", default="127.0.0.1", help="Address.")] = None,
    port: Annotated[int | None, _option("--port", "-p", default="8000", help="Port; 0 takes a free one.")] = None,
    api_keys_file: Annotated[
        Path | None, _option("--api-keys-file", metavar="FILE", default="none", help="File with a key on each line.")
    ] = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Accept a public address without keys: everybody may use the server.")
    ] = False,
    device: Annotated[
        list[str] | None,
        _option(
            "--device", metavar="NAME", default="auto", help="As for `unclip generate`. Repeated: one worker for each."
        ),
    ] = None,
    dtype: Annotated[
        options.Dtype | None,
        _option("--dtype", metavar="TYPE", default="float32", help="Type of the weights: float32, bfloat16, float16."),
    ] = None,
    max_batch: Annotated[
        int | None, _option("--max-batch", min=1, default="8", help="Pictures computed at once by a worker.")
    ] = None,
    max_queue: Annotated[
        int | None, _option("--max-queue", min=1, default="64", help="Pictures that may wait; more get status 429.")
    ] = None,
    deadline: Annotated[
        float | None, _option("--deadline", metavar="S", default="300", help="Seconds a request may take, except jobs.")
    ] = None,
    folder: Annotated[
        Path | None,
        _option("--folder", metavar="DIR", default="~/.cache/unclip/server", help="Folder of results and jobs."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option(
            "--cors-origin",
            metavar="URL",
            default="none",
            help="A site whose pages may call the server. May be repeated.",
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        _option("--public-url", metavar="URL", default="as requested", help="Start of the results' URLs."),
    ] = None,
) -> None:
    """Answer OpenAI's Images API over HTTP.

    Generations, edits, variations, embeddings and jobs are answered by one or more models. SIGTERM finishes the running
    requests first. Each option can also be set by an environment variable: UNCLIP_SERVER_PORT, UNCLIP_SERVER_API_KEYS
    and so on; the guide on serving lists them.
    """
    try:
        from unclip.server.app import serve as run
        from unclip.server.settings import make_settings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise MissingDependencyError(f"the server needs {error.name}: pip install 'unclip[server]'") from error
    given = {
        "models": model,
        "host": host,
        "port": port,
        "api_keys_file": api_keys_file,
        "allow_open": allow_open or None,
        "devices": device,
        "dtype": dtype,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "deadline_s": deadline,
        "folder": folder,
        "cors_origins": cors_origin,
        "public_url": public_url,
    }
    run(make_settings(**{name: value for name, value in given.items() if value not in (None, [])}))
