"""Facts of the manual that follow from the code or from recorded measurements: commands, spaces, variables, figures."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean

import pytest
from fakes.runner import Runner
from paths import ROOT

from docs.pages import PAGES, blocks_of
from w4a16gen import errors
from w4a16gen.cli import main
from w4a16gen.kernels.spaces import SPACES, enumerate_space

DOCS = ROOT / "docs"
BURST_TFLOPS = 859.5
"""The tensor cores' burst peak that was measured beside the times of the CSV file."""


def commands() -> list[str]:
    """Return the commands that the manual's shell blocks and its inline code use."""
    inline = [name for page in PAGES for name in re.findall(r"`w4a16gen ([a-z-]+)", page.read_text())]
    shell = [block.text for page in PAGES for block in blocks_of(page) if block.language == "bash"]
    return sorted({*inline, *(name for text in shell for name in re.findall(r"\bw4a16gen ([a-z][a-z-]*)", text))})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_manual_exists(cli: Runner, command: str) -> None:
    assert cli.invoke(main, [command, "--help"]).exit_code == 0


def test_the_reference_describes_every_command() -> None:
    text = (DOCS / "reference" / "cli.md").read_text()
    assert [name for name in main.commands if not re.search(rf"^#+ .*\b{name}\b", text, re.MULTILINE)] == []


def test_spaces_have_the_sizes_that_the_guide_gives() -> None:
    text = (DOCS / "guides" / "building.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| ([\d,]+) \|", text, re.MULTILINE)
    sizes = {name: int(size.replace(",", "")) for name, size in rows}
    assert sizes == {name: len(enumerate_space(name)) for name in SPACES}


INTERNAL_VARIABLES = {"W4A16GEN_SCRATCH"}
"""Variables that the program sets for its own children."""


def test_every_environment_variable_is_described() -> None:
    described = set(re.findall(r"`(W4A16GEN_\w+)`", (DOCS / "reference" / "environment.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "w4a16gen").rglob("*.py"))
    assert described | INTERNAL_VARIABLES == set(re.findall(r"\bW4A16GEN_[A-Z]+(?:_[A-Z]+)*", sources))


def test_exit_codes_are_those_of_the_errors() -> None:
    text = (DOCS / "reference" / "exit-codes.md").read_text()
    described = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {value.exit_code for value in classes if issubclass(value, errors.W4A16Error)} <= described
    assert {0, 130} <= described


def measured() -> Iterator[tuple[int, float, float]]:
    """Yield tokens, speed-up over cuBLAS and share of the floor of every recorded problem."""
    for row in csv.DictReader((DOCS / "assets" / "h100-2026-11-26.csv").read_text().splitlines()):
        m, n, k = (int(row[name]) for name in "mnk")
        floor = max(float(row["floor_us"]), 2 * m * n * k / BURST_TFLOPS / 1e6)
        yield m, float(row["cublas_us"]) / float(row["us"]), floor / float(row["us"])


def figures(page: Path, tokens: str) -> list[float]:
    """Return the speed-up and the share of the floor that a page shows for a token count."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    if page.name == "README.md":
        column = next(line.index(tokens) for line in lines if line[0] == "tokens" and tokens in line)
        return [float(line[column]) for line in lines if re.match(r"speed-up over|share of the", line[0])]
    row = next(line for line in lines if line[0].split(",")[0] == tokens and "(" in line[1])
    return [float(row[1].split(" ")[0]), float(row[2])]


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "performance.md"], ids=lambda page: page.name)
@pytest.mark.parametrize("tokens", ["1", "16", "32", "64", "128", "256", "512 to 8192"])
def test_speed_ups_follow_from_the_recorded_times(page: Path, tokens: str) -> None:
    counts = [int(count) for count in tokens.split(" to ")]
    rows = [(speed_up, share) for m, speed_up, share in measured() if counts[0] <= m <= counts[-1]]
    shown = figures(page, tokens)
    for number, values in enumerate(zip(*rows, strict=True)):
        assert shown[number] == pytest.approx(geometric_mean(values), abs=0.051 if number == 0 else 0.0051)


def random_cells() -> list[dict[str, str]]:
    """Return the recorded cells of random layers."""
    return list(csv.DictReader((DOCS / "assets" / "h200-2026-12-01-random.csv").read_text().splitlines()))


def ratios_between(cells: list[dict[str, str]], rival: str, first: str, last: str) -> list[float]:
    """Return the rival's time over that of the call beside it, in cells from a first to a last number of tokens."""
    low, high = (int(number.replace(",", "")) for number in (first, last))
    call = "call_us" if rival == "cublas_us" else "call_beside_rivals_us"
    timed = [cell for cell in cells if cell[rival] and low <= int(cell["m"]) <= high]
    return [float(cell[rival]) / float(cell[call]) for cell in timed]


def check_ratios(ratios: list[float], problems: str, mean: str, least: str, slower: str) -> None:
    """Compare figures of a table with the ratios that they sum up."""
    assert len(ratios) == int(problems)
    assert float(mean) == pytest.approx(geometric_mean(ratios), abs=0.0051)
    assert float(least) == pytest.approx(min(ratios), abs=0.0051)
    assert int(slower) == sum(ratio < 1 for ratio in ratios)


def test_figures_of_other_kernels_follow_from_the_recorded_times() -> None:
    number, counts = r"([\d.]+)", r"(\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+)"
    performance = re.findall(
        rf"^\| ([\d,]+) to ([\d,]+) \| {counts} \| {counts} \|$", (DOCS / "performance.md").read_text(), re.MULTILINE
    )
    readme = re.findall(
        rf"^\| [\d,]+ to [\d,]+ \| {counts} \| {number} \| {number} \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(performance) == len(readme) == 3
    for (first, last, *figures_shown), shown in zip(performance, readme, strict=True):
        check_ratios(ratios_between(random_cells(), "humming_us", first, last), *figures_shown[:4])
        check_ratios(ratios_between(random_cells(), "quack_bf16_us", first, last), *figures_shown[4:])
        assert list(shown[4:]) == [figures_shown[1], figures_shown[5]]


def test_sentences_on_random_layers_follow_from_the_recorded_times() -> None:
    cells = [cell for cell in random_cells() if cell["shapes"] == "79"]
    few, more, many = (
        geometric_mean(ratios_between(cells, "cublas_us", *band))
        for band in (("1", "64"), ("65", "256"), ("257", "8,192"))
    )
    index = " ".join((DOCS / "index.md").read_text().split())
    assert f"{few:.2f} times as fast as cuBLAS FP16 up to 64 tokens, {more:.2f} times up to 256 and {many:.2f}" in index
    limits = " ".join((DOCS / "limits.md").read_text().split())
    above = ratios_between(cells, "cublas_us", "257", "8,192")
    assert f"{many:.2f} times as fast as cuBLAS FP16 on average ({len(above)} random problems" in limits
    names = {0: "none", 4: "four"}
    slower, clearly = (names[sum(ratio < most for ratio in above)] for most in (1, 1 / 1.05))
    worst = f"{100 / min(above) - 100:.0f} % in the worst"
    counts = f"slower in {slower} of {len(above)} random problems, by more than 5 % in {clearly}"
    assert f"{counts}, and by {worst}" in limits


@pytest.mark.parametrize(
    ("page", "rows"),
    [(ROOT / "README.md", 3), (DOCS / "performance.md", 4)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_figures_of_random_layers_follow_from_the_recorded_times(page: Path, rows: int) -> None:
    cells = [cell for cell in random_cells() if cell["shapes"] == "79"]
    begin = r"^\| ([\d,]+) to ([\d,]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+)"
    shown = re.findall(rf"{begin} \| (?:\d+|[\d.]+) \| [\d.]+ \|$", page.read_text(), re.MULTILINE)
    assert len(shown) == rows
    for first, last, problems, mean, least, slower in shown:
        check_ratios(ratios_between(cells, "cublas_us", first, last), problems, mean, least, slower)


FOREIGN_MESSAGES = ("Killed", "unspecified launch failure")
"""Messages on the page that other programs print."""


def messages() -> list[str]:
    """Return the messages that the page on troubles names in the first column of its tables."""
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    found = [re.match(r"`([^`]+)`", row) for row in rows]
    return [match[1] for match in found if match and " " in match[1] and match[1] not in FOREIGN_MESSAGES]


@pytest.fixture(scope="module")
def sources() -> str:
    """All text of the package, parts of one message joined, and what is filled in replaced by `...`."""
    paths = [path for ending in ("py", "h", "cpp") for path in (ROOT / "w4a16gen").rglob(f"*.{ending}")]
    text = re.sub(r'"\s+f?r?"', "", "\n".join(path.read_text() for path in paths))
    return re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "...", text)


@pytest.mark.parametrize("message", messages())
def test_the_messages_on_the_page_of_troubles_are_printed(message: str, sources: str) -> None:
    assert re.search(".*".join(re.escape(part.strip()) for part in message.split("...")), sources), message
