"""The JSON of every command: its schema, its members and their types, as docs/reference/json.md describes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fakes.devices import H100
from fakes.library import FakeLibrary, build_of
from fakes.runner import Runner
from json_shapes import GPU, KERNEL, SCHEMAS, check
from paths import ROOT

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.build.diagnose import Finding as Check
from w4a16gen.build.lock import LOCK
from w4a16gen.build.objects import Failure
from w4a16gen.build.pipeline import BuildReport
from w4a16gen.cli.app import COMMANDS
from w4a16gen.cli.output import SCHEMA_VERSIONS, result
from w4a16gen.cli.services import Services
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.bench import Bench
from w4a16gen.measure.probes import TensorPeak
from w4a16gen.measure.record import Recorder, row_of, run_of
from w4a16gen.measure.results import FLOOR, Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS
from w4a16gen.measure.single import Outcome
from w4a16gen.verify.report import Report

PAGE = (ROOT / "docs" / "reference" / "json.md").read_text()
KERNELS = [config for config in enumerate_space("default") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY]


def checked(command: str, done: Result) -> dict[str, Any]:
    """Return the object that a command printed, after checking its schema, members and types."""
    value: dict[str, Any] = json.loads(done.stdout)
    assert value.pop("schema") == f"w4a16gen.{command}/{SCHEMA_VERSIONS[command]}"
    check(value, SCHEMAS[command], command)
    return value


def comparison(error: float = 0.25, kernels: Sequence[KernelConfig] = KERNELS[:2]) -> Comparison:
    timings = [Timing(config.name, [10.0 + place, 11.0], [9.0]) for place, config in enumerate(kernels)]
    timings += [Timing(CUBLAS, [30.0]), Timing(FLOOR, [5.0], [4.0])]
    screened = {config.name: 10.0 for config in kernels}
    name = kernels[0].name
    return Comparison(Problem(16, 4096, 4096, 128), KERNELS[0].mode, screened, 2, timings, {name: error}, name)


def measured(error: float = 0.25) -> Bench:
    peak = TensorPeak(860.0, 800.0)
    found = comparison(error)
    return Bench(H100, run_of(H100, "2026-11-28", "0.1.0", peak), peak, [found], [row_of("", found, peak)], [])


def built(failures: Sequence[Failure] = ()) -> BuildReport:
    return BuildReport(build_of(KERNELS), 3, failures)


def proven(*violations: str) -> Report:
    static = {"ok": not violations, "violations": list(violations), "kernels": [proof(config) for config in KERNELS]}
    numerics = {"status": "not run", "reason": "no GPU", "kernels": []}
    return Report({"date": "2026-11-28", "compiler": "c", "cutlass": "4", "static": static, "numerics": numerics})


def proof(config: KernelConfig) -> dict[str, Any]:
    numbers = ("registers", "stages", "shared_memory_bytes", "code_bytes", "compile_peak_bytes")
    return config.as_json() | dict.fromkeys(numbers, 1) | {"compile_cpu_seconds": 0.5}


def always(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_options: value


@pytest.fixture
def own(cli: Runner, tmp_path: Path) -> Runner:
    """Return a runner with stand-ins for compilers, a build and a GPU."""
    (tmp_path / "build").mkdir()
    library = FakeLibrary(KERNELS, folder=tmp_path / "build")
    cli.services = Services(
        load=always(library),
        find_driver=always(None),
        diagnose=always([Check("nvcc", ok=True, detail="/usr/bin/nvcc")]),
        build=always(built()),
        verify=always(proven()),
        run_one=always(Outcome(H100, 64, 16, 0.5, [10.0, 11.0, 12.0], 20)),
        bench=always(measured()),
    )
    for config in KERNELS:
        (tmp_path / "generated").mkdir(exist_ok=True)
        (tmp_path / "generated" / f"{config.name}.cu").touch()
    return cli


def test_every_command_has_a_schema_a_version_and_a_section() -> None:
    assert SCHEMAS.keys() == SCHEMA_VERSIONS.keys()
    assert COMMANDS.keys() | {"error"} == SCHEMAS.keys()
    for command, shape in SCHEMAS.items():
        (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
        assert f"`w4a16gen.{command}/{SCHEMA_VERSIONS[command]}`" in section
        for member in shape:
            assert re.search(rf"`{member}[`.]", section), f"{command}.{member} is not described"


def test_the_page_describes_no_member_that_is_not_there() -> None:
    for command, shape in SCHEMAS.items():
        (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## |^An? [\w ]+:$|\Z)", PAGE, re.DOTALL | re.MULTILINE)
        for row in re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE):
            for member in re.findall(r"`([\w-]+)", row):
                assert member in {*shape, "schema"}, f"{command}.{member}"


def test_list(own: Runner) -> None:
    found = checked("list", own.run("list --json --mode fgs"))
    assert [kernel["name"] for kernel in found["kernels"]] == [config.name for config in KERNELS]
    assert (found["built"], found["spaces"]) == (False, ["default"])
    assert checked("list", own.run("list --json --built"))["built"] is True


def test_list_explain(own: Runner) -> None:
    done = own.run("list --json --explain --space trtllm --cta 128x128x64 --mode fgs")
    found = json.loads(done.stdout)
    check(found["kernels"], [KERNEL | {"kind": str, "reason": str}], "kernels")
    assert {kernel["kind"] for kernel in found["kernels"]} == {"left out"}


def test_emit(own: Runner) -> None:
    first = checked("emit", own.run("emit --json --cta 128x256x64 --cluster 2x1x1 --output out"))
    assert first["spaces"] == ["trtllm-native"]
    assert [file["written"] for file in first["files"]] == [True] * 3
    again = checked("emit", own.run("emit --json --mode cs --output out --remove-stale"))
    assert len(again["removed"]) == 3
    for_trtllm = checked("emit", own.run("emit --json --target trtllm --output other"))
    assert [len(file["kernels"]) for file in for_trtllm["files"]] == [7] * 9


def test_build(own: Runner) -> None:
    found = checked("build", own.run("build --json"))
    assert (found["compiled"], found["up_to_date"]) == (3, len(KERNELS) - 3)
    own.services = Services(build=always(built([Failure(KERNELS[0].name, Path("a.log"), "no")])))
    failed = own.run("build --json")
    assert failed.exit_code == 1
    assert checked("build", failed)["failures"] == [{"kernel": KERNELS[0].name, "summary": "no", "log": "a.log"}]
    assert "1 kernel failed to compile" in failed.stderr


def test_verify(own: Runner, tmp_path: Path) -> None:
    found = checked("verify", own.run("verify --json --generated-dir generated --report proof"))
    written = json.loads((tmp_path / "proof.json").read_text())
    assert written == {"schema": "w4a16gen.verify/1", **found}
    assert (tmp_path / "proof.md").is_file()
    own.services = Services(load=own.services.load, verify=always(proven("a kernel spills")))
    failed = own.run("verify --json --generated-dir generated")
    assert failed.exit_code == 1
    assert checked("verify", failed)["static"]["violations"] == ["a kernel spills"]
    own.services = Services(load=own.services.load, verify=always(proven()))
    without = own.run("verify --json --generated-dir generated --require-gpu")
    assert without.exit_code == 3
    checked("verify", without)


def test_build_and_verify(own: Runner) -> None:
    found = checked("build-and-verify", own.run("build-and-verify --json"))
    assert "schema" not in found["verify"]


def test_run(own: Runner) -> None:
    found = checked("run", own.run("run --json 16 4096 4096"))
    assert (found["microseconds"], found["replays_microseconds"]) == (11.0, [10.0, 11.0, 12.0])
    named = own.run(f"run --json 16 4096 4096 --config {KERNELS[-1].short_name}")
    assert checked("run", named)["kernel"] == KERNELS[-1].name
    wrong = Outcome(H100, 64, 16, float("inf"), [10.0], 20)
    own.services = Services(load=own.services.load, run_one=always(wrong))
    done = own.run("run --json 16 4096 4096")
    assert done.exit_code == 1
    found = checked("run", done)
    assert (found["ok"], found["error_over_bound"]) == (False, None), "infinity is no JSON"


def test_bench(own: Runner) -> None:
    done = own.run("bench --json --problem 16x4096x4096 --report out")
    assert done.exit_code == 0, done.output
    assert {Path(path).name for path in checked("bench", done)["written"]} >= {"bench.csv", "report.html"}


@pytest.mark.parametrize("json_option", ["", "--json"])
def test_bench_does_not_succeed_with_wrong_results(own: Runner, json_option: str) -> None:
    own.services = Services(load=own.services.load, bench=always(measured(error=1.5)))
    done = own.run(f"bench --problem 16x4096x4096 {json_option}")
    assert done.exit_code == 1
    assert f"error: wrong results: {KERNELS[0].name}" in done.stderr
    assert not json_option or checked("bench", done)["wrong"] == {KERNELS[0].name: 1.5}


def test_report(own: Runner, tmp_path: Path) -> None:
    bench = measured()
    Recorder(tmp_path / "out", bench.run).add(bench.rows[0], bench.comparisons[0])
    found = checked("report", own.run("report --json out"))
    assert found["problems"] == 1
    assert all(Path(path).is_file() for path in found["written"])


def test_tune(own: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16gen.measure.tune.measure", lambda *which, **_: ((config, 7.0) for config in which[3]))
    done = own.run("tune --json --problem 16x4096x4096")
    assert done.exit_code == 0, done.output
    found = checked("tune", done)
    assert found["problems"][0]["microseconds"] == 7.0
    assert Path(found["table"]).is_file()


def test_explain(own: Runner) -> None:
    found = checked("explain", own.run("explain --json 16 4096 4096"))
    assert found["built"] is True
    assert found["kernels"][0]["kernel"] == found["kernel"]
    check(found["gpu"], GPU, "gpu")


def test_audit(own: Runner, tmp_path: Path) -> None:
    emit_trtllm(enumerate_space("trtllm"), tmp_path / "sources")
    done = own.run("audit --json sources --extract out")
    assert done.exit_code == 0, done.output
    assert len(checked("audit", done)["extracted"]) == 9


def test_doctor(own: Runner) -> None:
    found = checked("doctor", own.run("doctor --json"))
    assert {finding["level"] for finding in found["findings"]} <= {"ok", "note", "missing"}


def test_completion(own: Runner) -> None:
    assert "_W4A16GEN_COMPLETE=bash_complete" in checked("completion", own.run("completion bash --json"))["script"]


def test_clean(own: Runner, tmp_path: Path) -> None:
    assert checked("clean", own.run("clean --json")) == {"folder": "build", "removed": []}
    (tmp_path / "build" / "objects").mkdir()
    (tmp_path / "build" / LOCK).touch()
    mine = tmp_path / "build" / "mine"
    mine.touch()
    found = checked("clean", own.run("clean --json"))
    assert found["removed"] == ["build/objects"]
    assert mine.is_file()


def test_errors(own: Runner) -> None:
    checked("error", own.run("list --json --cta 1x2"))


def test_export(own: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16gen.runtime.artifact.load_build", lambda _folder: build_of(KERNELS))
    monkeypatch.setattr("w4a16gen.build.export.export_wheel", lambda _build, folder, _version: folder / "a.whl")
    done = own.run("export --json --wheel")
    assert done.exit_code == 0, done.output
    assert checked("export", done) == {"kernels": len(KERNELS), "written": ["dist/a.whl"]}


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"schema": "other", "a": [float("nan"), {"b": float("inf")}, (1.5, -float("inf"))]}
    assert result("error", value) == {"schema": "w4a16gen.error/1", "a": [None, {"b": None}, [1.5, None]]}
