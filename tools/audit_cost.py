"""Measure how long `w4a16gen audit` takes on inputs that are hard for tokenizers, and on many files.

Each pattern takes one character, or a few, as often as fits. Run it on an idle machine: `python tools/audit_cost.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.integrations.tensorrt_llm.instantiations import scan
from w4a16gen.kernels.spaces import enumerate_space

Result = TypeVar("Result")


def _repeated(unit: bytes, before: bytes = b"", after: bytes = b"") -> Callable[[int], bytes]:
    return lambda size: before + unit * max(1, (size - len(before) - len(after)) // len(unit)) + after


def _numbered(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: b"".join(unit.replace(b"@", b"%d" % number) for number in range(size // len(unit)))


PATTERNS: dict[str, Callable[[int], bytes]] = {
    "nested parentheses": _repeated(b"(", b"template void f<"),
    "nested angle brackets": _repeated(b"<", b"template void f<"),
    "nested templates": _repeated(b"a<", b"template void f<"),
    "nested braces": _repeated(b"{"),
    "empty braces": _repeated(b"{}"),
    "comment openings": _repeated(b"/*"),
    "empty comments": _repeated(b"/**/"),
    "double quotes": _repeated(b'"'),
    "quotes on lines": _repeated(b'"\n'),
    "single quotes": _repeated(b"'"),
    "raw string openings": _repeated(b'R"(\n'),
    "raw strings": _repeated(b'R"x(a)x"'),
    "backslashes": _repeated(b"\\"),
    "backslashes in a string": _repeated(b"\\", b'"'),
    "continued lines": _repeated(b"\\\n"),
    "backslashes and spaces": _repeated(b"\\ "),
    "spaces": _repeated(b" "),
    "empty lines": _repeated(b"\n"),
    "zero bytes": _repeated(b"\0"),
    "digits": _repeated(b"1"),
    "digit separators": _repeated(b"1'"),
    "template without an end": _repeated(b"template class "),
    "instantiations without an end": _repeated(b"template void f<1>() "),
    "instantiations": _repeated(b"template void f<1>();"),
    "external instantiations": _repeated(b"extern template void f<1>();"),
    "a long template list": _repeated(b"int,", b"template void f<", b"int>();"),
    "statements": _repeated(b"a;"),
    "namespaces": _repeated(b"namespace a{"),
    "attributes": _repeated(b"[[a]] "),
    "macro calls": _repeated(b"INST(a)"),
    "macro calls with semicolons": _repeated(b"INST(a);"),
    "nested macro calls": _repeated(b"f(", b"#define f(x) x\n"),
    "doubling macros": _numbered(b"#define a@ a a\n"),
    "a chain of macros": _numbered(b"#define a@ a@1\n"),
    "aliases": _numbered(b"using a@ = f<a, a>;\n"),
    "nested conditions": _repeated(b"#if 1\n"),
    "conditions": _repeated(b"#ifdef A\n#endif\n"),
    "a chain of conditions": _repeated(b"#elif A\n", b"#if A\n", b"#endif\n"),
    "instantiations in a chain of conditions": _repeated(b"#elif A\ntemplate void f<1>();\n", b"#if A\n", b"#endif\n"),
    "a nested condition": _repeated(b"(", b"#if "),
    "a long condition": _repeated(b"1||", b"#if ", b"1\n#endif\n"),
    "directives": _repeated(b"#\n"),
    "definitions": _repeated(b"#undef A\n"),
    "includes": _repeated(b"#include <a>\n"),
}
"""By name: bytes of at most a given size."""


def timed(work: Callable[[], Result]) -> tuple[str, Result]:
    """Return the wall-clock and the CPU time of a piece of work, and its result. On a busy machine CPU time counts."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return f"{time.perf_counter() - wall:7.2f} s, {time.process_time() - cpu:6.2f} CPU s", result


def main() -> None:
    """Print the seconds of each pattern, and of many files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="size of each pattern (default: 1000000)")
    parser.add_argument("--files", type=int, default=100_000, help="number of files (default: 100000)")
    arguments = parser.parse_args()
    for name, make in PATTERNS.items():
        data = make(arguments.bytes)
        times, _ = timed(partial(scan, data))
        print(f"{times}  {len(data)} bytes of {name}")
    with tempfile.TemporaryDirectory() as folder:
        (text, *_) = (path.read_text() for path in emit_trtllm(enumerate_space("trtllm"), Path(folder)).written)
        many = Path(folder) / "many"
        for number in range(arguments.files):
            path = many / str(number % 100) / f"{number}.cu"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"// {number}\n{text}")
        times, found = timed(lambda: audit(many))
        as_json, _ = timed(found.as_json)
        print(f"{as_json}  for the object of --json")
        print(f"{times}  {len(found.files)} files of {len(text)} bytes with {found.total} instantiations")


if __name__ == "__main__":
    main()
