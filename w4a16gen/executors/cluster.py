"""The connection to a Ray cluster. Nothing else of this package speaks to Ray."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from w4a16gen.errors import ClusterError, InvalidValueError, W4A16Error, missing_extra
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import is_alive, one_line
from w4a16gen.executors.place import WorkerLostError

AUTO = "auto"
"""The address of the cluster that this machine belongs to."""
_REACH_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
"""How long a node that has lost a worker may take to show that it is alive."""
_POLL_SECONDS = 0.5
_QUIET = {
    "RAY_gcs_rpc_server_connect_timeout_s": "5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""Variables of this process, not of the cluster: what Ray prints by itself, how long it waits for an answer, and that a
thread which is late does not connect again, to any cluster that it finds."""

Tell = Callable[[str], None]


@contextlib.contextmanager
def connect(address: str, environment: Mapping[str, Any] | None, tell: Tell) -> Iterator[Cluster]:
    """Connect to a Ray cluster; it goes on when the block ends.

    Args:
        address: `auto`, HOST:PORT from a machine of the cluster, or ray://HOST:PORT from any other.
        environment: Ray's `runtime_env`, which prepares the workers; None takes them as they are.
        tell: called with sentences about nodes.

    Raises:
        MissingToolError: if Ray is not installed.
        InvalidValueError: if Ray refuses the runtime_env.
        ClusterError: if the cluster cannot be reached, or is of other versions.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise missing_extra("ray", "ray") from None
    _check_reachable(address)
    # Ray prints on standard output when a node dies, and that stream belongs to the command's result.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        with _kept_signals():
            try:
                ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="CRITICAL")
            except (Exception, SystemExit) as error:  # noqa: BLE001 - Ray raises many kinds, and even exits
                ray.shutdown()  # it may refuse a runtime_env only when it is connected
                if environment is not None and _is_about_environment(error):
                    raise InvalidValueError(f"Ray refuses this runtime_env ({one_line(error, 300)})") from None
                raise ClusterError(_why_not(address, error)) from None
        cluster = Cluster(ray, tell)
        try:
            yield cluster
        finally:
            cluster.close()
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise unless something listens at the address: Ray itself would try for over a minute.

    Raises:
        ClusterError: if nothing does.
    """
    if not address:
        raise ClusterError(_no_address(address))
    given = os.environ.get("RAY_ADDRESS", "") if address == AUTO else address
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108
    if not given and current.is_file():
        given = current.read_text().strip()
    if not given:
        return
    scheme, host, port = "", None, None
    with contextlib.suppress(ValueError):
        parts = urlsplit(given if "://" in given else f"//{given}")
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    if not host or scheme not in {"", "ray"} or (port is None and not scheme):
        raise ClusterError(_no_address(given))
    try:
        socket.create_connection((host, port or 10001), timeout=_REACH_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(
            f"no Ray cluster answers at {given} ({reason}): check the address, or start one with `ray start --head`"
        ) from None


def _no_address(given: str) -> str:
    return f"{given!r} is no address of a Ray cluster: pass auto, HOST:PORT or ray://HOST:PORT"


def _is_about_environment(error: BaseException) -> bool:
    """Return whether Ray refuses a runtime_env: it cannot be reached with errors of these kinds."""
    return isinstance(error, (TypeError, ValueError)) or type(error).__name__ == "RuntimeEnvSetupError"


def _why_not(address: str, error: BaseException) -> str:
    text = one_line(error, 300)
    if address == AUTO and isinstance(error, ConnectionError):
        return "this machine belongs to no running Ray cluster: run `ray start`, or pass --ray HOST:PORT"
    is_reached = "Version mismatch" in text
    hint = (
        ""
        if is_reached or address.startswith("ray://")
        else ". From a machine outside the cluster, pass ray://HOST:10001"
    )
    return f"the Ray cluster at {address} cannot be used ({text}){hint}"


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep this process's handlers of signals: Ray puts its own in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    name: str
    """Its host's name, with the beginning of its id if the host has several nodes."""
    cpus: int
    gpus: int
    memory: float


class Cluster:
    """A connection to a Ray cluster."""

    def __init__(self, ray: Any, tell: Tell) -> None:
        """Take the module, which is connected."""
        self._ray, self.tell = ray, tell
        self._executors: list[Executor] = []
        self._threads: list[threading.Thread] = []

    def close(self) -> None:
        """Stop what uses the connection: Ray ends a process that speaks to it later."""
        for executor in self._executors:
            executor.stop()
        for thread in self._threads:
            thread.join()

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        hosts = [node["NodeManagerHostname"] for node in alive]
        return [
            Node(
                node["NodeID"],
                host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:8]}",
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
                float(node["Resources"].get("memory", 0)),
            )
            for node, host in zip(alive, hosts, strict=True)
        ]

    def answers(self, node: Node, is_stopped: Callable[[], bool]) -> bool:
        """Return whether a node still runs tasks: the cluster notices after some time only that one has died."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        try:
            return bool(self.fetch(self.start(is_alive, node, num_cpus=0), deadline, is_stopped))
        except (WorkerLostError, W4A16Error):
            return False

    def manage(self, executor: Executor, threads: Iterable[threading.Thread] = ()) -> Executor:
        """Return an executor that stops, with its threads, before the connection ends."""
        self._executors.append(executor)
        self._threads += threads
        return executor

    def put(self, value: Any) -> Any:
        """Send a value to the cluster, once to each node that needs it; return the reference."""
        return self._ray.put(value)

    def start(self, function: Callable[..., Any], node: Node, *arguments: Any, **resources: float) -> Any:
        """Start a function of this package on a node; return the reference of its result."""
        return self._ray.remote(function).options(max_retries=0, **_on(node), **resources).remote(*arguments)

    def start_actor(self, kind: type, node: Node, *arguments: Any, **resources: float) -> Any:
        """Start a process on a node that holds an object of a class of this package."""
        return self._ray.remote(kind).options(max_restarts=0, **_on(node), **resources).remote(*arguments)

    def end_actor(self, actor: Any) -> None:
        """End such a process."""
        self._ray.kill(actor)

    def ready(self, refs: Sequence[Any]) -> list[Any]:
        """Return the results that have come; wait a little for the first."""
        found: list[Any] = self._ray.wait(list(refs), timeout=_POLL_SECONDS)[0]
        return found

    def has(self, ref: Any) -> bool:
        """Return whether a result, or an error in its place, has come."""
        return bool(self._ray.wait([ref], timeout=0)[0])

    def fetch(
        self,
        ref: Any,
        deadline: float = math.inf,
        is_stopped: Callable[[], bool] = lambda: False,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Wait for a result of Ray.

        Args:
            ref: the result.
            deadline: clock (`time.monotonic`) by which it must be there.
            is_stopped: whether to cancel the task.
            is_gone: whether its node is known to answer no more.

        Raises:
            WorkerLostError: if the worker, the node or the process was lost, or it was stopped.
            W4A16Error: if the task itself raised it.
        """
        errors = importlib.import_module("ray.exceptions")
        while not self._ray.wait([ref], timeout=_POLL_SECONDS)[0]:
            was_stopped = is_stopped()
            if was_stopped or time.monotonic() > deadline or is_gone():
                self._ray.cancel(ref)
                raise WorkerLostError("it was stopped" if was_stopped else "it does not answer")
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, W4A16Error):
                raise cause from None
            raise WorkerLostError(one_line(cause)) from None
        except errors.RayError as error:
            raise WorkerLostError(one_line(error)) from None


def _on(node: Node) -> dict[str, Any]:
    """Return the options that bind work to a node."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)}
