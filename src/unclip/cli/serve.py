"""`unclip serve`: the HTTP server."""

from pathlib import Path
from typing import Annotated

from unclip.cli import options
from unclip.cli.options import flag, option
from unclip.errors import MissingDependencyError

PACKAGES = ("fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client", "pydantic", "pydantic_settings")


def serve(
    *,
    model: Annotated[list[str] | None, option("[NAME=]MODEL", "--model", "-m", default="unclip-emoji")] = None,
    ray: Annotated[str | None, option("ADDRESS", default="none")] = None,
    replicas: Annotated[str | None, option("N|MIN:MAX", default="1")] = None,
    host: Annotated[str | None, option("ADDRESS", default="127.0.0.1")] = None,
    port: Annotated[int | None, option("N", "--port", "-p", default="8000")] = None,
    api_keys_file: Annotated[Path | None, option("FILE", default="none")] = None,
    allow_open: Annotated[bool, flag("--allow-open")] = False,
    device: Annotated[list[str] | None, option("NAME", default="auto")] = None,
    dtype: Annotated[options.Dtype | None, option("TYPE", default="auto")] = None,
    max_batch: Annotated[int | None, option("N", default="8", min=1)] = None,
    max_queue: Annotated[int | None, option("N", default="64", min=1)] = None,
    deadline: Annotated[float | None, option("S", default="300")] = None,
    quota: Annotated[int | None, option("N", default="none", min=1)] = None,
    folder: Annotated[Path | None, option("DIR", default="~/.cache/unclip/server")] = None,
    cors_origin: Annotated[list[str] | None, option("URL", default="none")] = None,
    public_url: Annotated[str | None, option("URL", default="as requested")] = None,
) -> None:
    """Answer OpenAI's Images API over HTTP.

    Generations, edits, variations, embeddings and jobs are answered by one or more models. SIGTERM finishes the running
    requests first. Each option can also be set by an environment variable: UNCLIP_SERVER_PORT, UNCLIP_SERVER_API_KEYS
    and so on; the guide on serving lists them.

    Args:
        model: A model's folder, a hub id or a built-in name, and its name in requests. May be repeated; the first one
            is the default.
        ray: Compute on a Ray cluster: its address, auto for that of this machine, or local to start one here.
        replicas: Copies of the models on the cluster; MIN:MAX for autoscaling.
        host: Address.
        port: Port; 0 takes a free one.
        api_keys_file: File with a key on each line.
        allow_open: Accept a public address without keys: everybody may use the server.
        device: As for `unclip generate`. Repeated: one worker for each.
        dtype: As for `unclip generate`.
        max_batch: Pictures computed at once by a worker.
        max_queue: Pictures that may wait; more get status 429.
        deadline: Seconds a request may take, except jobs.
        quota: Pictures of one key in a day.
        folder: Folder of results and jobs.
        cors_origin: A site whose pages may call the server. May be repeated.
        public_url: Start of the results' URLs.

    Examples:
        unclip serve
        unclip serve --model mine=models/mine --model unclip-emoji --port 8080
        unclip serve --host 0.0.0.0 --api-keys-file keys.txt
        unclip serve --ray auto --replicas 1:4
        unclip serve --device cuda:0 --device cuda:1 --dtype bfloat16
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
        "ray": ray,
        "replicas": replicas,
        "host": host,
        "port": port,
        "api_keys_file": api_keys_file,
        "allow_open": allow_open or None,
        "devices": device,
        "dtype": dtype,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "deadline_s": deadline,
        "quota": quota,
        "folder": folder,
        "cors_origins": cors_origin,
        "public_url": public_url,
    }
    run(make_settings(**{name: value for name, value in given.items() if value not in (None, [])}))
