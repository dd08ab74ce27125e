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
_UNSIGNED = re.compile(r"[uU][lLzZ]*\Z")
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


def _character(text: str) -> Value:
    """Return the value of a character literal without escapes, or None."""
    return ord(text[1]) if re.fullmatch(r"'[ -&(-\[\]-~]'", text) else None


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
    "||": (2, lambda left, right: int(bool(left or right))),
    "&&": (3, lambda left, right: int(bool(left and right))),
    "|": (4, operator.or_),
    "^": (5, operator.xor),
    "&": (6, operator.and_),
    "==": (7, operator.eq),
    "!=": (7, operator.ne),
    "<": (8, operator.lt),
    ">": (8, operator.gt),
    "<=": (8, operator.le),
    ">=": (8, operator.ge),
    "<<": (9, _shift),
    ">>": (9, _shift_right),
    "+": (10, operator.add),
    "-": (10, operator.sub),
    "*": (11, operator.mul),
    "/": (11, _divide),
    "%": (11, _remainder),
}
"""Operators by their text: precedence and meaning."""
_UNARY: dict[str, Callable[[int], int]] = {
    "!": lambda value: int(not value), "~": operator.invert, "-": operator.neg, "+": operator.pos
}  # fmt: skip
_UNARY_PRECEDENCE = 12
_CHOICE_PRECEDENCE = 1
"""Of `?` and `:`. Only an opening parenthesis binds less, 0."""


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
    if len(tokens) > LONGEST_CONDITION or _may_wrap(tokens):
        return None
    stacks = _Stacks(value_of)
    try:
        for kind, text in _operators(tokens):
            stacks.take(kind, text)
        return stacks.result()
    except (IndexError, KeyError):  # a bracket, an operand or an operator too few
        return None


def _may_wrap(tokens: Sequence[Token]) -> bool:
    """Return whether a condition may compute negative numbers as unsigned ones, which is left unknown."""
    has_unsigned = any(token.kind is Kind.NUMBER and _UNSIGNED.search(token.text) for token in tokens)
    return has_unsigned and any(token.text in {"-", "~", "compl"} for token in tokens)


class _Stacks:
    """Operands and operators that wait for what follows."""

    def __init__(self, value_of: Callable[[str], Value]) -> None:
        self._value_of = value_of
        self._values: list[Value] = []
        self._operators: list[tuple[int, str]] = []
        self._wants_operand = True

    def take(self, kind: Kind, text: str) -> None:
        """Take the next token.

        Raises:
            IndexError, KeyError: if it cannot stand there.
        """
        if kind is not Kind.PUNCTUATION:
            self._operand(kind, text)
        elif self._wants_operand:
            if text != "(" and text not in _UNARY:
                raise KeyError(text)
            self._operators.append((0 if text == "(" else _UNARY_PRECEDENCE, text))
        elif text == ")":
            self._apply_down_to(_CHOICE_PRECEDENCE)
            self._operators.pop()
        elif text in {"?", ":"}:
            self._apply_down_to(_CHOICE_PRECEDENCE + 1)
            if text == ":" and self._operators.pop()[1] != "?":
                raise KeyError(text)
            self._operators.append((_CHOICE_PRECEDENCE, text))
            self._wants_operand = True
        else:
            precedence = _BINARY[text][0]
            self._apply_down_to(precedence)
            self._operators.append((precedence, text))
            self._wants_operand = True

    def result(self) -> Value:
        """Return the value of the whole."""
        self._apply_down_to(_CHOICE_PRECEDENCE)
        if self._operators or len(self._values) != 1:
            raise IndexError
        return self._values[0]

    def _operand(self, kind: Kind, text: str) -> None:
        if not self._wants_operand:
            raise KeyError(text)
        self._wants_operand = False
        if kind is Kind.WORD:
            self._values.append(_LITERALS[text] if text in _LITERALS else self._value_of(text))
        else:
            self._values.append(parse_number(text) if kind is Kind.NUMBER else _character(text))

    def _apply_down_to(self, precedence: int) -> None:
        """Apply the operators that bind at least as tightly as a precedence."""
        while self._operators and self._operators[-1][0] >= precedence:
            level, mark = self._operators.pop()
            right = self._values.pop()
            if level == _UNARY_PRECEDENCE:
                self._values.append(None if right is None else _wrapped(_UNARY[mark](right)))
            elif level == _CHOICE_PRECEDENCE:
                self._choose(mark, self._values.pop(), right)
            else:
                self._values.append(_combine(mark, self._values.pop(), right))

    def _choose(self, mark: str, middle: Value, right: Value) -> None:
        """Apply `condition ? middle : right`."""
        if mark != ":":
            raise KeyError(mark)
        condition = self._values.pop()
        self._values.append(
            (right if middle == right else None) if condition is None else middle if condition else right
        )


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
