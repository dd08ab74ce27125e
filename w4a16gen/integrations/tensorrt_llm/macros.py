"""Macros that a file defines, and their expansion within a bound."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, Token, tokenize

LONGEST_EXPANSION = 250_000
"""Tokens that the macros of one file may read and make; a file with more is reported and read no further."""
DEEPEST_EXPANSION = 32
"""Macro calls within arguments of macro calls."""


@dataclass
class Macro:
    """What `#define` says of a name."""

    parameters: tuple[str, ...] | None
    """None for a macro that takes none, and is written without parentheses."""
    body: tuple[Token, ...]
    is_certain: bool = True
    """Whether it is defined so in every build."""

    @property
    def is_variadic(self) -> bool:
        """Whether the last parameter takes the rest of the arguments."""
        return bool(self.parameters) and self.parameters[-1] == "__VA_ARGS__"  # type: ignore[index] # it is not empty


class ExpansionError(Exception):
    """A macro's expansion is too long, too deep, or its call does not end."""


class Tokens:
    """A stream of tokens into which tokens can be pushed back."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        """Stream tokens."""
        self._tokens = iter(tokens)
        self._pushed: list[Token] = []

    def __iter__(self) -> Iterator[Token]:
        while self._pushed:
            yield self._pushed.pop()
        for token in self._tokens:
            yield token
            while self._pushed:
                yield self._pushed.pop()

    def next(self) -> Token | None:
        """Return the next token, or None at the end."""
        return self._pushed.pop() if self._pushed else next(self._tokens, None)

    def push(self, tokens: list[Token]) -> None:
        """Make tokens the next ones."""
        self._pushed.extend(reversed(tokens))


@lru_cache(maxsize=4096)
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z_]\w*", text, re.ASCII))


@dataclass
class Macros:
    """The macros of one file, and what is left of its bound on expansions."""

    source: Source
    table: dict[str, Macro | None] = field(default_factory=dict)
    """None for a name that `#undef` removed."""
    used_uncertain: bool = False
    """Whether a macro was expanded that depends on the build; who reads it resets it."""
    _left: int = LONGEST_EXPANSION

    def define(self, tokens: list[Token]) -> str | None:
        """Take the tokens after `#define`; return the name, or None if there is none."""
        if not tokens or tokens[0].kind is not Kind.WORD:
            return None
        name, rest = tokens[0], tokens[1:]
        if not rest or rest[0].text != "(" or rest[0].begin != name.end:
            self.table[name.text] = Macro(None, tuple(rest))
            return name.text
        closing = next((at for at, token in enumerate(rest) if token.text == ")"), len(rest))
        parameters = [token.text for token in rest[1:closing] if token.text != ","]
        dots = [at for at, text in enumerate(parameters) if text == "."]
        if dots:
            parameters = [*parameters[: dots[0]], "__VA_ARGS__"]
        self.table[name.text] = Macro(tuple(parameters), tuple(rest[closing + 1 :]))
        return name.text

    def concern(self, text: str) -> bool:
        """Return whether a text names a macro of this file."""
        return bool(self.table) and not self.table.keys().isdisjoint(_words(text))

    def expand(self, token: Token, stream: Tokens) -> list[Token]:
        """Return what a macro's name stands for, with the arguments that follow it in a stream.

        All tokens of an expansion are where the call is.

        Raises:
            ExpansionError: if it passes a bound, or the call does not end.
        """
        expanded, end = self._expand(token, stream, frozenset(), 0)
        while expanded and self._takes_arguments(expanded[-1]) and expanded[-1].text != token.text:
            more, after = self._expand(expanded[-1], stream, frozenset(), 0)
            if more == expanded[-1:]:
                break
            expanded, end = expanded[:-1] + more, after
        return [made._replace(begin=token.begin, end=end) for made in expanded]

    def _takes_arguments(self, token: Token) -> bool:
        """Return whether a token names a macro that is written with parentheses, which may follow an expansion."""
        macro = self.table.get(token.text) if token.kind is Kind.WORD else None
        return macro is not None and macro.parameters is not None

    def expand_all(self, tokens: Iterable[Token], hidden: frozenset[str] = frozenset(), depth: int = 0) -> list[Token]:
        """Return tokens with all macros in them expanded, except hidden ones."""
        stream = Tokens(tokens)
        made: list[Token] = []
        while (token := stream.next()) is not None:
            if token.kind is Kind.WORD and token.text not in hidden and self.table.get(token.text) is not None:
                made += self._expand(token, stream, hidden, depth)[0]
            else:
                made.append(token)
        return made

    def _expand(self, token: Token, stream: Tokens, hidden: frozenset[str], depth: int) -> tuple[list[Token], int]:
        """Return an expansion, and where its call ends."""
        macro = self.table[token.text]
        if macro is None:
            return [token], token.end
        if depth > DEEPEST_EXPANSION:
            raise ExpansionError(f"macros nest deeper than {DEEPEST_EXPANSION}")
        end = token.end
        body = list(macro.body)
        if macro.parameters is not None:
            following = stream.next()
            if following is None or following.text != "(" or following.kind is not Kind.PUNCTUATION:
                stream.push([following] if following else [])
                return [token], token.end
            arguments, end = self._arguments(token, stream)
            body = self._substitute(macro, arguments, hidden, depth)
        self.used_uncertain |= not macro.is_certain
        self._spend(len(body) + 1)
        return self.expand_all(_pasted(body), hidden | {token.text}, depth + 1), end

    def _spend(self, tokens: int) -> None:
        self._left -= tokens
        if self._left < 0:
            raise ExpansionError(f"macros read and make more than {LONGEST_EXPANSION} tokens")

    def _arguments(self, name: Token, stream: Tokens) -> tuple[list[list[Token]], int]:
        """Read a call's arguments after its opening parenthesis; return them, and where the call ends."""
        arguments: list[list[Token]] = [[]]
        depth = 1
        while (token := stream.next()) is not None and token.kind is not Kind.HASH:
            if token.kind is Kind.STATEMENT:
                stream.push(list(tokenize(self.source, token.begin, token.end, statements=False)))
                continue
            self._spend(1)
            depth += (token.text == "(") - (token.text == ")") if token.kind is Kind.PUNCTUATION else 0
            if depth == 0:
                return arguments, token.end
            if token.text == "," and depth == 1:
                arguments.append([])
            else:
                arguments[-1].append(token)
        raise ExpansionError(f"the call of macro {name.text} does not end")

    def _substitute(
        self, macro: Macro, arguments: list[list[Token]], hidden: frozenset[str], depth: int
    ) -> list[Token]:
        """Return a macro's body with its parameters replaced; the operands of ## and # are not expanded before."""
        parameters = macro.parameters or ()
        if macro.is_variadic:
            fixed = len(parameters) - 1
            comma = Token(Kind.PUNCTUATION, ",", 0, 0)
            rest = [token for argument in arguments[fixed:] for token in (comma, *argument)][1:]
            arguments = [*arguments[:fixed], rest]
        bound = dict(zip(parameters, arguments, strict=False))
        expanded: dict[str, list[Token]] = {}
        made: list[Token] = []
        for at, token in enumerate(macro.body):
            argument = bound.get(token.text) if token.kind is Kind.WORD else None
            before = macro.body[at - 1].text if at else ""
            after = macro.body[at + 1].text if at + 1 < len(macro.body) else ""
            if argument is None:
                made.append(token)
            elif before == "#":
                made[-1] = Token(Kind.LITERAL, '""', token.begin, token.end)
            elif "##" in {before, after}:
                made += argument
            else:
                if token.text not in expanded:
                    expanded[token.text] = self.expand_all(argument, hidden, depth + 1)
                made += expanded[token.text]
            if len(made) > self._left:
                self._spend(len(made))
        return made


def _pasted(body: list[Token]) -> list[Token]:
    """Return tokens with the neighbours of every ## joined."""
    made: list[Token] = []
    joins = False
    for token in body:
        if token.text == "##" and token.kind is Kind.PUNCTUATION:
            joins = bool(made)
        elif joins:
            left = made.pop()
            made.append(left._replace(text=left.text + token.text))
            joins = False
        else:
            made.append(token)
    return made
