"""The options that let work run on a Ray cluster, and what each of its machines did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from w4a16gen.cli.help import METHOD, option
from w4a16gen.cli.output import note
from w4a16gen.cli.paths import NamedPath, read_text
from w4a16gen.cli.services import services
from w4a16gen.errors import InvalidValueError
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.executors.cluster import Cluster
    from w4a16gen.executors.summaries import NodeSummary
    from w4a16gen.kernels.config import KernelConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class ClusterChoice:
    """What the options name: an address or none, and a file with Ray's runtime_env or none."""

    address: str | None = None
    environment: Path | None = None


HERE = ClusterChoice()
"""No cluster: work runs on this machine."""


def cluster_options(command: _Command) -> _Command:
    """Add --ray and --ray-env; the command gets ray and ray_env."""
    command = option(
        "--ray-env",
        type=NamedPath(dir_okay=False, exists=True),
        section=METHOD,
        help="JSON file with Ray's runtime_env, which prepares the workers, for example with our wheel.",
    )(command)
    return option(
        "--ray",
        metavar="ADDRESS",
        section=METHOD,
        help="Run on a Ray cluster: auto, HOST:PORT on a machine of it, or ray://HOST:PORT elsewhere.",
    )(command)


@contextmanager
def connected(choice: ClusterChoice) -> Iterator[Cluster | None]:
    """Connect to the cluster that the options name; None without --ray.

    Raises:
        click.UsageError: if --ray-env is given without --ray.
        InvalidValueError: if its file is not a JSON object.
        MissingToolError: if Ray is not installed.
        ClusterError: if the cluster cannot be reached.
    """
    if choice.address is None:
        if choice.environment is not None:
            raise click.UsageError("--ray-env prepares the workers of a cluster: pass --ray too")
        yield None
        return
    environment = None if choice.environment is None else _environment(choice.environment)
    with services().connect(choice.address, environment, _warn) as cluster:
        yield cluster


def _warn(sentence: str) -> None:
    note(sentence, label="warning:")


def _environment(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} is not JSON ({error}): it must be an object, Ray's runtime_env") from None
    if not isinstance(value, dict):
        raise InvalidValueError(f"{path} holds no JSON object: it must be Ray's runtime_env")
    return value


def compile_options(cluster: Cluster | None, configs: Sequence[KernelConfig]) -> dict[str, Any]:
    """Return the arguments by which `build` compiles on a cluster; none without one."""
    if cluster is None:
        return {}
    from w4a16gen.build.workers import cluster_workers

    return {"workers": cluster_workers(cluster, configs)}


def tell_nodes(nodes: Sequence[NodeSummary]) -> None:
    """Say what each machine did."""
    for node in nodes:
        lost = f", {node.lost} lost" if node.lost else ""
        note(f"{node.node}: {counted(node.tasks, 'task')} in {node.seconds:.0f} s of work{lost}")
