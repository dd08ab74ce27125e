"""Tuning over a Ray cluster of nodes with stand-in GPUs: nothing lost, nothing doubled, no two kinds of card mixed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.clusters import LocalCluster, local_cluster
from fakes.devices import H100, H200
from fakes.gpus import KERNELS, microseconds, open_fake_gpu
from fakes.library import FakeLibrary
from fakes.runner import Runner
from paths import ROOT

from w4a16gen import QuantMode
from w4a16gen.choose.timing_table import TABLE, TuningTable, card_table
from w4a16gen.cli import main
from w4a16gen.cli.services import Services
from w4a16gen.executors import gpu_nodes, recruits
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure import gpus
from w4a16gen.measure.compare import tiles_suit

pytest.importorskip("ray")
pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("ray")]

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
NODES = 8
PROBLEMS = [Problem(8 * number, 512, 1024, 128) for number in range(1, 41)]
EVERY = {
    (str(problem), config.name)
    for problem in PROBLEMS
    for config in runnable(KERNELS, MODE, problem)
    if tiles_suit(config, problem)
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpus") / "timed"


@pytest.fixture(scope="module")
def cluster(log: Path) -> Iterator[LocalCluster]:
    """Return a cluster of an H200 and two H100."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FAKE_GPU_LOG", str(log))
        monkeypatch.setenv("FAKE_GPU_SECONDS", "0.01")
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        with local_cluster() as started:
            started.add(gpus=1, FAKE_GPU_CARD="H200")
            started.add(2, gpus=1)
            yield started


@pytest.fixture
def tuner(cli: Runner, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return a runner of `tune` on a build that the stand-ins time; it waits for all nodes."""
    monkeypatch.setattr(recruits, "OTHERS_SECONDS", 120.0)
    log.unlink(missing_ok=True)
    (tmp_path / "build").mkdir()
    library = FakeLibrary(KERNELS, folder=tmp_path / "build", devices=[])
    cli.services = Services(load=lambda _folder: library)
    monkeypatch.setattr(gpus, "open_gpu", open_fake_gpu)
    monkeypatch.setattr(gpus, "files_of", lambda _build: {})
    return cli


def timed(log: Path) -> dict[str, Counter[tuple[str, str]]]:
    """Return how often each kernel was timed on each problem, by card."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for line in log.read_text().splitlines():
        card, problem, kernel, _ = line.split(";")
        found.setdefault(card, Counter())[problem, kernel] += 1
    return found


def worker_of(log: Path, but: int = 0) -> int:
    """Return the process that timed a kernel last, other than one; wait for it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        found = int(lines[-1].split(";")[-1]) if lines else but
        if found != but:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing is timed")


def check_table(path: Path, card: str) -> None:
    """Fail unless a table has every time, each of this card."""
    table = TuningTable.read(path)
    assert table.gpu == card
    assert {(str(problem), config.name) for (_, problem), times in table.times.items() for config in times} == EVERY
    for (_, problem), times in table.times.items():
        for config, measured in times.items():
            assert measured.microseconds == microseconds(card, problem, config)


def arguments(cluster: LocalCluster, *more: str) -> list[str]:
    named = [argument for problem in PROBLEMS for argument in ("--problem", f"{problem.m}x{problem.n}x{problem.k}")]
    return ["tune", *named, "--ray", cluster.address, *more]


def test_ctrl_c_leaves_what_was_measured_and_a_process_may_hang_and_a_node_die(
    cluster: LocalCluster, tuner: Runner, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tuner.invoke(main, arguments(cluster, "--table", "one.json"))
    assert refused.exit_code == 2, refused.stderr
    assert "several kinds of card" in " ".join(refused.stderr.split())
    refused = tuner.invoke(main, arguments(cluster, "--card", "A100"))
    assert refused.exit_code == 3
    sentence = "--card A100 is in no name of the cluster's GPUs: NVIDIA H100 80GB HBM3, NVIDIA H200"
    assert sentence in " ".join(refused.stderr.split())
    finished: list[str] = []

    def interrupt(sentence: str, **_: Any) -> None:
        finished.append(sentence)
        if len(finished) == len(PROBLEMS) // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("w4a16gen.cli.tuning.note", interrupt)
        assert tuner.invoke(main, arguments(cluster, "--card", "h100")).exit_code == 130
    table = TuningTable.read(tmp_path / "build" / TABLE)
    assert len(table.times) >= len(PROBLEMS) // 2
    known = {(str(problem), config.name) for (_, problem), times in table.times.items() for config in times}
    log.unlink()

    def hang_then_kill() -> None:
        """Stop the only process that measures; when another one has its place, end the node."""
        hung = worker_of(log)
        psutil.Process(hung).suspend()
        cluster.kill(cluster.node_of(worker_of(log, but=hung)))

    monkeypatch.setattr(gpu_nodes, "_HUNG_SECONDS", 2.0)
    killer = threading.Thread(target=hang_then_kill)
    killer.start()
    done = tuner.invoke(main, arguments(cluster, "--card", "h100", "--gpus", "1"))
    killer.join()
    assert done.exit_code == 0, done.output
    assert "lost a task, which goes on elsewhere: it does not answer" in " ".join(done.stderr.split())
    assert "gets no more work" in " ".join(done.stderr.split()), "the spare GPU took over"
    check_table(tmp_path / "build" / TABLE, H100.name)
    assert not timed(log)[H100.name].keys() & known, "nothing is measured again"


def test_of_eight_nodes_one_fails_every_third_task_and_no_time_is_lost_doubled_or_mixed(
    cluster: LocalCluster, tuner: Runner, log: Path, tmp_path: Path
) -> None:
    cluster.add(NODES - len(cluster.nodes), gpus=1)  # of which one is the H200
    cluster.add(gpus=1, FAKE_GPU_FAILS="3")
    done = tuner.invoke(main, arguments(cluster, "--json"))
    assert done.exit_code == 0, done.output
    tables = {card.name: tmp_path / "build" / card_table(card) for card in (H100, H200)}
    result = json.loads(done.stdout)
    assert result["tables"] == {name: str(path) for name, path in tables.items()}
    for card, path in tables.items():
        check_table(path, card)
    assert timed(log) == {name: Counter(EVERY) for name in tables}, "each once"
    assert Counter(problem["card"] for problem in result["problems"]) == dict.fromkeys(tables, len(PROBLEMS))
    assert sum(node["tasks"] for node in result["nodes"]) == 2 * len(PROBLEMS)
    assert len(result["nodes"]) == NODES + 1
    assert sum(node["lost"] > 0 for node in result["nodes"]) == 1, "one node fails"
    assert "an uncorrectable ECC error" in " ".join(done.stderr.split())
