"""What the audit reads in a source: instantiations, macros, aliases, conditions, and what no compiler accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from audited import BF16, audit_texts, write_whole
from fakes.generator import GOLDEN, grouped

from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.known import W4A16

FIRST = "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"


def test_kernels_that_a_macro_writes_are_foreign_by_its_name(tmp_path: Path) -> None:
    folder = write_whole(tmp_path / "gemm")
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
    found = audit_texts(tmp_path / "in", text)
    assert (dict(found.foreign), found.problems) == (foreign, [])


def test_kernels_that_the_file_s_own_macros_and_aliases_write_are_read(tmp_path: Path) -> None:
    line = GOLDEN[0]
    assert "cute::Int<16>" in line
    shaped = line.replace("cute::Int<16>", "cute::Int<N_>").replace("half", "T_").rstrip(";")
    found = audit_texts(
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
    found = audit_texts(
        tmp_path / "in", f"#ifdef ENABLE_BF16\nusing H = __nv_bfloat16;\n#else\nusing H = half;\n#endif\n{other}\n"
    )
    assert found.foreign == {"H x uint4": 1}
    macro = "#ifdef ENABLE_BF16\n#define H __nv_bfloat16\n#else\n#define H half\n#endif\n"
    found = audit_texts(tmp_path / "macro", f"{macro}{other}\n")
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
    found = audit_texts(tmp_path / "in", f"{before}\n{GOLDEN[0]}\n{after}\n{GOLDEN[1]}\n")
    assert len(found.kernels) == 1 + (kind == "live")
    assert len(found.conditional) == (kind == "conditional")
    assert (dict(found.foreign), found.unknown, found.problems) == ({}, [], [])


def test_a_conditional_kernel_is_shown_with_its_condition(tmp_path: Path) -> None:
    found = audit_texts(tmp_path / "in", f"#if defined(A) && !B\n#else\n#ifdef C\n{GOLDEN[0]}\n#endif\n#endif\n")
    assert found.conditional == [(f"{W4A16} at 0.cu:4", "!(defined(A) && !B) && defined(C)")]
    assert found.as_json()["conditional"] == [
        {"what": f"{W4A16} at 0.cu:4", "condition": "!(defined(A) && !B) && defined(C)"}
    ]
    assert FIRST in [config.name for config in found.missing]


def test_alternatives_are_no_duplicates(tmp_path: Path) -> None:
    guarded = f"#ifdef ENABLE_FAST\n{GOLDEN[0]}\n#else\n{GOLDEN[0]}\n#endif\n"
    assert audit_texts(tmp_path / "one", guarded).duplicates == []
    found = audit_texts(tmp_path / "two", guarded, GOLDEN[0])
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
    folder = write_whole(tmp_path / "in")
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
