"""Tables and sentences on terminals of 80 and 120 columns: nothing that identifies a row is cut, no word is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.terminal import lines_of, run_on_terminal

from w4a16gen.cli.tables import Column, lay_out
from w4a16gen.kernels.spaces import enumerate_space

COLUMNS = (
    Column("problem", keep=True),
    Column("kernel", keep=True, own_line=True),
    Column("us", right=True, keep=True),
    Column("GB/s", right=True),
    Column("note"),
)
ROWS = [("1x4096", "native_cs_cta64x8x128", "5.1", "1480", "slow [red]"), ("16x28672", "native_cs", "10.25", "99", "")]


def test_a_table_that_fits_has_every_column() -> None:
    layout = lay_out(COLUMNS, ROWS, 80)
    assert layout.hidden == []
    assert layout.lines == [
        "problem   kernel                    us  GB/s  note",
        "--------  ---------------------  -----  ----  ----------",
        "1x4096    native_cs_cta64x8x128    5.1  1480  slow [red]",
        "16x28672  native_cs              10.25    99",
    ]


def test_unimportant_columns_are_left_out_from_the_right() -> None:
    assert lay_out(COLUMNS, ROWS, 55).hidden == ["note"]
    narrow = lay_out(COLUMNS, ROWS, 38)
    assert narrow.hidden == ["GB/s", "note"]
    assert narrow.lines[2] == "1x4096    native_cs_cta64x8x128    5.1"


def test_what_is_kept_moves_to_a_line_of_its_own_before_it_is_cut() -> None:
    layout = lay_out(COLUMNS, ROWS, 37)
    assert layout.lines == [
        "problem      us  GB/s  note",
        "--------  -----  ----  ----------",
        "1x4096      5.1  1480  slow [red]",
        "  native_cs_cta64x8x128",
        "16x28672  10.25    99",
        "  native_cs",
    ]
    assert layout.hidden == []
    tiny = lay_out(COLUMNS, ROWS, 5)
    assert tiny.lines[0] == "problem      us"
    assert "  native_cs_cta64x8x128" in tiny.lines


def test_columns_without_content_take_no_place() -> None:
    rows = [(problem, kernel, us, "", "") for problem, kernel, us, *_ in ROWS]
    assert lay_out(COLUMNS, rows, None).lines[0] == "problem   kernel                    us"
    assert lay_out(COLUMNS, [], None).lines[0] == "problem  kernel  us  GB/s  note"


def test_without_a_width_nothing_is_left_out() -> None:
    assert lay_out(COLUMNS, ROWS, None).lines == lay_out(COLUMNS, ROWS, 80).lines


NO_COMPILER = {"CXX": "no-such-compiler"}
"""Keeps `doctor` from compiling anything."""
COUNT = len(enumerate_space("default"))
NAMES = {config.name for config in enumerate_space("default")} | {c.short_name for c in enumerate_space("default")}
COMMANDS = [
    "list",
    "list --mode fgs",
    "list --space all",
    "list --explain",
    "explain 16 4096 4096",
    "list --cta 96x8x8",
]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", COMMANDS)
def test_no_line_is_longer_than_the_terminal_and_no_word_is_broken(
    arguments: str, columns: int, tmp_path: Path
) -> None:
    code, received = run_on_terminal(["-m", "w4a16gen", *arguments.split()], columns, tmp_path)
    lines = lines_of(received)
    assert code == (2 if "96x8x8" in arguments else 0)
    assert max(map(len, lines)) <= columns
    piped = {word for line in lines for word in line.split()}
    words = {word for word in piped if "_cta" in word and "{" not in word}
    assert words <= NAMES | {word for word in words if word.startswith("w4a16_sm90_cutlass")}


def test_list_shows_names_to_copy(tmp_path: Path) -> None:
    _, received = run_on_terminal(["-m", "w4a16gen", "list", "--mode", "fgs"], 80, tmp_path)
    names = [config.name for config in enumerate_space("default") if str(config.mode) == "fgs"]
    assert lines_of(received)[: len(names)] == names


def test_many_kernels_are_summed_up_and_wide_shows_them(tmp_path: Path) -> None:
    _, received = run_on_terminal(["-m", "w4a16gen", "list"], 80, tmp_path)
    lines = lines_of(received)
    shapes = {config.shape_name for config in enumerate_space("default")}
    assert lines[0] == f"{COUNT} kernels of {len(shapes)} shapes"
    assert len(shapes) < len(lines) < len(shapes) + 10
    _, wide = run_on_terminal(["-m", "w4a16gen", "list", "--wide"], 80, tmp_path)
    assert all(config.name in wide for config in enumerate_space("default"))


@pytest.mark.parametrize("columns", [80, 120])
def test_the_paths_of_doctor_can_be_copied(columns: int, tmp_path: Path) -> None:
    folder = tmp_path / ("a_folder_with_a_long_name_" * 5)
    folder.mkdir()
    arguments = ["-m", "w4a16gen", "doctor", "--build-dir", str(folder)]
    _, received = run_on_terminal(arguments, columns, tmp_path, NO_COMPILER)
    assert str(folder) in lines_of(received)[lines_of(received).index("ok       build folder:") + 1]


def test_colours_can_be_turned_off(tmp_path: Path) -> None:
    _, colored = run_on_terminal(["-m", "w4a16gen", "doctor"], 80, tmp_path, NO_COMPILER)
    assert "\x1b[" in colored
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        _, plain = run_on_terminal(["-m", "w4a16gen", "doctor"], 80, tmp_path, NO_COMPILER | variables)
        assert "\x1b[" not in plain


PROGRAM = """
import sys, time
from fakes.library import build_of
from w4a16gen.build.pipeline import BuildReport
from w4a16gen.cli import main
from w4a16gen.cli.services import Services

def build(configs, *, progress, **_):
    steps = len(configs) + 1
    progress(0, steps, "compiling")
    for done, config in enumerate(configs, 1):
        progress(done, steps, config.short_name)
        time.sleep(0.008)
    progress(len(configs), steps, "linking")
    time.sleep(0.3)
    return BuildReport(build_of(configs), len(configs), ())

sys.argv[0] = "w4a16gen"
main.main(["build", *sys.argv[1:]], obj=Services(build=build))
"""


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_progress_keeps_bar_count_and_clock(columns: int, tmp_path: Path) -> None:
    code, received = run_on_terminal(["-c", PROGRAM], columns, tmp_path)
    assert code == 0
    frames = [line for line in lines_of(received) if f"/{COUNT + 1} " in line]
    assert frames
    for frame in frames:
        assert len(frame) <= columns
        bar, count, clock, *_ = frame.split()
        assert len(bar) == 20
        assert count.endswith(f"/{COUNT + 1}")
        assert clock.startswith("0:")
    if columns == 120:
        assert f" {COUNT}/{COUNT + 1} " in frames[-1]
        assert frames[-1].endswith("linking")
        assert any(config.short_name in "".join(frames) for config in enumerate_space("default"))
    assert f"{COUNT} kernels compiled, 0 up to date" in received


def test_progress_on_a_dumb_terminal_or_in_a_file_is_a_line_for_each_tenth(tmp_path: Path) -> None:
    code, received = run_on_terminal(["-c", PROGRAM], 80, tmp_path, {"TERM": "dumb"})
    assert code == 0
    assert "\x1b[" not in received
    lines = [line for line in lines_of(received) if f" of {COUNT + 1}" in line]
    assert 9 <= len(lines) <= 10
    assert lines[0] == f"Building {COUNT} kernels: step {-(-(COUNT + 1) // 10)} of {COUNT + 1}"


BAR = """
from w4a16gen.cli.output import note
from w4a16gen.cli.progress import show_progress
with show_progress("Measuring") as progress:
    progress(1, 2, "a kernel")
    note("a sentence")
    progress(2, 2, "a kernel")
"""


def test_a_sentence_has_a_line_of_its_own_above_a_bar(tmp_path: Path) -> None:
    code, received = run_on_terminal(["-c", BAR], 80, tmp_path)
    assert code == 0
    assert "a sentence" in [line.strip() for line in lines_of(received)]
