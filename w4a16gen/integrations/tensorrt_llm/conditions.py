"""Conditions of `#if`, with values that may be unknown: a build can define what no file here does."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Token

Value = int | None
"""An integer of 64 bits, or None where it depends on the build."""

LONGEST_CONDITION = 4096
"""Tokens; the value of a longer condition counts as unknown."""
_BITS = 64
_LONGEST_NUMBER = 66
_NUMBER = re.compile(r"(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|(0[0-7]*)|([1-9][0-9]*))[uUlLzZ]*")
_SPELLED = {
    "and": "&&", "or": "||", "not": "!", "bitand": "&", "bitor": "|", "xor": "^", "compl": "~", "not_eq": "!="
}  # fmt: skip
_LITERALS = {"true": 1, "false": 0}


def parse_number(text: str) -> Value:
    """Return the value of an integer literal, or None if it is none or has more digits than an integer holds."""
    if len(text) > _LONGEST_NUMBER or not (match := _NUMBER.fullmatch(text.replace("'", ""))):
        return None
    hexadecimal, binary, octal, decimal = match.groups()
    if hexadecimal is not None:
        return int(hexadecimal, 16)
    if binary is not None:
        return int(binary, 2)
    return int(octal, 8) if octal is not None else int(decimal)


def _wrapped(value: int) -> int:
    """Return a value as 64 bits hold it."""
    value &= (1 << _BITS) - 1
    return value - (1 << _BITS) if value >> (_BITS - 1) else value


def _divide(left: int, right: int) -> Value:
    return None if right == 0 else abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _remainder(left: int, right: int) -> Value:
    return None if right == 0 else abs(left) % abs(right) * (-1 if left < 0 else 1)


def _shift(left: int, right: int) -> Value:
    return _wrapped(left << right) if 0 <= right < _BITS else None


def _shift_right(left: int, right: int) -> Value:
    return left >> right if 0 <= right < _BITS else None


_BINARY: dict[str, tuple[int, Callable[[int, int], Value]]] = {
    "||": (1, lambda left, right: int(bool(left or right))),
    "&&": (2, lambda left, right: int(bool(left and right))),
    "|": (3, operator.or_),
    "^": (4, operator.xor),
    "&": (5, operator.and_),
    "==": (6, operator.eq),
    "!=": (6, operator.ne),
    "<": (7, operator.lt),
    ">": (7, operator.gt),
    "<=": (7, operator.le),
    ">=": (7, operator.ge),
    "<<": (8, _shift),
    ">>": (8, _shift_right),
    "+": (9, operator.add),
    "-": (9, operator.sub),
    "*": (10, operator.mul),
    "/": (10, _divide),
    "%": (10, _remainder),
}
"""Operators by their text: precedence and meaning."""
_UNARY: dict[str, Callable[[int], int]] = {
    "!": lambda value: int(not value), "~": operator.invert, "-": operator.neg, "+": operator.pos
}  # fmt: skip
_UNARY_PRECEDENCE = 11


def _combine(mark: str, left: Value, right: Value) -> Value:
    """Apply a binary operator. `0 && x` and `1 || x` are known whatever x is."""
    known = [bool(value) for value in (left, right) if value is not None]
    if mark == "&&" and False in known:
        return 0
    if mark == "||" and True in known:
        return 1
    if left is None or right is None:
        return None
    value = _BINARY[mark][1](left, right)
    return None if value is None else _wrapped(int(value))


def evaluate(tokens: Sequence[Token], value_of: Callable[[str], Value]) -> Value:
    """Return the value of a condition, or None if it is unknown or no expression.

    Args:
        tokens: the condition, with macros expanded and `defined` replaced by numbers.
        value_of: the value of a name that is no macro here.
    """
    if len(tokens) > LONGEST_CONDITION:
        return None
    values: list[Value] = []
    pending: list[str] = []

    def apply() -> None:
        mark = pending.pop()
        if mark[0] == "u":
            value = values.pop()
            values.append(None if value is None else _wrapped(_UNARY[mark[1:]](value)))
        else:
            right, left = values.pop(), values.pop()
            values.append(_combine(mark, left, right))

    def precedence(mark: str) -> int:
        return 0 if mark == "(" else _UNARY_PRECEDENCE if mark[0] == "u" else _BINARY[mark][0]

    wants_operand = True
    try:
        for kind, text in _operators(tokens):
            if wants_operand:
                if kind is not Kind.PUNCTUATION:
                    number = parse_number(text) if kind is Kind.NUMBER else _LITERALS.get(text)
                    values.append(number if kind is not Kind.WORD or number is not None else value_of(text))
                    wants_operand = False
                elif text in _UNARY:
                    pending.append(f"u{text}")
                elif text == "(":
                    pending.append(text)
                else:
                    return None
            elif text == ")":
                while pending[-1] != "(":
                    apply()
                pending.pop()
            elif kind is Kind.PUNCTUATION and text in _BINARY:
                while pending and precedence(pending[-1]) >= _BINARY[text][0]:
                    apply()
                pending.append(text)
                wants_operand = True
            else:
                return None
        while pending:
            apply()
    except (IndexError, KeyError):
        return None
    return values[0] if len(values) == 1 else None


def _operators(tokens: Sequence[Token]) -> list[tuple[Kind, str]]:
    """Return kinds and texts, with spelled operators as marks and `> >` as the shift that it is in a condition."""
    found: list[tuple[Kind, str]] = []
    after = -1
    for kind, text, begin, end in tokens:
        if kind is Kind.WORD and text in _SPELLED:
            found.append((Kind.PUNCTUATION, _SPELLED[text]))
        elif text == ">" and found and found[-1][1] == ">" and begin == after:
            found[-1] = (Kind.PUNCTUATION, ">>")
        else:
            found.append((kind, text))
        after = end
    return found
