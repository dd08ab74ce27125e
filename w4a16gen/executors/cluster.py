"""A Ray cluster as a place to run tasks: connecting, which nodes may take part, and what was lost."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from w4a16gen.errors import ClusterError, W4A16Error, missing_extra
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import (
    Files,
    Named,
    Report,
    Setup,
    describe_node,
    differences,
    is_alive,
    one_line,
    run_task,
)
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError

AUTO = "auto"
"""The address of the cluster that this machine belongs to."""
PATIENCE_SECONDS = 60.0
"""How long a run without any worker waits for a node to join."""
_REACH_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
"""How long other nodes are waited for once one can be used. Later ones join then."""
_LOOK_SECONDS = 5.0
"""Time between looks for nodes that have joined."""
_POLL_SECONDS = 0.5
_QUIET = {
    "RAY_gcs_rpc_server_connect_timeout_s": "5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables of this process, not of the cluster: what Ray prints by itself, and how long it waits for an answer."""

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
        raise ClusterError(f"{given!r} is no address of a Ray cluster: pass auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, port or 10001), timeout=_REACH_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(
            f"no Ray cluster answers at {given} ({reason}): check the address, or start one with `ray start --head`"
        ) from None


def _why_not(address: str, error: BaseException) -> str:
    text = one_line(error, 300)
    if address == AUTO and isinstance(error, ConnectionError):
        return "this machine belongs to no running Ray cluster: run `ray start`, or pass --ray HOST:PORT"
    hint = "" if address.startswith("ray://") else ". From a machine outside the cluster, pass ray://HOST:10001"
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
        self._ray, self._tell = ray, tell
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

    def answers(self, node: Node) -> bool:
        """Return whether a node still runs tasks: the cluster notices after some time only that one has died."""
        ref = self._ray.remote(is_alive).options(max_retries=0, **self._on(node, num_cpus=0)).remote()
        try:
            return bool(self.fetch(ref, time.monotonic() + _ANSWER_SECONDS))
        except (WorkerLostError, W4A16Error):
            return False

    def executor(
        self, setup: Setup, files: Files, identify: Named, expected: Mapping[str, str], *, most: int | None
    ) -> Executor:
        """Return an executor on the CPUs of all nodes whose versions are those of this machine.

        Args:
            setup: prepares the workers.
            files: what they need; sent once to each node.
            identify: finds the versions on a node.
            expected: the versions of this machine; a node that differs gets no work, and is named.
            most: tasks at once; None takes all CPUs.

        Raises:
            ClusterError: if no node can be used.
        """
        sent = self._ray.put(dict(files))

        def ask(node: Node) -> list[Any]:
            options = self._on(node, num_cpus=0)
            return [self._ray.remote(describe_node).options(max_retries=0, **options).remote(identify)] * (
                node.cpus > 0
            )

        def place_of(node: Node, _ref: Any, report: Report) -> Place | None:
            if fault := _fault(report, expected):
                self._tell(f"{node.name} gets no work: {fault}")
                return None
            return _Cpus(self, node, setup, sent)

        recruits = _Recruits(self, ask, place_of)
        places = recruits.first(_ANSWER_SECONDS)
        if not places:
            raise ClusterError("no node of the cluster can compile: see the sentences above, or start nodes with CPUs")
        executor = Executor(places, tell=self._tell, most=most, patience=PATIENCE_SECONDS)
        self._executors.append(executor)
        self._threads.append(recruits.go_on(executor.add, lambda: executor.is_stopped))
        return executor

    def _on(self, node: Node, **resources: float) -> dict[str, Any]:
        """Return the options that bind a task to a node."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return {"scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node.id, soft=False), **resources}

    def fetch(self, ref: Any, deadline: float = math.inf, is_stopped: Callable[[], bool] = lambda: False) -> Any:
        """Wait for a result of Ray.

        Args:
            ref: the result.
            deadline: clock (`time.monotonic`) by which it must be there.
            is_stopped: whether to cancel the task.

        Raises:
            WorkerLostError: if the worker, the node or the process was lost, or it was stopped.
            W4A16Error: if the task itself raised it.
        """
        errors = importlib.import_module("ray.exceptions")
        while not self._ray.wait([ref], timeout=_POLL_SECONDS)[0]:
            if is_stopped() or time.monotonic() > deadline:
                self._ray.cancel(ref)
                raise WorkerLostError("it was stopped" if is_stopped() else "it does not answer")
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, W4A16Error):
                raise cause from None
            raise WorkerLostError(one_line(cause)) from None
        except errors.RayError as error:
            raise WorkerLostError(one_line(error)) from None


def _fault(report: Report, expected: Mapping[str, str]) -> str:
    """Return why a node cannot be used; nothing if it can."""
    return report.fault or "; ".join(differences(expected, report.versions))


class _Recruits:
    """The nodes that are asked whether they can take part: those of now, then those that join later."""

    def __init__(
        self,
        cluster: Cluster,
        ask: Callable[[Node], list[Any]],
        place_of: Callable[[Node, Any, Report], Place | None],
    ) -> None:
        self._cluster, self._ask, self._place_of = cluster, ask, place_of
        self._asked: dict[Any, Node] = {}
        self._known: set[str] = set()

    def first(self, seconds: float) -> list[Place]:
        """Return the places of now; after the first answer wait only some seconds for the others."""
        self._look()
        places: list[Place] = []
        deadline = time.monotonic() + seconds
        while self._asked and (not places or time.monotonic() < deadline):
            places += self._answers()
        return places

    def go_on(self, add: Callable[[Place], None], is_over: Callable[[], bool]) -> threading.Thread:
        """Add places in a thread as nodes answer, until the work is over; return the thread."""

        def watch() -> None:
            looked = time.monotonic()
            with contextlib.suppress(Exception):  # the connection may end at any time
                while not is_over():
                    for place in self._answers():
                        add(place)
                    if time.monotonic() > looked + _LOOK_SECONDS:
                        self._look()
                        looked = time.monotonic()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread

    def _look(self) -> None:
        for node in self._cluster.nodes():
            if node.id not in self._known:
                self._known.add(node.id)
                self._asked.update(dict.fromkeys(self._ask(node), node))

    def _answers(self) -> list[Place]:
        """Return the places of the nodes that have answered since; wait a little."""
        if not self._asked:
            time.sleep(_POLL_SECONDS)
            return []
        ready, _ = self._cluster._ray.wait(list(self._asked), timeout=_POLL_SECONDS)  # noqa: SLF001
        places = []
        for ref in ready:
            node = self._asked.pop(ref)
            try:
                report = self._cluster.fetch(ref)
            except (WorkerLostError, W4A16Error) as error:
                report = Report({}, str(error))
            place = self._place_of(node, ref, report)
            if place is not None:
                places.append(place)
        return places


class _Cpus(Place):
    """The CPUs of a node: a task of ours is a task of Ray."""

    def __init__(self, cluster: Cluster, node: Node, setup: Setup, files: Any) -> None:
        super().__init__(node.name, node.cpus, node.memory)
        self._cluster, self._at, self._setup, self._files = cluster, node, setup, files
        self._stopped = False

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        """Run a task on the node and yield its items when it is done."""
        options = self._cluster._on(self._at, num_cpus=1, memory=int(min(memory, self.memory)))  # noqa: SLF001
        remote = self._cluster._ray.remote(run_task).options(max_retries=0, **options)  # noqa: SLF001
        ref = remote.remote(self._setup, self._files, Named.of(function), list(arguments))
        yield from self._cluster.fetch(ref, is_stopped=lambda: self._stopped)

    def revive(self) -> bool:
        """Return whether the node is alive."""
        return self._cluster.answers(self._at)

    def stop(self) -> None:
        """Cancel the tasks that run here."""
        self._stopped = True
