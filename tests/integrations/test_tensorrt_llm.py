"""Sources for TensorRT-LLM's tree, and the audit of what its own generator writes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from w4a16gen import QuantMode
from w4a16gen.cli import main
from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import W4A16, audit, extract, parse_instantiations
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

GOLDEN = (Path(__file__).parents[1] / "golden" / "trtllm_instantiations.txt").read_text().splitlines()
INCLUDE = '#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"\n'
TYPES = [
    ("__nv_fp8_e4m3", "cutlass::uint4b_t", "half", "half", "half"),
    ("__nv_fp8_e4m3", "cutlass::uint4b_t", "half", "__nv_bfloat16", "__nv_bfloat16"),
    ("half", "cutlass::uint4b_t", "half", "half", "half"),
    ("__nv_bfloat16", "cutlass::uint4b_t", "__nv_bfloat16", "__nv_bfloat16", "__nv_bfloat16"),
    ("half", "uint8_t", "half", "half", "half"),
    ("__nv_bfloat16", "uint8_t", "__nv_bfloat16", "__nv_bfloat16", "__nv_bfloat16"),
]
"""Activation, weight, scale, bias and output of the real generator, in its order."""


def tokens(text: str) -> list[str]:
    """Split C++ at white space and around punctuation."""
    return re.findall(r"[\w:]+|[^\s\w:]", text)


def of_types(instantiation: str, types: tuple[str, ...]) -> str:
    """Give a golden instantiation for other types; FP8's k of a CTA is twice as long."""
    activation, weight, scale, bias, output = types
    head, _, rest = instantiation.partition("cutlass::WeightOnlyQuantOp")
    name = head.partition("<")[0]
    shapes = rest.partition(">(")[0]
    if "fp8" in activation:
        shapes = shapes.replace("cute::Int<64>>, cute::Shape", "cute::Int<128>>, cute::Shape")
    parameters = (
        f"const {activation}*, const {weight}*, const {scale}*, const {scale}*, const {bias}*, const float, {output}*, "
        "int, int, int, const int, tensorrt_llm::cutlass_extensions::CutlassGemmConfig, char*, size_t, cudaStream_t, "
        "int*"
    )
    return f"{name}<{', '.join(types)}, cutlass::WeightOnlyQuantOp{shapes}>(\n{parameters}\n);"


def generated(folder: Path, *, mixed_input: bool = False) -> Path:
    """Write what the real generator does: 378 kernels by channels of the CTA, eight a file, in its order."""
    groups: dict[str, list[str]] = {"64": [], "128": []}
    for types, of_mode in itertools.product(TYPES, range(3)):
        for instantiation in GOLDEN[21 * of_mode : 21 * (of_mode + 1)]:
            match = re.search(r"cute::Shape<cute::Int<(\d+)>", instantiation)
            assert match is not None
            text = of_types(instantiation, types)
            if mixed_input:
                text = re.sub(r"(KernelTmaWarpSpecialized\w+)", r"\1MixedInput", text)
            groups[match[1]].append(text)
    folder.mkdir()
    files = [group[at : at + 8] for group in groups.values() for at in range(0, len(group), 8)]
    for number, file in enumerate(files, 1):
        body = "\n\n".join(file)
        (folder / f"cutlass_kernel_file_{number}.generated.cu").write_text(
            f"{INCLUDE}namespace tensorrt_llm\n{{\nnamespace kernels\n{{\nnamespace cutlass_kernels\n{{\n\n{body}\n\n"
            "} // namespace cutlass_kernels\n} // namespace kernels\n} // namespace tensorrt_llm\n"
        )
    return folder


def filtered(folder: Path) -> Path:
    """Drop every file that mentions FP8 or bfloat16, as users do."""
    for path in folder.iterdir():
        if re.search("fp8|bfloat16", path.read_text()):
            path.unlink()
    return folder


def test_what_is_emitted_is_what_the_real_generator_writes_token_by_token(tmp_path: Path) -> None:
    emission = emit_trtllm(enumerate_space("trtllm"), tmp_path)
    found = {
        " ".join(tokens(instantiation.text))
        for path in emission.files
        for instantiation in parse_instantiations(path.read_text())
    }
    assert found == {" ".join(tokens(line)) for line in GOLDEN}
    assert len(found) == len(GOLDEN) == 63
    for path in emission.files:
        text = path.read_text()
        assert text.startswith(INCLUDE)
        assert text.count("#include") == 1
        assert "namespace tensorrt_llm {\nnamespace kernels {\nnamespace cutlass_kernels {\n" in text


def test_files_hold_one_mode_and_schedule_and_the_manifest_says_which_kernel_is_where(tmp_path: Path) -> None:
    emission = emit_trtllm(enumerate_space("trtllm"), tmp_path)
    assert sorted(map(len, emission.files.values())) == [7] * 9
    for kernels in emission.files.values():
        assert len({(config.mode, config.schedule) for config in kernels}) == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {kernel["name"] for kernel in manifest["kernels"]} == {config.name for config in enumerate_space("trtllm")}
    for kernel in manifest["kernels"]:
        assert f"// {kernel['name']}\n" in (tmp_path / kernel["file"]).read_text()
    again = emit_trtllm(enumerate_space("trtllm"), tmp_path)
    assert again.written == []
    few = [config for config in enumerate_space("trtllm") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY]
    assert len(emit_trtllm(few, tmp_path, remove_stale=True).removed) == 6
    assert len(list(tmp_path.glob("*.cu"))) == 3


def test_kernels_that_tensorrt_llm_does_not_have_are_refused(tmp_path: Path) -> None:
    native = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warpgroups4_persistent")
    with pytest.raises(InvalidValueError, match="TensorRT-LLM generates no such kernel"):
        emit_trtllm([native], tmp_path)


def test_emitting_for_tensorrt_llm_from_the_command_line(cli: CliRunner) -> None:
    done = cli.invoke(main, ["emit", "--target", "trtllm", "--output", "out"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\t7\n") == 9
    assert "63 kernels of space trtllm in 9 files: 9 files written" in " ".join(done.stderr.split())
    options = "--cta 128x128x64 --cluster 2x1x1 --mixed-input-schedules --output few --json"
    few = cli.invoke(main, ["emit", "--target", "trtllm", *options.split()])
    files = json.loads(few.stdout)["files"]
    assert sum(len(file["kernels"]) for file in files) == 3
    for path in (file["path"] for file in files):
        assert (
            "cutlass::gemm::KernelTmaWarpSpecializedCooperativeMixedInput, cutlass::epilogue" in Path(path).read_text()
        )
    both = cli.invoke(main, ["emit", "--target", "trtllm", "--target", "native"])
    assert both.exit_code == 2
    assert "cannot be combined" in both.stderr
    alone = cli.invoke(main, ["emit", "--mixed-input-schedules"])
    assert alone.exit_code == 2
    wrong = cli.invoke(main, ["emit", "--target", "tensorrt"])
    assert "is not one of cutlass, native, trtllm" in " ".join(wrong.stderr.split())
    elsewhere = cli.invoke(main, ["emit", "--target", "trtllm", "--space", "native"])
    assert elsewhere.exit_code == 2
    assert "TensorRT-LLM generates no such kernel" in " ".join(elsewhere.stderr.split())


@pytest.mark.parametrize("mixed_input", [False, True])
def test_the_audit_finds_63_of_378(tmp_path: Path, mixed_input: bool) -> None:
    found = audit(generated(tmp_path / "all", mixed_input=mixed_input))
    assert (len(found.files), found.total, len(found.kernels)) == (48, 378, 63)
    assert (found.missing, found.duplicates, found.unknown) == ([], [], [])
    assert found.foreign == {
        "FP8 x uint4": 126, "BF16 x uint4": 63, "FP16 x uint8": 63, "BF16 x uint8": 63
    }  # fmt: skip
    assert sum(file.is_mixed for file in found.files) == 4
    assert not found.ok


def test_the_audit_counts_what_a_filter_by_type_names_loses_and_extract_saves_the_rest(tmp_path: Path) -> None:
    found = audit(filtered(generated(tmp_path / "some")))
    assert (len(found.files), found.total, len(found.kernels)) == (12, 96, 40)
    assert len(found.missing) == 23
    assert found.foreign == {"FP16 x uint8": 56}
    kept = {str(mode): sum(config.mode is mode for config in found.kernels) for mode in QuantMode}
    assert kept == {"cs": 11, "fgs": 21, "fgsz": 8}
    written = extract(found, tmp_path / "extracted")
    assert len(written) == 5
    again = audit(tmp_path / "extracted")
    assert (again.total, len(again.kernels), again.foreign) == (40, 40, {})


def test_extracting_takes_kernels_out_of_mixed_files(tmp_path: Path) -> None:
    found = audit(generated(tmp_path / "all"))
    extract(found, tmp_path / "extracted")
    again = audit(tmp_path / "extracted")
    assert again.ok
    assert again.total == 63
    for file in again.files:
        text = file.path.read_text()
        assert text.startswith(INCLUDE)
        assert text.count("{") == text.count("}") == 3
        assert "fp8" not in text


def test_the_audit_reads_arguments_not_names(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    wanted = GOLDEN[0].replace(", ", ",\n   ").replace("half*", "half *")
    odd = GOLDEN[1].replace("cute::Int<32>", "cute::Int<48>")
    moe = GOLDEN[0].replace("mixed_gemm", "mixed_moe_gemm")
    (folder / "a.cu").write_text(
        f"// {GOLDEN[5]}\n/* {GOLDEN[6]}\n*/\n#define IT \\\n  {GOLDEN[7]}\n"
        f'const char* text = "{GOLDEN[8]}";\n{wanted}\n{odd}\ntemplate <typename T> void other(T);\n'
    )
    (folder / "deeper").mkdir()
    (folder / "deeper" / "b.cu").write_text(f"{moe}\n{GOLDEN[0]}\n")
    found = audit(folder)
    assert found.total == 4
    assert [config.name for config in found.kernels] == [
        "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"
    ]
    assert len(found.duplicates) == 1
    assert len(found.unknown) == 1
    assert found.foreign == {"sm90_generic_mixed_moe_gemm_kernelLauncher": 1}
    assert extract(found, tmp_path / "out") == [tmp_path / "out" / "a.cu"]
    (folder / "c.cu").write_text("template void f<int>(int)")
    with pytest.raises(InvalidValueError, match=r"c\.cu, line 1: the instantiation of f does not end"):
        audit(folder)


def test_audit_on_the_command_line(cli: CliRunner, tmp_path: Path) -> None:
    folder = filtered(generated(tmp_path / "some"))
    done = cli.invoke(main, ["audit", str(folder), "--extract", str(tmp_path / "out")])
    assert done.exit_code == 1
    counts = "40 of 63 FP16 x uint4 kernels found; 23 missing, 0 duplicates, 0 unknown; unrelated: 56 FP16 x uint8"
    assert counts in done.stderr
    assert done.stdout.count("missing: w4a16_sm90_cutlass_") == 23
    found = json.loads(cli.invoke(main, ["audit", str(folder), "--json"]).stdout)
    assert (found["instantiations"], len(found["present"]), len(found["missing"])) == (96, 40, 23)
    assert {file["types"].get(W4A16, 0) for file in found["files"]} == {0, 8}
    assert cli.invoke(main, ["emit", "--target", "trtllm", "--output", "whole"]).exit_code == 0
    whole = cli.invoke(main, ["audit", "whole"])
    assert whole.exit_code == 0
    assert "63 of 63" in whole.stderr
    Path("empty").mkdir()
    nothing = cli.invoke(main, ["audit", "empty"])
    assert nothing.exit_code == 2
    assert "no .cu files under empty" in nothing.stderr
