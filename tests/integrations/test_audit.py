"""The audit of generated sources: releases and descendants, places, conditions, and what is no regular file."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from fakes.generator import GOLDEN, INCLUDE, filtered, generated, grouped
from fakes.runner import Runner

from w4a16gen import QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import Audit, audit
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.integrations.tensorrt_llm.folders import LARGEST_FILE, NotReadError, printable, read_file
from w4a16gen.integrations.tensorrt_llm.known import W4A16
from w4a16gen.kernels.spaces import enumerate_space

BF16 = GOLDEN[0].replace("half", "__nv_bfloat16")
FIRST = "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"


def of(folder: Path, *texts: str) -> Audit:
    """Audit sources with these texts."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.cu").write_text(text)
    return audit(folder)


def whole(folder: Path) -> Path:
    """Write a folder whose verdict is good."""
    emit_trtllm(enumerate_space("trtllm"), folder)
    assert audit(folder).ok
    return folder


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
    found = of(tmp_path / "in", f"#ifndef EXCLUDE_SM_90\n{INCLUDE}namespace a::b {{\n{texts}\n}}\n#endif\n")
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
    folder = whole(tmp_path / "in")
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
        folder = whole(tmp_path / name)
        (folder / "extra.cu").write_text(text)
        found = audit(folder)
        assert [kind for kind in extras if getattr(found, kind)] == [name]
        assert not found.ok
    folder = whole(tmp_path / "missing")
    next(folder.glob("*.cu")).unlink()
    assert len(audit(folder).missing) == 7
    assert not audit(folder).ok


def test_kernels_that_a_macro_writes_are_foreign_by_its_name(tmp_path: Path) -> None:
    folder = whole(tmp_path / "gemm")
    count = grouped(tmp_path / "gemm" / "gemm_grouped" / "90")
    found = audit(folder)
    assert found.foreign == {"INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM": count}
    assert found.foreign_places["INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM"][0].endswith("group0.generated.cu:4")
    assert not found.ok


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("INST_A(half, 1)\nINST_A(half, 2)\n", {"INST_A": 2}),
        ("namespace a {\nINST_A(half, 1)\n}\n", {"INST_A": 1}),
        ("BEGIN_NAMESPACE\nINST_A(half, 1);\nEND_NAMESPACE\n", {"INST_A": 1}),
        ("INST_A(half, 1)\nnamespace a {\n}\n", {"INST_A": 1}),
        (f"INST_A(half, 1)\n{BF16}\n", {"INST_A": 1, "BF16 x uint4": 1}),
        ("Registered(one);\n", {"Registered": 1}),
        ("#define INST_A(x) INST_B(x); INST_C(x)\nINST_A(1);\n", {"INST_B": 1, "INST_C": 1}),
        ("#define INST_A(x)\nINST_A(1);\n", {}),
        ("#define I(x) template void f<x>();\nI(1) I(2)\n#undef I\nI(3)\n", {"f": 2, "I": 1}),
        ('static_assert(true, "INST_A(1);");\nasm("");\nint x = INST_B(1);\nvoid INST(int);\n', {}),
        ("TEST(a, b) { INST_A(1); }\nvoid f() { INST_A(1); }\n", {}),
        ("DEPRECATED(1) void f();\n", {}),
        ("template class Runner<half>;\ntemplate struct B<1>;\ntemplate int variable<2>;\n",
         {"Runner": 1, "B": 1, "variable": 1}),
        ("template int Runner<half>::call(int);\ntemplate auto g<1>() -> int;\n", {"call": 1, "g": 1}),
        ("extern template void f<int>();\ntemplate <> void f<int>();\ntemplate <class T> void f(T);\n", {}),
        ("void f() { x.template g<int>(1); }\nusing T = typename A::template B<int>;\n", {}),
        ("SOME_MACRO(x) {\ntemplate void f<int>();\n}\n", {"f": 1}),
        ("#ifdef ENABLE_A\nvoid f() {\n#else\nINST_A(1);\nvoid g() {\n#endif\n}\nINST_A(2);\n", {"INST_A": 2}),
        ('extern "C++" { template void f<int>(); }\n', {"f": 1}),
    ],
)  # fmt: skip
def test_what_else_instantiates(tmp_path: Path, text: str, foreign: dict[str, int]) -> None:
    found = of(tmp_path / "in", text)
    assert (dict(found.foreign), found.problems) == (foreign, [])


def test_kernels_that_the_file_s_own_macros_and_aliases_write_are_read(tmp_path: Path) -> None:
    line = GOLDEN[0]
    assert "cute::Int<16>" in line
    shaped = line.replace("cute::Int<16>", "cute::Int<N_>").replace("half", "T_").rstrip(";")
    found = of(
        tmp_path / "in",
        f"#define INST(T_, N_) \\\n  {shaped}\nINST(half, 16);\nINST(half, 32);\nINST(__nv_bfloat16, 16);\n",
        "using H = half;\nusing cute::Int;\nconstexpr auto Q = cutlass::WeightOnlyQuantOp::PER_COLUMN_SCALE_ONLY;\n"
        "typedef cutlass::uint4b_t W;\nnamespace ce = cutlass::epilogue;\n"
        + GOLDEN[2].replace("half", "H").replace("cutlass::uint4b_t", "W").replace("cutlass::epilogue", "ce")
        .replace("cutlass::WeightOnlyQuantOp::PER_COLUMN_SCALE_ONLY", "Q").replace("cute::Int", "Int"),
    )  # fmt: skip
    assert len(found.kernels) == 3
    assert found.foreign == {"BF16 x uint4": 1}
    assert found.foreign_places == {"BF16 x uint4": ["0.cu:5"]}
    assert (found.unknown, found.problems) == ([], [])


def test_an_alias_with_two_meanings_is_not_guessed(tmp_path: Path) -> None:
    other = GOLDEN[0].replace("half", "H")
    found = of(
        tmp_path / "in", f"#ifdef ENABLE_BF16\nusing H = __nv_bfloat16;\n#else\nusing H = half;\n#endif\n{other}\n"
    )
    assert found.foreign == {"H x uint4": 1}
    macro = "#ifdef ENABLE_BF16\n#define H __nv_bfloat16\n#else\n#define H half\n#endif\n"
    found = of(tmp_path / "macro", f"{macro}{other}\n")
    assert "builds define differently" in found.problems[0]


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("#if 0", "#endif", "dead"),
        ("#if 1\n#else", "#endif", "dead"),
        ("#if 0 && defined(ENABLE_BF16)", "#endif", "dead"),
        ("#ifndef __cplusplus", "#endif", "dead"),
        ("#define NO\n#ifndef NO", "#endif", "dead"),
        ("#ifdef ENABLE_BF16\n#ifndef ENABLE_BF16", "#endif\n#endif", "dead"),
        ("#ifdef ENABLE_BF16\n#else\n#if defined(ENABLE_BF16)", "#endif\n#endif", "dead"),
        ("#if 2 - 2 > 0 || !1", "#endif", "dead"),
        ("#if 1 ? 0 : X", "#endif", "dead"),
        ("%:if 0", "%:endif", "dead"),
        ("/* */ #if 0 // x", "#endif", "dead"),
        ("#if 0 /*\n#endif */", "#endif", "dead"),
        ("#define ON 0\n#if ON", "#endif", "dead"),
        ("/*", "*/", "dead"),
        ("// \\", "", "dead"),
        ("// \\  ", "", "dead"),
        ('auto x = R"(', ')";', "dead"),
        ("#define UNUSED \\", "", "dead"),
        ("#ifdef ENABLE_BF16", "#endif", "live"),
        ("#ifndef EXCLUDE_SM_90", "#endif", "live"),
        ("#ifdef COMPILE_HOPPER_TMA_GEMMS", "#endif", "live"),
        ("#if defined(ENABLE_FP8) && 1", "#endif", "live"),
        ("#ifdef ENABLE_BF16\n#else", "#endif", "live"),
        ("#ifndef A_HEADER\n#define A_HEADER", "#endif", "live"),
        ("#ifdef A_HEADER\n#else", "#endif", "live"),
        ("#if __CUDACC_VER_MAJOR__ >= 12", "#endif", "live"),
        ("#if 0\n#elif 1", "#endif", "live"),
        ('#if 1 // "', "#endif", "live"),
        ("#if 0\n'\n#endif", "", "live"),
        ('#define S "/*"\n', "", "live"),
        ("#include <a/*b>", "", "live"),
        ("char c = '\"';", "", "live"),
        ("int n = 1'000'000;", "", "live"),
        ("// not a continuation ??/", "", "live"),
        ("#ifdef A_FEATURE", "#endif", "conditional"),
        ("#if A_FEATURE > 2", "#endif", "conditional"),
        ("#ifdef ENABLE_BF16\n#ifdef A_FEATURE", "#endif\n#endif", "conditional"),
    ],
)  # fmt: skip
def test_conditions_comments_and_literals_are_read_as_a_compiler_reads_them(
    tmp_path: Path, before: str, after: str, kind: str
) -> None:
    found = of(tmp_path / "in", f"{before}\n{GOLDEN[0]}\n{after}\n{GOLDEN[1]}\n")
    assert len(found.kernels) == 1 + (kind == "live")
    assert len(found.conditional) == (kind == "conditional")
    assert (dict(found.foreign), found.unknown, found.problems) == ({}, [], [])


def test_a_conditional_kernel_is_shown_with_its_condition(tmp_path: Path) -> None:
    found = of(tmp_path / "in", f"#if defined(A) && !B\n#else\n#ifdef C\n{GOLDEN[0]}\n#endif\n#endif\n")
    assert found.conditional == [(f"{W4A16} at 0.cu:4", "!(defined(A) && !B) && defined(C)")]
    assert found.as_json()["conditional"] == [
        {"what": f"{W4A16} at 0.cu:4", "condition": "!(defined(A) && !B) && defined(C)"}
    ]
    assert FIRST in [config.name for config in found.missing]


def test_alternatives_are_no_duplicates(tmp_path: Path) -> None:
    guarded = f"#ifdef ENABLE_FAST\n{GOLDEN[0]}\n#else\n{GOLDEN[0]}\n#endif\n"
    assert of(tmp_path / "one", guarded).duplicates == []
    found = of(tmp_path / "two", guarded, GOLDEN[0])
    assert [config.name for config in found.duplicates] == [FIRST]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template void f<1>(int)", "0.cu:1: the instantiation of f does not end"),
        ("\n\ntemplate void f<1>(int)\ntemplate void g<1>(int);", "0.cu:3: the instantiation of f does not end"),
        ("template void f<1(int);", "0.cu:1: the instantiation of a template does not end"),
        ("\n/* x", "0.cu:2: '/*' starts nothing that a compiler reads, or does not end"),
        ('R"(\n', "0.cu:1: 'R' starts nothing that a compiler reads, or does not end"),
        ('int x = "a;\n', "0.cu:1: '\"a;' starts nothing that a compiler reads, or does not end"),
        ("#endif\n", "0.cu:1: #endif without #if"),
        ("#if 1\n#else\n#else\n#endif\n", "0.cu:3: #else after #else"),
        ("\n#ifdef X\n", "0.cu:2: this #if has no #endif"),
        ("template void f<\n#ifdef X\n1\n#else\n2\n#endif\n>();", "0.cu:1: an #if stands inside this instantiation"),
        ("#define A(x) A(x x)\n#define B A(\nB;", "0.cu:3: the call of macro A does not end"),
        ("t\0e\0m\0", "0.cu:1: '\\x00' starts nothing that a compiler reads, or does not end"),
    ],
)
def test_what_no_compiler_accepts_is_reported_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    folder = whole(tmp_path / "in")
    (folder / "0.cu").write_text(text)
    found = audit(folder)
    assert message in found.problems
    assert not found.ok


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.cu").write_bytes(f"{GOLDEN[0]} // ü ö\n{GOLDEN[1]}\n".encode(encoding))
    found = audit(tmp_path)
    if encoding.startswith("utf-16"):
        assert found.problems
        assert not found.kernels
    else:
        assert (len(found.kernels), found.problems) == (2, [])


def test_links_special_files_and_what_cannot_be_read_are_reported_and_not_opened(tmp_path: Path) -> None:
    folder = whole(tmp_path / "in")
    whole(tmp_path / "other")
    os.mkfifo(folder / "fifo.cu")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.cu"))
    (folder / "link.cu").symlink_to(tmp_path / "other" / "w4a16_trtllm_cs_pingpong_1.generated.cu")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.cu").symlink_to("nowhere")
    (folder / "notes.txt").symlink_to("nowhere.txt")
    (folder / "folder.cu").mkdir()
    (folder / "folder.cu" / "deep.CU").write_text(f"{BF16}\n")
    os.mkfifo(folder / "fifo.txt")
    found = audit(folder)
    link, special = "a symbolic link, which is not followed", "not a regular file"
    assert dict(found.not_read) == {
        "fifo.cu": special, "socket.cu": special, "link.cu": link, "linked": link, "loop": link, "dangling.cu": link
    }  # fmt: skip
    assert found.foreign_places == {"BF16 x uint4": ["folder.cu/deep.CU:1"]}
    assert found.duplicates == []
    assert not found.ok


def test_reading_never_waits_and_never_follows_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("x")
    for name, reason in (("fifo", "not a regular file"), ("link", "cannot be read"), (".", "not a regular file")):
        with pytest.raises(NotReadError, match=reason):
            read_file(tmp_path / name)
    assert read_file(tmp_path / "file") == b"x"
    with (tmp_path / "file").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(NotReadError, match="67108865 bytes, more than 67108864"):
        read_file(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up the right to read and take it back")
def test_unreadable_files_and_folders_are_reported_by_root_too(tmp_path: Path) -> None:
    folder = whole(tmp_path / "in")
    (folder / "locked").mkdir(mode=0)
    (folder / "locked.cu").write_text("int x;\n")
    (folder / "locked.cu").chmod(0)
    for above in (folder, *folder.parents):
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        found = audit(folder)
    finally:
        os.seteuid(0)
    assert sorted(found.not_read) == [
        ("locked", "cannot be read: Permission denied"), ("locked.cu", "cannot be read: Permission denied")
    ]  # fmt: skip
    assert not found.ok


def test_names_of_any_bytes_are_shown_as_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n\x1b.cu")
    (tmp_path / name).write_text(f"{BF16}\n")
    found = audit(tmp_path)
    assert found.foreign_places == {"BF16 x uint4": ["\\xff\\n\\x1b.cu:1"]}
    json.dumps(found.as_json()).encode()
    assert printable("ä/b c") == "ä/b c"


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(GOLDEN[0])
    with pytest.raises(InvalidValueError, match=r"no \.cu files under"):
        audit(tmp_path)
    (tmp_path / "link").symlink_to(".")
    assert audit(tmp_path).problems == ["link: a symbolic link, which is not followed"]


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
        "56 FP16 x uint8; 1 problems"
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
