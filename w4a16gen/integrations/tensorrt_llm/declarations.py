"""What a statement at namespace scope instantiates or names, read from its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from w4a16gen.integrations.tensorrt_llm.conditions import parse_number
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Token

Aliases = Mapping[str, str]
"""Types and constants by the names that a file gives them."""

_LONGEST_ALIAS = 2000
_OPENING = frozenset("([{")
_CLOSING = frozenset(")]}")
_NO_DECLARATORS = frozenset(
    [
        "__attribute__",
        "__declspec",
        "__launch_bounds__",
        "__cluster_dims__",
        "alignas",
        "decltype",
        "noexcept",
        "typeof",
        "__typeof__",
        "explicit",
    ]
)
"""Words before a parenthesis that does not open a function's parameters."""
_NO_CALLS = _NO_DECLARATORS | {
    "static_assert",
    "_Static_assert",
    "asm",
    "__asm__",
    "__asm",
    "_Pragma",
    "__pragma",
    "requires",
}
"""Words before a parenthesis that does not open a macro's arguments."""
_ELABORATIONS = frozenset({"typename", "class", "struct", "enum", "union"})
_SAME_NAMES = {"__half": "half", "nv_bfloat16": "__nv_bfloat16", "tuple": "Shape", "C": "Int"}
"""Other names of the same types."""
_MACRO = re.compile(r"[A-Z][A-Z0-9_]*", re.ASCII)
_NUMBERED_TYPE = re.compile(r"_([0-9]+)", re.ASCII)
_MIXED_INPUT = re.compile(r"(KernelTmaWarpSpecialized(?:Pingpong|Cooperative))MixedInput")
_BEFORE_NAMES = frozenset({".", "->", "::", "<", ","})
"""Marks after which `template` introduces a name, not an instantiation."""


class Specialization(NamedTuple):
    """A template and its arguments, each written one way."""

    name: str
    arguments: tuple[str, ...]


class Call(NamedTuple):
    """A call of a macro that the file does not define."""

    name: str
    begin: int
    end: int


def matching(tokens: Sequence[Token], opening: int) -> int:
    """Return the index of the bracket that closes one of ( [ {, or the number of tokens if none does."""
    depth = 0
    for at in range(opening, len(tokens)):
        if tokens[at].kind is Kind.PUNCTUATION:
            depth += (tokens[at].text in _OPENING) - (tokens[at].text in _CLOSING)
            if depth == 0:
                return at
    return len(tokens)


def leading_calls(tokens: Sequence[Token]) -> tuple[list[Call], int]:
    """Return the macro calls that a statement starts with, and the index after them. Names in capitals may precede."""
    calls = []
    at = 0
    while at < len(tokens) and tokens[at].kind is Kind.WORD:
        if at + 1 == len(tokens) or tokens[at + 1].text != "(":
            if not _MACRO.fullmatch(tokens[at].text):
                break
            at += 1
            continue
        closing = matching(tokens, at + 1)
        if closing == len(tokens):
            break
        if tokens[at].text not in _NO_CALLS:
            calls.append(Call(tokens[at].text, tokens[at].begin, tokens[closing].end))
        at = closing + 1
    return calls, at


def find_template(tokens: Sequence[Token], begin: int) -> int:
    """Return the index of the `template` that starts an explicit instantiation, or -1.

    Only words and attributes may stand before it: macros that open namespaces, say. After `extern` it is a declaration.
    """
    at = begin
    while at < len(tokens):
        text = tokens[at].text
        if text == "template" and tokens[at].kind is Kind.WORD:
            follows = tokens[at + 1].text if at + 1 < len(tokens) else "<"
            is_declared = at > 0 and tokens[at - 1].text == "extern"
            return -1 if is_declared or follows == "<" else at
        if text == "[" or (text == "(" and at > begin and tokens[at - 1].text in _NO_CALLS):
            at = matching(tokens, at)
        elif tokens[at].kind is not Kind.WORD or text in {"using", "typedef", "namespace"}:
            return -1
        at += 1
    return -1


def has_second_template(tokens: Sequence[Token], first: int) -> bool:
    """Return whether another instantiation starts before this one ended."""
    depth = 0
    for at in range(first + 1, len(tokens)):
        text = tokens[at].text
        if tokens[at].kind is Kind.PUNCTUATION:
            depth += (text in _OPENING) - (text in _CLOSING)
        elif text == "template" and depth == 0 and tokens[at - 1].text not in _BEFORE_NAMES:
            return True
    return False


def parse_declarator(tokens: Sequence[Token], aliases: Aliases) -> Specialization | None:
    """Return what an explicit instantiation instantiates, from the tokens after `template`.

    Returns:
        None if its template arguments do not end, or it names nothing.
    """
    name = ""
    arguments: tuple[str, ...] = ()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at].kind, tokens[at].text
        if kind is Kind.WORD:
            name = text
        elif text == "<" and name:
            split = _template_arguments(tokens, at)
            if split is None:
                return None
            parts, at = split
            arguments = tuple(canonical(part, aliases) for part in parts)
        elif text == "(" and name not in _NO_DECLARATORS:
            break
        elif text in _OPENING:
            at = matching(tokens, at)
        at += 1
    return Specialization(name, arguments) if name else None


def _template_arguments(tokens: Sequence[Token], opening: int) -> tuple[list[list[Token]], int] | None:
    """Split template arguments at their own commas; return them and the index of the closing bracket."""
    parts: list[list[Token]] = [[]]
    angles, brackets = 0, 0
    for at in range(opening, len(tokens)):
        token = tokens[at]
        text = token.text
        if token.kind is Kind.PUNCTUATION:
            brackets += (text in _OPENING) - (text in _CLOSING)
            if brackets == 0 and text in {"<", ">"}:
                angles += 1 if text == "<" else -1
                if angles == 0:
                    return parts, at
                if at == opening:
                    continue
            elif text == "," and angles == 1 and brackets == 0:
                parts.append([])
                continue
        parts[-1].append(token)
    return None


def canonical(tokens: Sequence[Token], aliases: Aliases) -> str:
    """Return a template argument as every release would write it.

    Namespaces are dropped, names of the same type are one name, numbers are decimal, and schedules for mixed input have
    the name that later releases give them.
    """
    made: list[str] = []
    for at, token in enumerate(tokens):
        kind, text = token.kind, token.text
        if kind is Kind.WORD:
            is_qualifier = at + 1 < len(tokens) and tokens[at + 1].text == "::"
            if is_qualifier or text in _ELABORATIONS:
                continue
            made.append(_same(text, aliases))
        elif text == "::":
            if made and made[-1] == ">":
                made.append(text)
        elif kind is Kind.NUMBER:
            number = parse_number(text)
            made.append(text if number is None else str(number))
        else:
            made.append(text)
    return _joined(made)


def _same(word: str, aliases: Aliases) -> str:
    if word in aliases:
        return aliases[word]
    if numbered := _NUMBERED_TYPE.fullmatch(word):
        return f"Int<{numbered[1]}>"
    return _SAME_NAMES.get(word, _MIXED_INPUT.sub(r"\1", word))


def _joined(texts: Sequence[str]) -> str:
    """Join texts, with a space only between words."""
    joined = ""
    parts: list[str] = []
    for text in texts:
        if joined and (joined[-1].isalnum() or joined[-1] == "_") and (text[0].isalnum() or text[0] == "_"):
            parts.append(" ")
        parts.append(text)
        joined = text
    whole = "".join(parts)
    return {"unsigned char": "uint8_t"}.get(whole, whole)


def parse_alias(tokens: Sequence[Token], aliases: Aliases) -> tuple[str, str] | None:
    """Return the name and the value that a statement gives a type or a constant, or None if it gives none."""
    texts = [token.text for token in tokens[:3]]
    if texts[:1] == ["using"] and texts[2:] == ["="]:
        name, value = texts[1], tokens[3:]
    elif texts[:1] == ["typedef"] and len(tokens) > 2 and tokens[-1].kind is Kind.WORD:  # noqa: PLR2004 # type and name
        name, value = tokens[-1].text, tokens[1:-1]
    elif texts[:1] != ["template"] and any(token.text in {"constexpr", "const"} for token in tokens[:4]):
        equals = next((at for at, token in enumerate(tokens) if token.text in {"=", "(", "{"}), 0)
        if equals < 1 or tokens[equals].text != "=":
            return None
        name, value = tokens[equals - 1].text, tokens[equals + 1 :]
    else:
        return None
    meaning = canonical(value, aliases)
    return (name, meaning) if 0 < len(meaning) <= _LONGEST_ALIAS else None
