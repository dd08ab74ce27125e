"""Ray clusters of several nodes on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

QUICK = {"include_log_monitor": False, "object_store_memory": 100 << 20}
"""Nodes without what these tests do not use."""
NOTICE = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 200}
"""How soon and how often the cluster asks its nodes whether they are there. A frozen one has Ray's usual time for each
answer: about a minute in all."""


class LocalCluster:
    """A head without CPUs, and nodes that come and go."""

    def __init__(self) -> None:
        utilities = pytest.importorskip("ray.cluster_utils")
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": NOTICE, **QUICK}
        self._cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self._frozen: list[psutil.Process] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, count: int = 1, *, cpus: int = 1, gpus: int = 0, **environment: str) -> Any:
        """Start nodes with more variables than this process has; return the last."""
        for _ in range(count):
            node = self._cluster.add_node(wait=False, num_cpus=cpus, num_gpus=gpus, env_vars=environment, **QUICK)
            self.nodes.append(node)
        self._cluster.wait_for_nodes()
        return self.nodes[-1]

    def kill(self, node: Any) -> None:
        """End a node as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self._end_frozen()

    def freeze(self, node: Any) -> None:
        """Stop all processes of a node."""
        raylet = self._raylet(node)
        self._suspend(raylet, *raylet.children(recursive=True))

    def freeze_worker(self, node: Any) -> None:
        """Stop a process of a node that runs a task; wait for it."""
        running: list[psutil.Process] = []
        while not running:
            with contextlib.suppress(psutil.NoSuchProcess):
                running = [child for child in self._raylet(node).children() if child.name().startswith("ray::run_task")]
        self._suspend(running[0])

    def _suspend(self, *processes: psutil.Process) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                self._frozen.append(process)

    def _end_frozen(self) -> None:
        """End what nobody else can."""
        while self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._frozen.pop().kill()

    def _raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def node_of(self, process: int) -> Any:
        """Return the node that runs a worker's process."""
        raylet = psutil.Process(process).ppid()
        return next(node for node in self.nodes if self._raylet(node).pid == raylet)

    def shutdown(self) -> None:
        self._end_frozen()
        self._cluster.shutdown()


@contextlib.contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """Start a cluster; it ends with the block."""
    cluster = LocalCluster()
    try:
        yield cluster
    finally:
        cluster.shutdown()
