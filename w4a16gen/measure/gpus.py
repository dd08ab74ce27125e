"""The GPUs that measure: those of this machine, or those of a cluster, one group for each kind of card."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen import __version__
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.errors import ClusterError
from w4a16gen.executors.cluster import Cluster
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.gpu_nodes import GpuGroup, on_gpus
from w4a16gen.executors.node import VERSION, Named, Setup
from w4a16gen.executors.nodes import Crew
from w4a16gen.executors.place import Context, InProcess
from w4a16gen.kernels.device import HOPPER, Device
from w4a16gen.runtime.artifact import MANIFEST, Build, load_build
from w4a16gen.runtime.devices import find_driver, first_hopper
from w4a16gen.runtime.library import Library

_NAME, _SMS, _DRIVER = "card", "multiprocessors", "driver"


@dataclass(frozen=True)
class Gpu:
    """What a measuring task works with: a loaded build and a CUDA device number."""

    library: Library
    index: int


@dataclass(frozen=True)
class Cards:
    """GPUs of one kind that measure together. Times of two kinds never mix."""

    device: Device
    """The first of them."""
    driver: str
    """Its driver, in words."""
    executor: Executor


def driver_text() -> str:
    """Return the driver of this machine in words."""
    driver = find_driver()
    return "none" if driver is None else f"CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}"


def cards_here(library: Library, devices: Sequence[Device]) -> Cards:
    """Return GPUs of this machine, all of one kind; they share this process.

    Args:
        library: the loaded build.
        devices: one or more.
    """
    node = platform.node()
    places = [InProcess(node, Context(Gpu(library, device.index))) for device in devices]
    return Cards(devices[0], driver_text(), Executor(places))


def cards_of_cluster(
    cluster: Cluster, build: Build, *, most: int | None = None, card: str | None = None
) -> list[Cards]:
    """Return the Hopper GPUs of a cluster, by kind, with a process for each. The build is sent once to each node.

    Args:
        cluster: the connection.
        build: the build that is measured.
        most: GPUs of each kind; None takes all.
        card: part of the name of the only kind to take; None takes all kinds.

    Raises:
        ClusterError: if there is none.
    """
    crew = Crew(Setup(Named.of(open_gpu)), files_of(build), Named.of(identify_gpu), {VERSION: __version__})

    groups = _groups(cluster, crew, most=most, card=card)
    for group in groups:
        if most is not None and len(group.places) < most:
            name = group.report[_NAME]
            cluster.tell(f"--gpus {most} is more than the {len(group.places)} {name} of the cluster: others may join")
    return [Cards(_device(group.report), group.report[_DRIVER], group.executor) for group in groups]


def kinds_of_cluster(cluster: Cluster, *, card: str | None = None) -> list[Cards]:
    """Return the kinds of Hopper GPUs of a cluster, before there is a build. They measure nothing.

    Args:
        cluster: the connection.
        card: as for `cards_of_cluster`.

    Raises:
        ClusterError: if there is none.
    """
    crew = Crew(Setup(Named.of(open_driver)), {}, Named.of(identify_device), {VERSION: __version__})
    groups = _groups(cluster, crew, most=None, card=card)
    for group in groups:
        group.end()
    return [Cards(_device(group.report), group.report[_DRIVER], group.executor) for group in groups]


def _groups(cluster: Cluster, crew: Crew, *, most: int | None, card: str | None) -> list[GpuGroup]:
    """Return the GPUs of a cluster by kind.

    Raises:
        ClusterError: if there is none, or none of the card.
    """
    names: set[str] = set()

    def kind_of(report: Mapping[str, str]) -> str:
        names.add(report[_NAME])
        return _kind(report, card)

    try:
        return on_gpus(cluster, crew, kind_of=kind_of, most=most)
    except ClusterError:
        if not names:
            raise
        raise ClusterError(f"--card {card} is in no name of the cluster's GPUs: {', '.join(sorted(names))}") from None


def labels_of(kinds: Sequence[Cards]) -> list[str]:
    """Return a name for each kind: the card's, with its multiprocessors if several kinds have this name."""
    names = [cards.device.name for cards in kinds]
    return [
        name if names.count(name) == 1 else f"{name} ({cards.device.sm_count} SMs)"
        for name, cards in zip(names, kinds, strict=True)
    ]


def _kind(report: Mapping[str, str], card: str | None) -> str:
    """Return the kind of a GPU by its report; nothing if another card is asked for."""
    name = report[_NAME]
    return f"{name} {report[_SMS]}" if card is None or card.lower() in name.lower() else ""


def one_kind(cards: Sequence[Cards]) -> Cards:
    """Return the only kind of card.

    Raises:
        ClusterError: if there are several.
    """
    if len(cards) > 1:
        names = ", ".join(f"{found.device.name} ({found.device.sm_count} SMs)" for found in cards)
        raise ClusterError(
            f"the cluster has several kinds of card, whose times do not mix: {names}. Name one by --card"
        )
    return cards[0]


def files_of(build: Build) -> dict[str, bytes]:
    """Return the files of a build that measuring needs, by path in its folder."""
    paths = [build.folder / MANIFEST, build.library, build.module, build.folder / TABLE]
    return {str(path.relative_to(build.folder)): path.read_bytes() for path in paths if path.is_file()}


def open_gpu(folder: Path) -> Context:
    """Return the context of a worker's process, which has one GPU.

    Args:
        folder: the build's files, as they came.

    Raises:
        NotBuiltError: if the build does not load on this machine.
        NoHopperGpuError: if there is no Hopper GPU.
    """
    library = Library(load_build(folder))
    return Context(Gpu(library, library.hopper_device().index))


def open_driver(_folder: Path) -> Context:
    """Return the GPU of a worker's process, as the driver describes it.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    driver = find_driver()
    return Context(first_hopper(() if driver is None else driver.gpus))


def identify_device(device: Device) -> dict[str, str]:
    """Return what a GPU is."""
    return {_NAME: device.name, _SMS: str(device.sm_count), _DRIVER: driver_text()}


def identify_gpu(gpu: Gpu) -> dict[str, str]:
    """Return what a worker's GPU is."""
    return identify_device(next(found for found in gpu.library.devices() if found.index == gpu.index))


def _device(report: Mapping[str, str]) -> Device:
    return Device(0, report[_NAME], HOPPER, int(report[_SMS]))
