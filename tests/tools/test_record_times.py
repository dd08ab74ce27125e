"""Recording times: what is drawn, written, and measured again after an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import record_times
import recorded
from fakes.devices import H100, H200
from fakes.library import FakeLibrary

from w4a16gen import KernelConfig, Library, Problem, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.compare import tiles_suit

DEFAULT = enumerate_space("default")
PROBLEMS = [Problem(m, 4096, 4096, 128) for m in (1, 16, 300)]


class Stopwatch:
    """Measures nothing: a kernel takes a microsecond for each of its tokens, and a second of the clock."""

    def __init__(self) -> None:
        self.measured: list[tuple[KernelConfig, Problem]] = []
        self.seconds = 0.0
        self.interrupt_after: int | None = None

    def measure(
        self, library: Library, problem: Problem, mode: QuantMode, configs: Sequence[KernelConfig], *, device: int
    ) -> Iterable[tuple[KernelConfig, float]]:
        assert (mode, device) == (record_times.MEASURED_MODE, 0)
        assert set(configs) <= set(library.configs())
        for config in configs:
            if len(self.measured) == self.interrupt_after:
                raise KeyboardInterrupt
            self.measured.append((config, problem))
            self.seconds += 1
            yield config, 1000.0
            yield config, float(config.cta.tokens)

    def clock(self) -> float:
        return self.seconds


@pytest.fixture
def stopwatch() -> Stopwatch:
    return Stopwatch()


def recording(stopwatch: Stopwatch, output: Path, device: Device = H100, kernels: int | None = None) -> int:
    """Record the problems and return how many times were measured."""
    job = record_times.Recording(
        FakeLibrary(DEFAULT, devices=[device]),
        device,
        output,
        "a test",
        stopwatch.measure,
        stopwatch.clock,
        kernels,
        seed=1,
    )
    return job.run(DEFAULT, PROBLEMS, 600)


def test_problems_are_drawn_by_the_seed() -> None:
    drawn = record_times.draw_problems(12, 8, seed=1)
    assert drawn == record_times.draw_problems(12, 8, seed=1)
    assert drawn != record_times.draw_problems(12, 8, seed=2)
    assert len({(problem.n, problem.k) for problem in drawn}) == 12
    assert len(set(drawn)) == len(drawn) > 80
    for problem in drawn:
        assert 1 <= problem.m <= 8192
        assert problem.n * problem.k <= record_times.MAX_WEIGHT
        assert (problem.n % 64, problem.k % 128, problem.group_size) == (0, 0, 128)
        assert min(problem.n, problem.k) >= 1024
        assert max(problem.n, problem.k) <= 32768


def test_every_kernel_that_suits_is_measured_once_and_its_last_time_kept(stopwatch: Stopwatch, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "times.csv"
    count = recording(stopwatch, path)
    rows = recorded.read([path])
    suited = {
        (config, problem)
        for problem in PROBLEMS
        for config in DEFAULT
        if config.mode is record_times.MEASURED_MODE and tiles_suit(config, problem)
    }
    assert len(rows) == count == len(suited)
    assert {(row.kernel, row.problem) for row in rows} == suited
    for row in rows:
        assert row.kernel is not None
        assert row.microseconds == row.kernel.cta.tokens
        assert (row.gpu, row.sm_count, row.mode, row.source) == (H100.name, 132, record_times.MEASURED_MODE, "a test")


def test_an_interrupted_run_goes_on_where_it_stopped(stopwatch: Stopwatch, tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    stopwatch.interrupt_after = 6
    with pytest.raises(KeyboardInterrupt):
        recording(stopwatch, path)
    assert len(recorded.read([path])) == 6
    with path.open("a") as file:
        file.write("w4a16_sm90_native_fgs_cta64x8x")  # a process was killed while it wrote
    stopwatch.interrupt_after = None
    recording(stopwatch, path)
    assert len(stopwatch.measured) == len(set(stopwatch.measured)) == len(recorded.read([path]))
    assert recording(stopwatch, path) == 0


def test_each_gpu_has_its_own_times(stopwatch: Stopwatch, tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    first = recording(stopwatch, path)
    assert recording(stopwatch, path, H200) == first
    assert recording(stopwatch, path, replace(H100, sm_count=60)) == first


def test_it_stops_when_the_time_is_over(stopwatch: Stopwatch, tmp_path: Path) -> None:
    job = record_times.Recording(
        FakeLibrary(DEFAULT), H100, tmp_path / "times.csv", "a test", stopwatch.measure, stopwatch.clock, None, seed=1
    )
    assert job.run(DEFAULT, PROBLEMS, 4.0) == 4
    assert len(recorded.read([tmp_path / "times.csv"])) == 4


def test_kernels_are_drawn_by_the_seed(stopwatch: Stopwatch, tmp_path: Path) -> None:
    assert recording(stopwatch, tmp_path / "a.csv", kernels=2) == 2 * len(PROBLEMS)
    drawn = list(stopwatch.measured)
    stopwatch.measured.clear()
    recording(stopwatch, tmp_path / "b.csv", kernels=2)
    assert stopwatch.measured == drawn


def test_the_command_times_the_kernels_of_the_spaces(
    stopwatch: Stopwatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "times.csv"
    library = FakeLibrary([*DEFAULT, *enumerate_space("trtllm")])
    arguments = ["--output", str(path), "--space", "default", "--layers", "1", "--tokens", "2", "--seed", "7"]
    record_times.main(arguments, open_build=lambda _: library, measure=stopwatch.measure)
    rows = recorded.read([path])
    assert {row.problem for row in rows} == set(record_times.draw_problems(1, 2, seed=7))
    assert {row.kernel for row in rows} <= set(DEFAULT)
    assert {row.source for row in rows} == {"record_times seed 7"}
    assert f"{len(rows)} times measured on {H100.name}, {len(DEFAULT)} kernels, 2 problems" in capsys.readouterr().out
