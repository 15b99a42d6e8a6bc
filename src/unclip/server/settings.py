"""The server's settings, from arguments and from environment variables (`UNCLIP_SERVER_` and the field's name)."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from unclip.errors import ConfigError

MIN_KEY_CHARACTERS = 8


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/unclip/server`; the default of the variable is `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "server"


class ServerSettings(BaseSettings):
    """Settings of `unclip serve`; lists are separated by commas in environment variables.

    Attributes:
        models: models by their names in requests, "name=folder" each; without a name the folder's own. The first one
            also answers to OpenAI's names, such as "dall-e-2".
        devices: one worker for each.
        ray: where replicas compute: "local" (Ray is started here), "auto" (the cluster that this machine is part of) or
            that cluster's address; None: in this process.
        replicas: their number, or "MIN:MAX" for autoscaling.
        replica_cpus, replica_gpus: what Ray reserves for a replica; the default of GPUs is 1 where the cluster has any.
        ray_stall_s: how long a replica may take to start, or to report a step.
        host, port: the address.
        allow_open: whether a public address without keys is accepted.
        api_keys: bearer keys; empty: every request is accepted.
        api_keys_file: a file with one more key on each line.
        cors_origins: origins whose pages may call the server.
        public_url: the start of the URLs of results; None: as in the request.
        max_batch: pictures computed at once.
        max_queue: pictures that may wait or be computed.
        deadline_s: how long a request may take, except jobs.
        max_upload_mb: size limit of a request, in 10^6 bytes.
        rate_per_minute: requests of one key (or one address) in a minute; None: no limit.
        quota: pictures of one key in a day (UTC), counted from the server's start; None: no limit. Without keys it is
            the quota of everybody together.
        folder: where results and jobs are kept.
        keep_s: how long results and jobs are kept.
        url_s: how long a URL of a result is valid.
        quota_mb: size limit of the kept results, in 10^6 bytes; the oldest are removed first.
        memory_mb: size limit of the loaded models, in 10^6 bytes; those used least recently are unloaded. None: no
            limit.
        drain_s: how long running requests may take after SIGTERM.
        log_prompts: whether logs hold prompts.
    """

    model_config = SettingsConfigDict(env_prefix="UNCLIP_SERVER_", extra="ignore")

    models: Annotated[list[str], NoDecode] = ["unclip-emoji"]
    devices: Annotated[list[str], NoDecode] = ["auto"]
    dtype: str = "auto"
    ray: str | None = None
    replicas: str = Field("1", pattern=r"^[1-9]\d{0,3}(:[1-9]\d{0,3})?$")
    replica_cpus: float = Field(1, ge=0)
    replica_gpus: float | None = Field(None, ge=0)
    ray_stall_s: float = Field(120, gt=0)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    allow_open: bool = False
    api_keys: Annotated[list[str], NoDecode] = []
    api_keys_file: Path | None = None
    cors_origins: Annotated[list[str], NoDecode] = []
    public_url: str | None = None
    max_batch: int = Field(8, ge=1, le=1000)
    max_queue: int = Field(64, ge=1, le=100_000)
    deadline_s: float = Field(300, gt=0)
    max_upload_mb: float = Field(25, gt=0)
    rate_per_minute: int | None = Field(None, ge=1)
    quota: int | None = Field(None, ge=1)
    folder: Path = Field(default_factory=default_folder)
    keep_s: float = Field(24 * 3600, gt=0)
    url_s: float = Field(3600, gt=0)
    quota_mb: float = Field(1000, gt=0)
    memory_mb: float | None = Field(None, gt=0)
    drain_s: float = Field(60, ge=0)
    log_prompts: bool = False

    @field_validator("models", "devices", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @property
    def num_replicas(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        low, _, high = self.replicas.partition(":")
        return int(low), int(high or low)

    @property
    def keys(self) -> list[str]:
        """All bearer keys, those of the file too. Raises: ConfigError for a short key or a file without keys."""
        found = list(self.api_keys)
        if self.api_keys_file is not None:
            try:
                lines = self.api_keys_file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise ConfigError(f"the file of keys {self.api_keys_file} cannot be read: {error}") from error
            more = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not more:
                raise ConfigError(f"the file of keys {self.api_keys_file} has no key: write one on each line")
            found += more
        if short := [key for key in found if len(key) < MIN_KEY_CHARACTERS]:
            raise ConfigError(
                f"a key has {len(short[0])} characters; it must have {MIN_KEY_CHARACTERS} or more, such as the output "
                "of: openssl rand -hex 24"
            )
        return found

    def check(self) -> None:
        """Raises: ConfigError for a public address without keys, and for a range of replicas in the wrong order."""
        low, high = self.num_replicas
        if low > high:
            raise ConfigError(f"replicas is {self.replicas}: the first number must not be above the second")
        if not self.keys and not self.allow_open and not is_local(self.host):
            raise ConfigError(
                f"host {self.host} accepts requests of other machines, but keys are missing: give keys "
                "(UNCLIP_SERVER_API_KEYS or --api-keys-file), or --allow-open if everybody may use the server"
            )


def make_settings(**given: object) -> ServerSettings:
    """Settings from arguments, then from environment variables. Raises: ConfigError for a wrong value."""
    try:
        settings = ServerSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"the setting {name} is {first['input']!r:.80}: {first['msg']}") from error
    settings.check()
    return settings


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
