"""A slow and plain reading of C++ sources, one phase after the other, to compare the real one with.

It knows `#if 0`, `#if 1`, `#else` and `#endif`, no macros, and instantiations `template void name<...>(...);`.
"""

from __future__ import annotations

import re

LITERAL = "\x01"


def spliced(text: str) -> str:
    """Join continued lines. Inputs have no continuation inside a raw string."""
    return re.sub(r"\\[ \t]*\r?\n", "", text)


def plain(text: str) -> str:
    """Replace comments by a space and literals by a mark, one character after the other."""
    made = ""
    while text:
        if text.startswith("//"):
            text = text[text.find("\n") :] if "\n" in text else ""
        elif text.startswith("/*"):
            text = text[text.index("*/", 2) + 2 :]
            made += " "
        elif (raw := re.match(r'R"(\w*)\(', text)) and not re.search(r"[\w$]\Z", made):
            closing = f'){raw[1]}"'
            text = text[text.index(closing) + len(closing) :]
            made += LITERAL
        elif text[0] == "'" and re.search(r"\b\d\w*\Z", made):
            text = text[1:]  # a digit separator
        elif text[0] in "\"'":
            quote = text[0]
            text = text[1:]
            while text[0] != quote:
                text = text[2:] if text[0] == "\\" else text[1:]
            text = text[1:]
            made += LITERAL
        else:
            made += text[0]
            text = text[1:]
    return made


def live(text: str) -> str:
    """Leave the lines that `#if 0` and its relatives leave, without directives."""
    kept = []
    stack: list[bool] = []
    for line in text.split("\n"):
        directive = re.match(r"\s*(?:#|%:)\s*(\w*)\s*(\w*)", line)
        if not directive:
            kept += [line] if all(stack) else []
        elif directive[1] == "if":
            stack.append(directive[2] == "1")
        elif directive[1] == "else":
            stack[-1] = not stack[-1]
        elif directive[1] == "endif":
            stack.pop()
    return "\n".join(kept)


def instantiated(text: str) -> list[tuple[str, str]]:
    """Return names and arguments of the instantiations in a source."""
    code = live(plain(spliced(text)))
    found = re.findall(r"(\w*)\s*\btemplate\s+void\s+(\w+)\s*<([^>]*)>\s*\([^)]*\)\s*;", code)
    return [(name, arguments.strip()) for before, name, arguments in found if before != "extern"]
