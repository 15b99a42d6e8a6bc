"""Models that are computed by replicas on a Ray cluster.

The server stays one process, which owns the queue, the jobs and the results. Its engine has one worker for each
replica and sends the batches to a deployment of Ray Serve. Ray places, restarts and scales the replicas.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from unclip.errors import Cancelled, ConfigError
from unclip.pipelines.session import Compute
from unclip.server.engine import ReplicaError
from unclip.server.models import Model, Models, Row, Work
from unclip.server.settings import ServerSettings

log = logging.getLogger("unclip.server")
DEPLOYMENT = "model"
MAX_TRIES = 3
"""How often a batch is started when replicas are lost."""
POLL_S = 1.0


class Replica:
    """The models in a process of the cluster. It computes one batch at a time."""

    def __init__(self, folders: Mapping[str, str], compute: Compute, max_bytes: float | None) -> None:
        warnings.simplefilter("ignore", UserWarning)  # warnings about captions would show prompts in the logs
        self._models = Models(folders, compute, max_bytes)
        self._models.get(next(iter(folders))).load()
        self._lock = threading.Lock()

    async def compute(
        self, asked: Mapping[str, Any], rows: Sequence[Row]
    ) -> AsyncIterator[tuple[tuple[int, int, dict[str, Any]] | None, Any]]:
        """Compute a batch: (step, None) for each step, and (None, result) at the end. A cancelled one stops."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stop = threading.Event()

        def on_step(pipe: Any, index: int, t: int, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
            seen = {name: state[name] for name in ("stage", "num_steps", "rows") if name in state}
            seen["x0"] = state["x0"].float().cpu() if state["stage"] == "decoder" else torch.empty(0)
            loop.call_soon_threadsafe(steps.put_nowait, (index, int(t), seen))
            return {"stop": True} if stop.is_set() else None

        def run() -> Any:
            with self._lock:  # a cancelled batch ends its step first
                made = self._models.get(asked["model"]).run(Work(**asked), rows, on_step)
                self._models.make_room()
                return made

        task = loop.run_in_executor(None, run)
        task.add_done_callback(lambda done: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield step, None
            yield None, task.result()
        finally:
            stop.set()


class RemoteModel(Model):
    """A model that replicas compute. The other methods need no weights.

    Args:
        replicas: of the models.
    """

    def __init__(self, replicas: "Replicas", name: str, folder: str, compute: Compute) -> None:
        super().__init__(name, folder, compute)
        self._replicas = replicas

    def load(self) -> None:
        """Wait for a replica. Raises: ReplicaError."""
        self._replicas.wait()

    def run(self, work: Work, rows: Sequence[Row], on_step: Callable[..., Any]) -> Any:
        """Raises: ReplicaError, and as the model of a replica."""
        fields = ("model", "kind", "settings", "sampler", "shape", "function")
        return asyncio.run(self._replicas.compute({name: getattr(work, name) for name in fields}, rows, on_step))


class Replicas:
    """The deployment of a server's models on Ray Serve.

    Args:
        settings: of the server.
        folders: the models' folders by their names, which must be the same on every machine.
        compute: device and precision of a replica.

    Attributes:
        computes: device and precision of each replica.
        num_running: how many replicas run now.

    Raises: ConfigError for a cluster that cannot be reached.
    """

    def __init__(self, settings: ServerSettings, folders: Mapping[str, str], compute: Compute) -> None:
        self._low, high = settings.num_replicas
        self._stall_s = settings.ray_stall_s
        self.num_running = 0
        self._is_local = settings.ray == "local"
        options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
        if self._is_local:  # enough logical CPUs, since Ray waits for missing ones without an end
            options |= {"num_cpus": max(os.cpu_count() or 1, math.ceil(high * settings.replica_cpus))}
            options["include_dashboard"] = False
        else:
            options["address"] = settings.ray
        handler = signal.getsignal(signal.SIGTERM)
        try:
            host, _, port = str(settings.ray).rpartition(":")
            if host:  # Ray itself tries for more than a minute
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(**options)
        except Exception as error:
            raise ConfigError(f"Ray cannot be started or reached at {settings.ray!r}: {error}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray replaced it
        gpus = settings.replica_gpus
        if gpus is None:
            gpus = float(compute.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0)
        if compute.dtype == "auto":  # one type for all replicas, so that they make the same picture
            compute = replace(compute, dtype="float16" if gpus else compute.weights_type)
        self.computes = [compute] * high
        here = {name: str(Path(each).absolute()) if Path(each).is_dir() else each for name, each in folders.items()}
        max_bytes = None if settings.memory_mb is None else settings.memory_mb * 1e6
        # A server that was killed leaves its replicas behind; the same name takes them over.
        self._name = f"unclip-{socket.gethostname()}-{settings.port or os.getpid()}"
        scale: dict[str, Any] = {"num_replicas": high}
        if self._low < high:
            limits = {"min_replicas": self._low, "max_replicas": high, "target_ongoing_requests": 1}
            scale = {"autoscaling_config": limits}
        deployment = serve.deployment(
            name=DEPLOYMENT,
            max_ongoing_requests=1,
            ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": gpus},
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=0.1,
            **scale,
        )(Replica)
        serve.start(proxy_location="Disabled")
        messages = logging.getLogger("ray.serve")
        messages.handlers.clear()  # those of the server's log remain
        messages.setLevel(logging.WARNING)
        application = deployment.bind(here, compute, max_bytes)

        def deploy() -> None:  # it returns when all replicas run, or when they cannot
            with contextlib.suppress(Exception):  # which `_watch` reports
                serve.run(application, name=self._name, route_prefix=None)

        threading.Thread(target=deploy, name="unclip-deploy", daemon=True).start()
        self._handle = self._deployed().options(stream=True)
        self._problem, self._heard, self._closed = "", 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="unclip-replicas", daemon=True)
        self._watcher.start()

    def _deployed(self) -> DeploymentHandle:
        """The handle, as soon as the deployment exists."""
        end = time.monotonic() + self._stall_s
        while True:
            try:
                return serve.get_app_handle(self._name)
            except RayServeException as error:
                if time.monotonic() > end:
                    raise ConfigError(f"Ray Serve did not answer for {self._stall_s:g} s: {error}") from error
                time.sleep(0.1)

    def models(self, folders: Mapping[str, str], compute: Compute, max_bytes: float | None) -> Models:
        """The models of a worker of the engine."""
        return Models(folders, compute, max_bytes, partial(RemoteModel, self))

    def _watch(self) -> None:
        """Follow how many replicas run, and report missing ones."""
        missing_since, reported = time.monotonic(), ""
        while not self._closed.wait(POLL_S):
            try:
                app = serve.status().applications[self._name]
                deployment = app.deployments[DEPLOYMENT]
            except Exception as error:
                log.warning("the state of the replicas is unknown: %s", error)
                continue
            self.num_running = sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
            now = time.monotonic()
            if self.num_running >= self._low:
                missing_since, self._problem = now, ""
            elif now - missing_since > self._stall_s or app.status == "DEPLOY_FAILED":
                reason = (deployment.message or app.message).strip() or "Ray gives no reason"
                self._problem = f"{self.num_running} of {self._low} replicas run: {reason}"
            if self._problem != reported:
                log.warning(self._problem or "all replicas run")
                reported = self._problem

    def wait(self) -> None:
        """Wait for the first replica. Raises: ReplicaError when none runs within the time."""
        while not self.num_running:
            if self._problem:
                raise ReplicaError(self._problem)
            if self._closed.wait(0.1):
                return

    async def compute(self, asked: Mapping[str, Any], rows: Sequence[Row], on_step: Callable[..., Any]) -> Any:
        """The result of a batch. One whose replica is lost is computed again; its steps are reported once.

        Raises: ReplicaError when replicas are lost again and again, or report nothing for too long; Cancelled.
        """
        num_reported = 0
        for _ in range(MAX_TRIES):
            answer, num_steps = self._handle.compute.remote(asked, rows), 0
            try:
                while True:
                    step, result = await self._item(answer, num_steps)
                    if step is None:
                        return result
                    num_steps += 1
                    if num_steps <= num_reported:
                        continue
                    num_reported = num_steps
                    if on_step(None, *step):
                        raise Cancelled("the batch was cancelled")
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(cause, RayActorError):
                    raise cause from None
                log.warning("a replica was lost", extra={"facts": {"step": num_steps}})
            finally:
                answer.cancel()
        raise ReplicaError(f"{MAX_TRIES} replicas were lost while they computed this request")

    async def _item(self, answer: Any, num_steps: int) -> Any:
        """The next item of an answer.

        Raises: ReplicaError after the time for it. A batch that has not started may wait for others, while they
            report steps.
        """
        begun, item = time.monotonic(), asyncio.ensure_future(anext(answer))
        while not item.done():
            await asyncio.wait({item}, timeout=POLL_S)
            since = begun if num_steps else max(begun, self._heard)
            if not item.done() and time.monotonic() - since > self._stall_s:
                item.cancel()
                raise ReplicaError(self._problem or f"no replica answered for {self._stall_s:g} s")
        self._heard = time.monotonic()
        return item.result()

    def close(self) -> None:
        """Stop the replicas, and Ray if it was started here."""
        self._closed.set()
        self._watcher.join()
        if not self._is_local:
            serve.delete(self._name)
        ray.shutdown()
