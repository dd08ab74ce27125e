"""Compare the machine code of two kernel libraries, function by function.

    python tools/compare_sass.py BEFORE.so AFTER.so

Functions are matched by kernel name and template arguments, so that a renamed parameter type changes nothing. Every
instruction, its encoding and the registers and memory of a function must be equal. The script prints the functions that
differ and exits with status 1 if there are any.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from w4a16gen.build.toolchain import require_cuobjdump

_KERNEL = re.compile(r"w4a16_sm90_[a-z0-9_]+")
_TEMPLATE_INTEGER = re.compile(r"L[a-z](\d+)E")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\S+?):?$")

Functions = dict[str, set[str]]
"""Text of each function. A function that several compile units hold may have several texts."""


def function_key(symbol: str) -> str:
    """Return a device function's identity, which does not depend on the names of its parameter types.

    Example:
        >>> function_key("_ZN5w4a166native6kernelINS_24w4a16_sm90_native_cs_ctaELi2EEEvNS0_10ParametersE")
        'w4a16_sm90_native_cs_cta<2>'
    """
    kernel = _KERNEL.search(symbol)
    name, rest = (kernel[0], symbol[kernel.end() :]) if kernel else (_identifier(symbol), symbol)
    return f"{name}<{', '.join(_TEMPLATE_INTEGER.findall(rest))}>"


def _identifier(symbol: str) -> str:
    """Return a mangled function's own name, without namespaces."""
    rest, name = symbol.removeprefix("_ZN").removeprefix("_Z"), symbol
    while match := re.match(r"\d+", rest):
        stop = match.end() + int(match[0])
        name, rest = rest[match.end() : stop], rest[stop:]
    return name


def functions_of(lines: Iterable[str]) -> Functions:
    """Collect the text of every function in cuobjdump's output."""
    functions: Functions = {}
    for symbol, body in _blocks(lines):
        functions.setdefault(function_key(symbol), set()).add(body)
    return functions


def _blocks(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    symbol, body = "", list[str]()
    for line in lines:
        header = _FUNCTION.match(line)
        if header is not None or line.startswith("Fatbin"):  # a compile unit begins, with lines of its own
            if symbol:
                yield symbol, "\n".join(body)
            symbol, body = header[1] if header else "", []
        elif symbol and (text := line.strip()):
            body.append(re.sub(r"\s+", " ", text))
    if symbol:
        yield symbol, "\n".join(body)


def differences(before: Functions, after: Functions) -> list[str]:
    """Return a sentence for each function that is missing, new or different."""
    lines = [f"{key}: only before" for key in sorted(before.keys() - after.keys())]
    lines += [f"{key}: only after" for key in sorted(after.keys() - before.keys())]
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            lines.append(f"{key}: {_first_difference(before[key], after[key])}")
    return lines


def _first_difference(before: set[str], after: set[str]) -> str:
    old, new = (max(texts).splitlines() for texts in (before - after or before, after - before or after))
    for number, (left, right) in enumerate(zip(old, new, strict=False)):
        if left != right:
            return f"{len(old)} and {len(new)} lines, line {number}: {left!r} became {right!r}"
    return f"{len(old)} and {len(new)} lines"


def read_functions(cuobjdump: Path, library: Path) -> Functions:
    """Return the instructions, and under `resources of NAME` the registers and memory, of a library's functions.

    Raises:
        subprocess.CalledProcessError: if cuobjdump cannot read the library.
    """
    functions: Functions = {}
    for option, prefix in (("-sass", ""), ("-res-usage", "resources of ")):
        command = [str(cuobjdump), option, str(library)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            found = functions_of(process.stdout or ())
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
        functions |= {prefix + key: texts for key, texts in found.items()}
    return functions


def main(arguments: list[str] | None = None) -> int:
    """Compare two libraries; return 0 if all functions are equal, otherwise 1."""
    parser = argparse.ArgumentParser(description="Compare the machine code of two kernel libraries.")
    parser.add_argument("before", type=Path, help="a built library")
    parser.add_argument("after", type=Path, help="another one")
    given = parser.parse_args(arguments)
    cuobjdump = require_cuobjdump()
    before, after = (read_functions(cuobjdump, library) for library in (given.before, given.after))
    found = differences(before, after)
    print(*found, sep="\n", end="\n" if found else "")
    functions = sum(not key.startswith("resources of ") for key in before.keys() | after.keys())
    print(f"{functions} functions, {len(found)} differences")
    return 1 if found or not before else 0


if __name__ == "__main__":
    sys.exit(main())
