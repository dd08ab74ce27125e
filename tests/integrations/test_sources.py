"""Tokens, directives and instantiations, against a slow and plain reading, and the number of steps that they take."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from audit_cost import PATTERNS
from fakes import cpp
from fakes.generator import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import CPP

from w4a16gen.integrations.tensorrt_llm import conditions
from w4a16gen.integrations.tensorrt_llm.instantiations import scan
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, tokenize

PIECES = st.sampled_from(
    [
        "template void f<1>();",
        "template void g< 2 > (int, float) ;",
        "extern template void f<3>();",
        "template\nvoid f<4>()\n;",
        "tem\\\nplate void f<5>();",
        "template void /* , */ f<6 /**/>();",
        "template <class T> void h(T);",
        "/* template void f<7>(); */",
        "/* \" ' // */",
        "// template void f<8>(); \\\n template void f<8>();\n",
        "// ??/\n",
        '"template void f<9>();";',
        "'\"';",
        '"\\"";',
        '"a\\\\";',
        'R"(template void f<10>(); " /* )";',
        'R"x( )" )x";',
        "1'000;",
        "int x;",
        "\n",
        "\r\n",
        " ",
        "\t",
        "/**/",
        "namespace a {",
        "}",
        "a <: b :> c;",
        '// "\n',
        "x = y / *z;",
        "\n#if 0\ntemplate void f<11>();\n#else\ntemplate void f<12>();\n#endif\n",
        "\n#if 1\n#if 0\n#endif\n#else\n#endif\n",
        "\n  # /* */ if 0\ntemplate void f<13>();\n # endif\n",
        "\n#define A template void f<14>();\n",
        '\n#if 1 // "\n%:endif\n',
        "\n#if 0\n#define B(\n#else /* template void f<15>(); */\n#endif\n",
        "\n#if 1 /*\n#if 0 */\n#endif\n",
        "\n#if 0\n",
        "\n#endif\n",
    ]
)


def found_in(text: str, *, statements: bool = True) -> list[tuple[str, str]]:
    found = scan(text.encode("latin-1"), statements=statements)
    return [(one.name, ", ".join(one.arguments)) for one in found.instantiations if not one.is_conditional]


def balanced(pieces: list[str]) -> str:
    """Return a source of pieces in which every condition is closed."""
    text = ""
    depth = 0
    for piece in pieces:
        change = {"\n#if 0\n": 1, "\n#endif\n": -1}.get(piece, 0)
        text += piece if depth + change >= 0 else ""
        depth = max(0, depth + change)
    return text + "\n" + "#endif\n" * depth


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=12))
def test_instantiations_are_those_of_a_plain_reading(pieces: list[str]) -> None:
    text = balanced(pieces)
    wanted = cpp.instantiated(text)
    assert found_in(text) == wanted
    assert found_in(text, statements=False) == wanted


@given(st.lists(PIECES, max_size=12))
def test_places_are_those_of_the_bytes(pieces: list[str]) -> None:
    data = balanced(pieces).encode()
    for one in scan(data).instantiations:
        text = data[one.begin : one.end].replace(b"\\\n", b"")
        assert text.startswith(b"template")
        assert text.endswith(b";")
        assert data.count(b"\n", 0, one.begin) + 1 == one.line


@given(st.binary(max_size=60) | st.text("#if01 \n\\\"'/*RL(){}<>;,templavodxANS", max_size=60).map(str.encode))
def test_any_bytes_are_read_without_an_error_and_with_and_without_whole_statements(data: bytes) -> None:
    assert scan(data) == scan(data, statements=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="this machine has no g++")
def test_a_real_preprocessor_leaves_the_same_instantiations() -> None:
    source = (CPP / "macros_and_conditions.cu").read_text()
    command = ["g++", "-E", "-P", "-w", "-std=c++17", "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)  # noqa: S603
    assert found_in(source) == found_in(done.stdout)
    assert len(found_in(source)) == 11


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 || X", 1),
        ("0 && X", 0),
        ("X && 0", 0),
        ("X", None),
        ("X == X", None),
        ("1 +", None),
        ("(1", None),
        ("", None),
        ("1 / 0", None),
        ("1 % 0", None),
        ("1 << 64", None),
        ("1 << -1", None),
        ("1 << 63 < 0", 1),
        ("-1 < 0u", None),
        ("9" * 10_000, None),
        ("1 ? 2 : 3", 2),
        ("0 ? 2 : 0 ? 4 : 5", 5),
        ("X ? 1 : 1", 1),
        ("X ? 1 : 2", None),
        ("1 ? 2", None),
        ("1 : 2", None),
        ("- - 1", 1),
        ("!0 + 1", 2),
        ("2 - 1 - 1", 0),
        ("2 + 3 * 4", 14),
        ("f(1)", None),
        ("1.5", None),
        ("true && not false", 1),
        ("'a'", 97),
        ("'\\n'", None),
        ("(" * 3000 + "1" + ")" * 3000, None),
        ("(" * 2000 + "1" + ")" * 2000, 1),
    ],
)
def test_conditions_have_the_value_that_they_have_in_every_build(text: str, value: int | None) -> None:
    tokens = [token for token in tokenize(Source(text.encode())) if token.kind is not Kind.END]
    assert conditions.evaluate(tokens, lambda _: None) == value


def steps(work: Callable[[], object]) -> int:
    """Count the calls of Python and C functions in a piece of work."""
    count = 0

    def counted(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", PATTERNS)
def test_twice_the_input_takes_at_most_twice_the_steps(name: str) -> None:
    small, large = (PATTERNS[name](size) for size in (10_000, 20_000))
    assert len(large) < 2.2 * len(small)
    scan(b"template void warm<1>();")
    few = steps(lambda: scan(small))
    assert steps(lambda: scan(large)) < 2.3 * few + 500
    assert few < 60 * len(small) + 500


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_that_were_slow_end_and_leave_what_is_before_them(name: str) -> None:
    found = scan(GOLDEN[0].encode() + b"\n" + PATTERNS[name](100_000))
    assert found.instantiations[0].end == len(GOLDEN[0])


def test_bounds_are_reported() -> None:
    texts = {
        "macros read and make more than": "#define A x x\n" + "".join(
            f"#define {chr(65 + n)} {chr(64 + n)} {chr(64 + n)}\n" for n in range(1, 26)
        ) + "Z;",
        "macros nest deeper than": "#define F(x) x\n" + "F(" * 100 + ")" * 100,
        "conditions nest deeper than": "#if 1\n" * 300,
        "this statement has more than": "template void f<" + "(" * 300_000,
        "this #define has": "#define A " + "x " * 30_000,
    }  # fmt: skip
    for message, text in texts.items():
        problems = [problem.message for problem in scan(text.encode()).problems]
        assert any(problem.startswith(message) for problem in problems), (message, problems)
    many = scan(b"'\n" * 100)
    assert len(many.problems) == 20
