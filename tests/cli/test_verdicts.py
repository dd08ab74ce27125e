"""Exit codes of commands that judge: wrong results are never a success."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from fakes.devices import A100
from fakes.library import FakeLibrary, record
from fakes.module import Launched
from fakes.runner import Runner

from w4a16gen import KernelConfig
from w4a16gen.build.emit import emit
from w4a16gen.cli.services import Services
from w4a16gen.measure import stage
from w4a16gen.verify import static
from w4a16gen.verify.static import KernelCode

KERNEL = KernelConfig.parse("w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent")
CODE = KernelCode(80, 0, Counter(HMMA=8, UTMALDG=3, UBLKCP=2))


def off_by_a_tenth(launched: Launched) -> None:
    launched.out[...] = launched.reference() * 1.1


def serve(cli: Runner, library: FakeLibrary) -> None:
    cli.services = Services(load=lambda _folder: library)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Emit the kernel's source, and give it right machine code; return the option that names its folder."""
    emit([KERNEL], tmp_path / "generated")
    monkeypatch.setattr(static, "read_code", lambda _library: {KERNEL.name: CODE})
    return f"--generated-dir {tmp_path / 'generated'}"


def test_run_fails_where_the_result_is_wrong(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "COLD_BYTES", 10_000)  # few copies of the weight
    serve(cli, FakeLibrary([KERNEL]))
    right = cli.run("run 3 64 128 --mode cs --json")
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["error_over_bound"] <= 1
    for compute in (off_by_a_tenth, record):
        serve(cli, FakeLibrary([KERNEL], compute=compute))
        for form in ("", " --json"):
            wrong = cli.run(f"run 3 64 128 --mode cs{form}")
            assert wrong.exit_code == 1
            assert "is wrong: " in wrong.stderr


def test_verify_fails_where_a_numerical_proof_fails(cli: Runner, sources: str) -> None:
    serve(cli, FakeLibrary([KERNEL]))
    right = cli.run(f"verify --sample --json {sources}")
    assert right.exit_code == 0, right.output
    assert json.loads(right.stdout)["numerics"]["status"] == "passed"
    serve(cli, FakeLibrary([KERNEL], compute=off_by_a_tenth))
    for form in ("", " --json"):
        wrong = cli.run(f"verify --sample{form} {sources}")
        assert wrong.exit_code == 1
        assert "times the bound" in wrong.output
    assert json.loads(wrong.stdout)["numerics"]["status"] == "failed"


def test_verify_says_where_sources_are_missing(cli: Runner) -> None:
    serve(cli, FakeLibrary([KERNEL]))
    wrong = cli.run("verify --generated-dir nowhere")
    assert wrong.exit_code == 2
    assert "nowhere has no sources of the kernels: pass --generated-dir" in " ".join(wrong.stderr.split())


def test_verify_fails_where_a_static_proof_fails(cli: Runner, sources: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(cli, FakeLibrary([KERNEL], devices=[]))
    assert cli.run(f"verify {sources}").exit_code == 0
    monkeypatch.setattr(static, "read_code", lambda _library: {})
    wrong = cli.run(f"verify {sources}")
    assert wrong.exit_code == 1
    assert "not in the machine code" in " ".join(wrong.output.split())


def test_numerics_that_did_not_run_are_no_success_where_they_are_required(cli: Runner, sources: str) -> None:
    for devices in ([], [A100]):
        serve(cli, FakeLibrary([KERNEL], devices=devices))
        assert cli.run(f"verify {sources}").exit_code == 0
        required = cli.run(f"verify --require-gpu {sources}")
        assert required.exit_code == 3
        assert json.loads(cli.run(f"verify --json {sources}").stdout)["numerics"]["status"] == "not run"
