"""The audit of generated sources: its counts, its verdict, and its command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from audited import BF16, audit_texts, write_whole
from fakes.generator import GOLDEN, INCLUDE, filtered, generated
from fakes.runner import Runner

from w4a16gen import QuantMode
from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.known import W4A16


@pytest.mark.parametrize("mixed_input", [False, True])
def test_the_audit_finds_63_of_378(tmp_path: Path, mixed_input: bool) -> None:
    found = audit(generated(tmp_path / "all", mixed_input=mixed_input))
    assert (len(found.files), found.total, len(found.kernels)) == (48, 378, 63)
    assert (found.missing, found.duplicates, found.unknown, found.problems) == ([], [], [], [])
    assert found.foreign == {
        "FP8 x uint4": 126, "BF16 x uint4": 63, "FP16 x uint8": 63, "BF16 x uint8": 63
    }  # fmt: skip
    assert sum(file.is_mixed for file in found.files) == 4
    assert not found.ok


def test_the_audit_counts_what_a_filter_by_type_names_loses(tmp_path: Path) -> None:
    found = audit(filtered(generated(tmp_path / "some")))
    assert (len(found.files), found.total, len(found.kernels)) == (12, 96, 40)
    assert len(found.missing) == 23
    assert found.foreign == {"FP16 x uint8": 56}
    kept = {str(mode): sum(config.mode is mode for config in found.kernels) for mode in QuantMode}
    assert kept == {"cs": 11, "fgs": 21, "fgsz": 8}


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("tensorrt_llm::cutlass_extensions", "onnxruntime::llm::cutlass_extensions"),
        ("tensorrt_llm::cutlass_extensions", "::tensorrt_llm::_v1::cutlass_extensions"),
        (r"\bhalf\b", "__half"),
        (r"cute::Shape", "cute::tuple"),
        (r"cute::Int<(\d+)>", r"cute::C<\1>"),
        (r"cute::Int<(\d+)>", r"cute::_\1"),
        (r"cute::Int<(\d+)>", r"cute::Int<\1u>"),
        (r"cute::Int<64>", "cute::Int<0x40>"),
        (r"cute::|cutlass::", ""),
        (r"kernelLauncher<", "kernelLauncher /* of */ <\n"),
        (r">>", "> /**/ >"),
        (r"<|>", lambda match: match[0] + "\\\n"),
        (r"template void", 'template __attribute__((visibility("default"))) [[maybe_unused]] void'),
        (r"void sm90", "void tensorrt_llm::kernels::cutlass_kernels_oss::sm90"),
        (r"Pingpong,", "PingpongMixedInput,"),
        (r"\n", "\r\n"),
        (r"cute::Shape<([^;]*?)>\(", r"cute::Shape<\1>("),
    ],
)
def test_spellings_of_the_same_types_are_the_same_kernels(tmp_path: Path, pattern: str, replacement: str) -> None:
    texts = "\n".join(re.sub(pattern, replacement, line) for line in GOLDEN)
    found = audit_texts(tmp_path / "in", f"#ifndef EXCLUDE_SM_90\n{INCLUDE}namespace a::b {{\n{texts}\n}}\n#endif\n")
    assert found.ok, (found.unknown[:1], found.foreign, found.problems)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("Int<128>, cute::Int<16>", "Int<128>, cute::Int<24>"),
        ("Int<128>, cute::Int<16>", "Int<128>, cute::Int<8 + 8>"),
        ("EpilogueOpBias", "EpilogueOpDefault"),
        ("uint4b_t, half, half, half", "uint4b_t, half, half, float"),
        ("FINEGRAINED_SCALE_ONLY", "NONE"),
    ],
)
def test_unknown_instantiations_make_the_verdict_negative(tmp_path: Path, written: str, instead: str) -> None:
    folder = write_whole(tmp_path / "in")
    line = next(line for line in GOLDEN if "Int<128>, cute::Int<16>" in line and "FINEGRAINED_SCALE_ONLY" in line)
    assert written in line
    (folder / "extra.cu").write_text(f"\n{line.replace(written, instead)}\n")
    found = audit(folder)
    assert len(found.unknown) == 1
    assert found.unknown_places == ["extra.cu:2"]
    assert [*found.foreign, *found.missing, *found.duplicates, *found.problems, *found.conditional] == []
    assert not found.ok
    assert found.as_json()["ok"] is False


def test_every_other_finding_makes_the_verdict_negative_alone(tmp_path: Path) -> None:
    extras = {
        "foreign": f"{BF16}\n",
        "duplicates": f"{GOLDEN[0]}\n",
        "conditional": f"#ifdef SOMETHING_ELSE\n{BF16}\n#endif\n",
        "problems": "#if 1\n",
    }
    for name, text in extras.items():
        folder = write_whole(tmp_path / name)
        (folder / "extra.cu").write_text(text)
        found = audit(folder)
        assert [kind for kind in extras if getattr(found, kind)] == [name]
        assert not found.ok
    folder = write_whole(tmp_path / "missing")
    next(folder.glob("*.cu")).unlink()
    assert len(audit(folder).missing) == 7
    assert not audit(folder).ok


def test_audit_on_the_command_line(cli: Runner, tmp_path: Path) -> None:
    folder = filtered(generated(tmp_path / "some"))
    (folder / "odd.cu").write_text(f"{GOLDEN[0].replace('Int<16>', 'Int<48>')}\n#ifdef X\n{BF16}\n#endif\n#if 1\n")
    done = cli.invoke(args=["audit", str(folder), "--extract", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "odd.cu: line 5: this #if has no #endif" in " ".join(done.stderr.split())
    done = cli.invoke(args=["audit", str(folder)])
    assert done.exit_code == 1
    assert (
        "40 of 63 FP16 x uint4 kernels found; 23 missing, 0 duplicates, 1 unknown, 1 conditional; unrelated: "
        "56 FP16 x uint8; 1 problem"
    ) in " ".join(done.stderr.split())
    assert done.stdout.count("missing: w4a16_sm90_cutlass_") == 23
    for label in (
        "unknown FP16 x uint4 kernel: ",
        "unrelated: FP16 x uint8 at ",
        "conditional: ",
        "problem: odd.cu:5: ",
    ):
        assert sum(line.startswith(label) for line in done.stdout.splitlines()) == 1
    (folder / "odd.cu").unlink()
    found = json.loads(cli.invoke(args=["audit", str(folder), "--extract", "out", "--json"]).stdout)
    assert (found["instantiations"], len(found["present"]), len(found["missing"])) == (96, 40, 23)
    assert (found["ok"], len(found["extracted"])) == (False, 5)
    assert {file["types"].get(W4A16, 0) for file in found["files"]} == {0, 8}
    assert cli.invoke(args=["emit", "--target", "trtllm", "--output", "whole"]).exit_code == 0
    good = cli.invoke(args=["audit", "whole"])
    assert good.exit_code == 0
    assert "63 of 63" in good.stderr
    assert cli.invoke(args=["audit", "whole", "--remove-stale"]).exit_code == 2
