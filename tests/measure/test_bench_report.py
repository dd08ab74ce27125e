"""The files that `bench --report` leaves, from measurements that are made up."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fakes.devices import H100
from fakes.library import FakeLibrary

from w4a16gen import Problem, QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.place import Context, InProcess
from w4a16gen.measure import bench, plots
from w4a16gen.measure import report as bench_report
from w4a16gen.measure.gpus import Cards, Gpu
from w4a16gen.measure.plots import draw_plots
from w4a16gen.measure.probes import TensorPeak
from w4a16gen.measure.record import Recorder, Row, Run, read_record, row_of
from w4a16gen.measure.report import common_settings, headline, layers, write_report
from w4a16gen.measure.results import FLOOR, Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS, RIVALS
from w4a16gen.progress import no_progress

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
PEAK = TensorPeak(800.0, 650.0)
RUN = Run("NVIDIA <H100>", 132, "2026-11-25", "0.1.0", 800.0, 650.0)
KERNEL = "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warpgroups4_persistent"


def compared(problem: Problem, kernel: float, *, floor: float | None = None, cublas: float | None = None) -> Comparison:
    """Return a comparison as `bench` makes it for one problem."""
    timings = [Timing(KERNEL, [kernel - 1, kernel, kernel + 2], [kernel - 0.5])]
    if floor is not None:
        timings.append(Timing(FLOOR, [floor], [floor - 1]))
    if cublas is not None:
        timings.append(Timing(CUBLAS, [cublas]))
    return Comparison(problem, MODE, {KERNEL: kernel}, 0, timings, {KERNEL: 0.25})


def test_a_row_says_what_follows_from_the_times() -> None:
    row = row_of("qkv", compared(Problem(16, 4096, 4096, 128), 10.0, floor=5.0, cublas=25.0), PEAK)
    assert (row.kernel, row.microseconds, row.least_microseconds, row.most_microseconds) == (KERNEL, 10.0, 9.0, 12.0)
    assert (row.dependent_microseconds, row.floor_microseconds, row.dependent_floor_microseconds) == (9.5, 5.0, 4.0)
    assert (row.speedup_over_fp16, row.share_of_floor, row.error_over_bound) == (2.5, 0.5, 0.25)
    packed = 4096 * 4096 // 2 + 2 * 32 * 4096 + 4 * 4096  # nibbles, fp16 scales, an fp32 factor per channel
    assert row.gigabytes_per_second == pytest.approx(packed / 10.0 / 1e3, rel=1e-3)
    assert row.tflops == pytest.approx(2 * 16 * 4096 * 4096 / 10.0 / 1e6, rel=1e-3)
    assert row.bytes_moved == packed + 2 * 16 * (4096 + 4096)


def test_a_row_says_what_a_call_gets_and_which_other_kernel_was_fastest() -> None:
    found = compared(Problem(16, 4096, 4096, 128), 10.0)
    bare = row_of("", found, None)
    assert (bare.chosen_kernel, bare.chosen_microseconds, bare.best_rival, bare.best_rival_microseconds) == (None,) * 4
    first, second, *_ = (rival.name for rival in RIVALS)
    timings = [*found.timings, Timing("as called", [11.0]), Timing(second, [12.0]), Timing(first, [13.0])]
    row = row_of("", replace(found, timings=timings, chosen="as called"), None)
    assert (row.chosen_kernel, row.chosen_microseconds) == ("as called", 11.0)
    assert (row.best_rival, row.best_rival_microseconds) == (second, 12.0)
    assert row.kernel == KERNEL


def test_with_many_tokens_the_floor_is_multiplying() -> None:
    problem = Problem(4096, 4096, 4096, 128)
    row = row_of("", compared(problem, 250.0, floor=5.0), PEAK)
    assert row.share_of_floor == pytest.approx(problem.flops / 800e6 / 250.0, rel=1e-3)
    assert row_of("", compared(problem, 250.0, floor=5.0), None).share_of_floor is None
    bare = row_of("", compared(problem, 250.0), PEAK)
    assert (bare.share_of_floor, bare.speedup_over_fp16, bare.cublas_microseconds) == (None, None, None)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, list[Row]]:
    """Return the folder of a run of four problems, and its rows."""
    folder = tmp_path / "report"
    recorder = Recorder(folder, RUN)
    rows = []
    for m, (n, k) in ((1, (4096, 4096)), (64, (4096, 4096)), (1, (8192, 8192)), (4096, (8192, 8192))):
        found = compared(Problem(m, n, k, 128), 10.0 * m**0.5, floor=5.0, cublas=30.0)
        rows.append(row_of("a & b", found, PEAK))
        recorder.add(rows[-1], found)
    return folder, rows


def test_a_record_comes_back_as_it_was_written(recorded: tuple[Path, list[Row]]) -> None:
    folder, rows = recorded
    assert read_record(folder) == (RUN, rows)
    last = json.loads((folder / "bench.jsonl").read_text().splitlines()[-1])
    assert last["measured"]["timings"][0]["isolated"] == [639.0, 640.0, 642.0], "every time that was measured is there"


def test_a_report_of_a_run_without_probes_has_no_roofs(tmp_path: Path) -> None:
    run = Run("a GPU", 132, "2026-11-25", "0.1.0", None, None)
    row = row_of("", compared(Problem(1, 4096, 4096, 128), 10.0), None)
    Recorder(tmp_path, run)
    assert read_record(tmp_path) == (run, [])
    assert {path.name for path in write_report(tmp_path, run, [row])} == {"bench.csv", "report.html", "roofline.svg"}
    assert {path.name for path in write_report(tmp_path, run, [])} == {"bench.csv", "report.html"}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1}\n{"m": 1}', "{"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench.jsonl").write_text(text)
    with pytest.raises(InvalidValueError, match=r"bench\.jsonl is no record of `w4a16gen bench --report`"):
        read_record(tmp_path)


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, _tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attributes if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_opens_without_a_network(recorded: tuple[Path, list[Row]]) -> None:
    folder, rows = recorded
    written = {path.name for path in write_report(folder, RUN, rows)}
    assert written == {"bench.csv", "report.html", "roofline.svg", "speedup.svg"}
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert all(source.startswith("#") for source in page.loaded), "nothing is loaded from elsewhere"
    assert text.count("<svg") == 2
    assert "NVIDIA <H100>" in page.text
    assert "a & b" in page.text
    table = list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))
    assert [row["microseconds"] for row in table] == ["10.0", "80.0", "10.0", "640.0"]
    assert [row["speedup_over_fp16"] for row in table] == ["3.0", "0.375", "3.0", "0.0469"]


def test_a_report_leads_with_its_result(recorded: tuple[Path, list[Row]]) -> None:
    folder, rows = recorded
    assert headline(RUN, rows) == (
        "On NVIDIA <H100> the fastest kernel is 3.0 times as fast as cuBLAS FP16 with 1 token, "
        "and level with it from 64 tokens on."
    )
    assert headline(RUN, rows[:1]).endswith("3.0 times as fast as cuBLAS FP16 with 1 token.")
    assert "was not timed" in headline(RUN, [replace(rows[0], cublas_microseconds=None)])
    write_report(folder, RUN, rows)
    text = (folder / "report.html").read_text()
    assert text.index("times as fast as cuBLAS") < text.index("<svg") < text.index("<table"), "result, plot, then table"


def test_a_report_says_how_times_were_measured(
    recorded: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = recorded
    monkeypatch.setattr(bench_report, "BLOCK_SECONDS", 7.25)
    monkeypatch.setattr(bench_report, "LAUNCHES", 321)
    write_report(folder, RUN, rows)
    text = (folder / "report.html").read_text()
    assert "7.25 s that count" in text
    assert "at least 321 launches" in text


def test_rows_are_grouped_by_layer_and_rivals_have_a_column_only_if_timed(recorded: tuple[Path, list[Row]]) -> None:
    folder, rows = recorded
    assert [(layer.shape, [row.m for row in layer.rows]) for layer in layers(rows)] == [
        ("4096x4096", [1, 64]),
        ("8192x8192", [1, 4096]),
    ]
    assert common_settings(rows) == "mode fgs, groups of 128"
    mixed = [*rows, replace(rows[0], group_size=64)]
    assert common_settings(mixed) is None
    write_report(folder, RUN, rows)
    assert "vs other 4-bit" not in (folder / "report.html").read_text()
    timed = [replace(row, best_rival="humming", best_rival_microseconds=row.microseconds * 1.5) for row in mixed]
    write_report(folder, RUN, timed)
    text = (folder / "report.html").read_text()
    assert "vs other 4-bit" in text
    assert "1.50" in text
    assert ">group<" in text


def test_plots_are_the_same_bytes_twice_and_show_rivals(recorded: tuple[Path, list[Row]]) -> None:
    _, rows = recorded
    timed = [replace(row, best_rival="humming", best_rival_microseconds=20.0) for row in rows]
    first, second = draw_plots(RUN, rows), draw_plots(RUN, rows)
    assert first == second
    assert "best other 4-bit" not in first["speedup.svg"]
    assert "best other 4-bit" in draw_plots(RUN, timed)["speedup.svg"]
    for label in ("1", "4", "16", "1024"):
        assert f">{label}</text>" in first["speedup.svg"], "tokens are labelled as people write them"
    assert draw_plots(RUN, []) == {}


def test_without_matplotlib_there_are_no_plots(
    recorded: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = recorded
    monkeypatch.setattr(plots, "has_plots", lambda: False)
    write_report(folder, RUN, rows)
    assert {path.name for path in folder.iterdir()} == {"bench.jsonl", "bench.csv", "report.html"}


def test_bench_records_as_it_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "tensor_peak", lambda _library, _device: PEAK)
    errors = {KERNEL: 0.25}

    def compare(_library: object, problem: Problem, mode: QuantMode, **_: object) -> Comparison:
        if problem.m == 3:
            raise KeyboardInterrupt
        if problem.m == 5:
            return Comparison(problem, mode, {}, 0, [])
        found = compared(problem, 10.0, floor=5.0, cublas=8.0)
        return Comparison(problem, mode, found.screened, 2, found.timings, dict(errors))

    monkeypatch.setattr(bench, "compare", compare)
    told: list[str] = []

    def run(*problems: Problem) -> bench.Bench:
        return bench.run_bench(
            FakeLibrary([]),
            [("qkv", problem) for problem in problems],
            MODE,
            bench.BenchOptions(slack=0.03),
            version="0.1.0",
            report=tmp_path,
            tell=told.append,
            show_progress=lambda _title: nullcontext(no_progress),
        )

    done = run(Problem(1, 4096, 4096, 128), Problem(2, 4096, 4096, 64), Problem(5, 64, 64, 32))
    assert (done.wrong, done.smallest_set, done.cublas_timed) == ({}, [KERNEL], True)
    assert any("dense FP16 is faster here: 8.00 us" in sentence for sentence in told)
    assert any("no built kernel of mode fgs can run it" in sentence for sentence in told)
    assert [row.group_size for row in read_record(tmp_path)[1]] == [128, 64]
    with pytest.raises(KeyboardInterrupt):
        run(Problem(4, 4096, 4096, 128), Problem(3, 4096, 4096, 128))
    assert [row.m for row in read_record(tmp_path)[1]] == [4], "earlier measurements are kept"
    errors[KERNEL] = 1.5
    off = run(Problem(4, 4096, 4096, 128))
    assert off.wrong == {KERNEL: 1.5}
    assert off.as_json()["wrong"] == {KERNEL: 1.5}
    assert "is wrong: its error is 1.5 times the bound" in told[-2]


def test_bench_lets_rivals_compile_for_all_problems_first(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(m, 4096, 4096, 128) for m in (1, 2)]
    order: list[object] = []

    def compile_ahead(given: Sequence[Problem], mode: QuantMode, rivals: object, device: int, **_: object) -> int:
        order.append((list(given), mode, rivals, device))
        return len(given)

    def compare(_library: object, problem: Problem, *_: object, **__: object) -> Comparison:
        order.append(problem)
        return compared(problem, 10.0)

    monkeypatch.setattr(bench, "compile_ahead", compile_ahead)
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "tensor_peak", lambda _library, _device: PEAK)
    monkeypatch.setattr(FakeLibrary, "hopper_device", lambda _: replace(H100, index=2))
    bench.run_bench(
        FakeLibrary([]),
        [("qkv", problem) for problem in problems],
        MODE,
        bench.BenchOptions(rivals=RIVALS),
        version="0.1.0",
        report=None,
        tell=lambda _sentence: None,
        show_progress=lambda _title: nullcontext(no_progress),
    )
    assert order == [(problems, MODE, RIVALS, 2), *problems]


def test_bench_takes_the_gpus_of_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began: dict[int, int] = {}
    all_began = threading.Barrier(2)

    def compare(library: FakeLibrary, problem: Problem, *_: object, **options: object) -> Comparison:
        assert options == {"configs": [], "finalists": 4, "rounds": 9, "rivals": [RIVALS[0]]}
        began[problem.m] = library.devices()[0].sm_count
        if problem.m <= 2:
            all_began.wait(10)  # one on each GPU
        return compared(problem, 10.0, floor=5.0, cublas=8.0)

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "compile_ahead", pytest.fail)  # this machine may have no GPU
    monkeypatch.setattr(bench, "tensor_peak", lambda _library, _device: PEAK)
    cards = [replace(H100, sm_count=count) for count in (1, 2)]
    places = [InProcess(f"node {card.sm_count}", Context(Gpu(FakeLibrary([], devices=[card]), 0))) for card in cards]
    steps: list[tuple[int, int]] = []
    done = bench.run_bench(
        FakeLibrary([], devices=[]),
        [("qkv", Problem(m, 4096, 4096, 128)) for m in (1, 2, 3, 4)],
        MODE,
        bench.BenchOptions(rivals=RIVALS[:1]),
        version="0.1.0",
        report=tmp_path,
        tell=lambda _sentence: None,
        show_progress=lambda *_: nullcontext(lambda done, total, _what: steps.append((done, total))),
        cards=Cards(H100, "CUDA 13.0", Executor(places)),
    )
    assert set(began.values()) == {1, 2}
    assert [row.m for row in done.rows] == [1, 2, 3, 4], "in the order of the problems"
    assert {row.m for row in read_record(tmp_path)[1]} == {1, 2, 3, 4}
    assert (done.gpu, done.peak) == (H100, PEAK)
    assert steps == [(number, 4) for number in range(1, 5)]


def test_bench_shows_the_fastest_of_each_target() -> None:
    cutlass = "w4a16_sm90_cutlass_fgs_cta128x128x64_cluster2x1x1_cooperative_streamk"
    problem = Problem(16, 4096, 4096, 128)
    found = compared(problem, 10.0)
    both = replace(found, timings=[*found.timings, Timing(cutlass, [15.0])])
    row = row_of("", both, None)
    assert "fastest cutlass kernel: 15.00 us" in bench.sentences("", row, both)[1]
    assert len(bench.sentences("", row, found)) == 1
