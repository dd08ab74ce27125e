"""The work behind the commands, as one object: tests pass stand-ins as click's context object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.progress import show_progress
from w4a16gen.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from w4a16gen.build.diagnose import Finding
    from w4a16gen.runtime.devices import Driver
    from w4a16gen.runtime.library import Library


def _load(folder: Path | None) -> Library:
    from w4a16gen.runtime.default import load

    return load(folder)


def _find_driver() -> Driver | None:
    from w4a16gen.runtime.devices import find_driver

    return find_driver()


def _diagnose() -> Sequence[Finding]:
    from w4a16gen.build.diagnose import diagnose

    return diagnose()


def _run_one(*args: Any, **options: Any) -> Any:
    from w4a16gen.measure.single import run

    return run(*args, **options)


def _bench(*args: Any, **options: Any) -> Any:
    from w4a16gen.measure.bench import run_bench

    return run_bench(*args, **options)


def _random_bench(*args: Any, **options: Any) -> Any:
    from w4a16gen.measure.random_bench import run_random_bench

    return run_random_bench(*args, **options)


def _step_bench(*args: Any, **options: Any) -> Any:
    from w4a16gen.measure.step import run_step_bench

    return run_step_bench(*args, **options)


def _moe_bench(*args: Any, **options: Any) -> Any:
    from w4a16gen.measure.moe import run_moe_bench

    return run_moe_bench(*args, **options)


def _build(*args: Any, **options: Any) -> Any:
    from w4a16gen.build.pipeline import build

    return build(*args, **options)


def _compiled(*args: Any, **options: Any) -> Any:
    from w4a16gen.build.pipeline import compiled

    return compiled(*args, **options)


def _verify(*args: Any, **options: Any) -> Any:
    from w4a16gen.verify.report import verify

    return verify(*args, **options)


def _connect(*args: Any) -> Any:
    from w4a16gen.executors.cluster import connect

    return connect(*args)


@dataclass(frozen=True)
class Services:
    """Functions that need a compiler, a build or a GPU."""

    load: Callable[[Path | None], Library] = _load
    find_driver: Callable[[], Driver | None] = _find_driver
    diagnose: Callable[[], Sequence[Finding]] = _diagnose
    build: Callable[..., Any] = _build
    compiled: Callable[..., Any] = _compiled
    verify: Callable[..., Any] = _verify
    run_one: Callable[..., Any] = _run_one
    bench: Callable[..., Any] = _bench
    random_bench: Callable[..., Any] = _random_bench
    step_bench: Callable[..., Any] = _step_bench
    moe_bench: Callable[..., Any] = _moe_bench
    connect: Callable[..., AbstractContextManager[Any]] = _connect
    show_progress: Callable[..., AbstractContextManager[Progress]] = show_progress


def services() -> Services:
    """Return the services of the running command."""
    found = click.get_current_context().find_object(Services)
    return Services() if found is None else found
