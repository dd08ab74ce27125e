"""Which GPUs measure: those of this machine, or those of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.cluster import ClusterChoice, connected
from w4a16gen.cli.help import METHOD, option
from w4a16gen.cli.services import services
from w4a16gen.progress import Progress, no_progress

if TYPE_CHECKING:
    from w4a16gen.executors.cluster import Cluster
    from w4a16gen.kernels.device import Device
    from w4a16gen.measure.gpus import Cards
    from w4a16gen.runtime.library import Library

card_option = option(
    "--card",
    metavar="NAME",
    section=METHOD,
    help="With --ray: only GPUs with NAME in their name, such as H200.",
)


@dataclass(frozen=True)
class GpuChoice:
    """What the options name."""

    cluster: ClusterChoice
    count: int | None = None
    """GPUs of each kind; None takes one of this machine, or all of a cluster."""
    card: str | None = None
    """Part of a card's name."""


@contextmanager
def hide_progress(_title: str) -> Iterator[Progress]:
    """Show nothing: several bars would mix."""
    yield no_progress


@contextmanager
def gpus_of(choice: GpuChoice, library: Library) -> Iterator[list[Cards]]:
    """Provide the GPUs that the options name, by kind."""
    with connected(choice.cluster) as cluster:
        kinds = gpus_on(choice, library, cluster)
        try:
            yield kinds
        finally:
            for cards in kinds:
                cards.executor.stop()


@contextmanager
def one_kind_of(choice: GpuChoice, library: Library) -> Iterator[Cards | None]:
    """Provide the GPUs of a cluster, which must be of one kind; None without a cluster."""
    from w4a16gen.measure.gpus import one_kind

    if choice.cluster.address is None:
        _refuse_card(choice)
        with connected(choice.cluster):
            yield None
        return
    with gpus_of(choice, library) as kinds:
        yield one_kind(kinds)


def gpus_on(choice: GpuChoice, library: Library, cluster: Cluster | None) -> list[Cards]:
    """Return the GPUs of a cluster, or without one those of this machine, by kind."""
    from w4a16gen.measure.gpus import cards_here, cards_of_cluster

    if cluster is not None:
        return cards_of_cluster(cluster, library.build, most=choice.count, card=choice.card)
    _refuse_card(choice)
    return [cards_here(library, _same(library.hopper_devices(), library.hopper_device(), choice.count))]


def find_gpu(choice: GpuChoice, cluster: Cluster | None) -> Device:
    """Return the first Hopper GPU, before anything is built.

    Raises:
        ClusterError: if the cluster has several kinds.
        NoHopperGpuError: if this machine has none.
    """
    from w4a16gen.measure.gpus import kinds_of_cluster, one_kind
    from w4a16gen.runtime.devices import first_hopper

    if cluster is not None:
        return one_kind(kinds_of_cluster(cluster, card=choice.card)).device
    _refuse_card(choice)
    driver = services().find_driver()
    found = () if driver is None else driver.gpus
    gpu = first_hopper(found)
    _same([device for device in found if device.is_hopper], gpu, choice.count)
    return gpu


def _refuse_card(choice: GpuChoice) -> None:
    if choice.card is not None:
        raise click.UsageError("--card names GPUs of a cluster: pass --ray too")


def _same(hopper: Sequence[Device], gpu: Device, count: int | None) -> list[Device]:
    """Return as many GPUs as asked for, of the first one's model."""
    same = [found for found in hopper if found.name == gpu.name]
    wanted = count or 1
    if wanted > len(same):
        raise click.UsageError(f"--gpus {wanted} is more than the {len(same)} {gpu.name} of this machine")
    return same[:wanted]
