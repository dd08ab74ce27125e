"""Waiting for futures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from w4a16gen.executors.waiting import as_done, wait_for_any

INTERRUPTED = """
import os, signal, sys, threading, time
from concurrent.futures import Future
from pathlib import Path
from w4a16gen.build.link import _run
from w4a16gen.executors.waiting import as_done, wait_for_any

def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the other thread gets it, so no system call ends early
try:
    {wait}
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.parametrize(
    "wait", ["wait_for_any([Future()])", "list(as_done([Future(), Future()]))", "_run(['sleep', '60'], Path('.'))"]
)
def test_a_signal_that_another_thread_receives_ends_the_wait(wait: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.format(wait=wait)], timeout=30, check=False)  # noqa: S603
    assert done.returncode == 7


def test_futures_come_as_they_are_done() -> None:
    first, second, third = Future[int](), Future[int](), Future[int]()
    third.set_result(3)
    found = as_done([first, second, third])
    assert next(found) is third
    threading.Timer(0.3, second.set_result, [2]).start()
    assert next(found) is second
    first.cancel()
    first.set_running_or_notify_cancel()
    assert list(found) == [first]
    assert list(as_done([])) == []


def test_all_that_are_done_are_returned_at_once() -> None:
    futures = [Future[int]() for _ in range(3)]
    futures[0].set_exception(ValueError("no"))
    futures[2].set_result(1)
    began = time.monotonic()
    assert wait_for_any(futures) == {futures[0], futures[2]}
    assert time.monotonic() - began < 0.1
