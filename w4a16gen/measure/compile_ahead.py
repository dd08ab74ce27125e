"""Compiling rivals' kernels ahead of a run, in several processes: some compile for every layer, which takes seconds."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import Any

from w4a16gen.executors.waiting import as_done
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.rivals import RIVALS, Rival, find_torch
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.progress import Progress

MOST_PROCESSES = 12
"""Each has a CUDA context and a layer in the GPU's memory."""


def compile_ahead(
    problems: Sequence[Problem],
    mode: QuantMode,
    rivals: Sequence[Rival],
    device: int,
    *,
    tell: Callable[[str], None],
    show_progress: Callable[..., AbstractContextManager[Progress]],
    executor: Executor | None = None,
    until: float | None = None,
) -> int:
    """Let rivals compile what they need for problems; their caches on disk keep it for this process.

    Args:
        problems: the problems.
        mode: the quantisation mode.
        rivals: the rivals; those that compile nothing, or are not installed, are passed over.
        device: the GPU.
        tell: called with a sentence about failures, which do not end the run: timing meets them again.
        show_progress: shows a bar with a title, unless there is nothing to do.
        executor: where it runs; None makes processes.
        until: the time of `time.monotonic` after which nothing more is begun; None has no end.

    Returns:
        How many of the problems, from the first on, have nothing left to compile. Failures count as done.
    """
    compiling = [rival.name for rival in rivals if rival.module and importlib.util.find_spec(rival.module)]
    tasks = [(name, problem) for problem in problems for name in compiling]
    if len(tasks) <= 1:  # another process compiles one kernel no faster than this one
        return len(problems)
    reasons: Counter[str] = Counter()
    with show_progress("Compiling rivals' kernels", lines=True) as progress, executor or _processes(len(tasks)) as pool:
        pending = [pool.submit(compile_one, name, problem, mode, device) for name, problem in tasks]
        try:
            for done, future in enumerate(as_done(pending), 1):
                reasons[future.result()] += 1
                progress(done, len(tasks), "")
                if until is not None and time.monotonic() >= until:
                    pool.shutdown(wait=True, cancel_futures=True)  # what has begun ends
                    break
        except BrokenProcessPool:
            reasons["a process ended"] += 1
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for reason, count in reasons.items():
        if reason:
            tell(f"{count} of {len(tasks)} kernels of rivals were not compiled ahead: {reason}")
    begun = itertools.takewhile(lambda future: not future.cancelled(), pending)
    return sum(1 for _ in begun) // len(compiling)


def _processes(tasks: int) -> Executor:
    """Return processes for a number of tasks: a fork of this one could not use its GPU."""
    workers = min(os.cpu_count() or 1, MOST_PROCESSES, tasks)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def compile_one(name: str, problem: Problem, mode: QuantMode, device: int) -> str:
    """Run a rival once, so that it compiles; return why it cannot, or nothing."""
    torch: Any = find_torch()
    rival = next(rival for rival in RIVALS if rival.name == name)
    where = torch.device("cuda", device)
    try:
        with torch.cuda.device(where):
            weight = TorchWeight.drawn(torch, problem, mode, 0, where)
            a = torch.zeros((problem.m, problem.k), dtype=getattr(torch, rival.dtype), device=where)
            rival.prepare(a, weight, 1)[0](a)
            torch.cuda.synchronize()
            del weight, a
            torch.cuda.empty_cache()
    except Exception as failure:  # noqa: BLE001  (other libraries raise anything)
        return " ".join(f"{name}: {type(failure).__name__}: {failure}".split())
    return ""
