"""The explicit instantiations that a source holds, found by C++'s grammar. One pass over its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from w4a16gen.integrations.tensorrt_llm import declarations
from w4a16gen.integrations.tensorrt_llm.branches import Reach
from w4a16gen.integrations.tensorrt_llm.declarations import Specialization
from w4a16gen.integrations.tensorrt_llm.preprocessor import Preprocessor, SourceError
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, Token, tokenize

LONGEST_STATEMENT = 200_000
"""Tokens; a longer statement is reported, and its end not read."""


class Instantiation(NamedTuple):
    """One explicit instantiation in a file, or one call of a macro that the file does not define."""

    begin: int
    """Offset in the file of its first byte."""
    end: int
    """Offset after its semicolon."""
    line: int
    name: str
    """The function or class template, without namespaces, or the macro."""
    arguments: tuple[str, ...]
    """Template arguments, each without namespaces and written one way; none for a macro."""
    conditions: tuple[str, ...] = ()
    """Conditions of the `#if`s around it that builds may decide differently."""
    is_conditional: bool = False
    """Whether it needs a macro that neither the file nor TensorRT-LLM's build defines."""


class Problem(NamedTuple):
    """Why a file, or a part of it, could not be read as a compiler reads it."""

    line: int
    """0 for the file as a whole."""
    message: str


@dataclass
class Scan:
    """What a source holds."""

    instantiations: list[Instantiation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def scan(data: bytes, *, statements: bool = True) -> Scan:
    """Find the explicit instantiations in a source, and the calls of macros that may instantiate.

    It reads each byte a bounded number of times.

    Args:
        data: the bytes of the file.
        statements: whether plain instantiations are read as a whole; the result is the same, only slower, without.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Scan(problems=[Problem(0, "UTF-16, which compilers do not read: convert it to UTF-8")])
    source = Source(data)
    scanner = _Scanner(source, Preprocessor(source, statements=statements))
    try:
        for token in scanner.preprocessor:
            scanner.feed(token)
        scanner.end_of_file()
    except SourceError as error:
        scanner.report(error.at, str(error))
    return scanner.result


@lru_cache(maxsize=8192)
def _plain(text: str) -> Specialization | None:
    """Return what a plain statement instantiates, where no macro and no alias of the file can matter."""
    tokens = list(tokenize(Source(text.encode("latin-1")), statements=False))
    return declarations.parse_declarator(tokens[1:-1], {})


_Scope = tuple["_Scope | None", bool]
"""The scope around, and whether this one is a namespace. A linked list, so that saving one costs nothing."""


class _Scanner:
    """The state of a scan: the scope, and the statement that is open."""

    def __init__(self, source: Source, preprocessor: Preprocessor) -> None:
        self.preprocessor = preprocessor
        self.result = Scan()
        self._source = source
        self._scope: _Scope | None = None
        self._saved: list[list[_Scope | None]] = []
        self._statement: list[Token] = []
        self._before = ""
        self._is_cut = False
        self._is_crossed = False
        self._aliases: dict[str, str] = {}
        self._ambiguous: set[str] = set()
        self._line = 1
        self._line_offset = 0

    def feed(self, token: Token) -> None:
        """Take the next token that some build reads."""
        kind, text = token.kind, token.text
        if kind is Kind.STATEMENT:
            self._feed_statement(token)
            return
        if kind is Kind.PUNCTUATION and text in _BOUNDARIES:
            statement = self._statement
            if len(statement) >= _SHORTEST_STATEMENT:
                self._end(token)
            elif statement:
                self._statement = []
            if text != ";":
                self._brace(text, statement)
        elif kind is Kind.HASH:
            self._mark(text)
        elif kind is Kind.STRAY:
            self.report(token.begin, f"{text[:20]!r} starts nothing that a compiler reads, or does not end")
        elif self._statement or self._is_namespace or (text == "template" and self._before not in _ACCESS):
            if len(self._statement) < LONGEST_STATEMENT:
                self._statement.append(token)
            else:
                self._is_cut = True
        self._before = text

    def end_of_file(self) -> None:
        """End the last statement."""
        if self._statement:
            is_open = self._statement[0].text == "template"
            self._end(None if is_open else Token(Kind.PUNCTUATION, "}", 0, 0))

    def report(self, at: int, message: str) -> None:
        """Keep a problem with the place of a character of the source's text."""
        if len(self.result.problems) < _MOST_PROBLEMS:
            line = self._source.raw.count("\n", 0, self._source.origin(at)) + 1
            self.result.problems.append(Problem(line, message))

    @property
    def _is_namespace(self) -> bool:
        return self._scope is None or self._scope[1]

    def _feed_statement(self, token: Token) -> None:
        plain = None
        has_context = self._statement or self._aliases or self._ambiguous or self.preprocessor.macros.used_uncertain
        if not has_context and self._before not in _ACCESS:
            plain = _plain(token.text)
        if plain is not None:
            self._found(plain, token.begin, token.end)
            self._before = ";"
            return
        for part in tokenize(self._source, token.begin, token.end, statements=False):
            self.feed(part)

    def _brace(self, text: str, statement: list[Token]) -> None:
        """Enter or leave a scope, from the statement before its brace."""
        if text == "{":
            words = [part.text for part in statement]
            is_namespace = "namespace" in words or words[-2:-1] == ["extern"]
            self._scope = (self._scope, is_namespace and self._is_namespace)
        elif self._scope is not None:
            self._scope = self._scope[0]

    def _mark(self, text: str) -> None:
        """Keep scopes right around branches: each starts in the scope before the `#if`."""
        if self._statement and declarations.leading_calls(self._statement)[1] == len(self._statement):
            self._end(Token(Kind.PUNCTUATION, "}", 0, 0))
        self._is_crossed |= bool(self._statement)
        if text == "if":
            self._saved.append([self._scope])
            return
        saved = self._saved[-1]
        if self.preprocessor.branch.reach is not Reach.DEAD and len(saved) == 1:
            saved.append(self._scope)
        self._scope = saved[0]
        if text == "endif":
            self._scope = saved[-1]
            self._saved.pop()

    def _end(self, last: Token | None) -> None:
        """Read the open statement, which ends at a boundary, or nowhere."""
        statement, self._statement = self._statement, []
        is_crossed, self._is_crossed = self._is_crossed, False
        is_cut, self._is_cut = self._is_cut, False
        is_uncertain, self.preprocessor.macros.used_uncertain = self.preprocessor.macros.used_uncertain, False
        if is_cut:
            self.report(statement[0].begin, f"this statement has more than {LONGEST_STATEMENT} tokens")
        boundary = last.text if last else ""
        calls, after = declarations.leading_calls(statement) if self._is_namespace else ([], 0)
        template = declarations.find_template(statement, after)
        begin = statement[0].begin
        if calls:
            self._found_calls(calls, statement, after, last, follows=template >= 0)
        if template >= 0:
            begin = statement[template].begin
            made = declarations.parse_declarator(statement[template + 1 :], self._aliases)
            if boundary != ";" or made is None or declarations.has_second_template(statement, template):
                self.report(
                    begin, f"the instantiation of {made.name if made and made.name else 'a template'} does not end"
                )
            if made is not None:
                self._found(made, begin, max(begin + 1, last.end if last and boundary == ";" else statement[-1].end))
            if is_crossed:
                self.report(begin, "an #if stands inside this instantiation")
        elif boundary == ";" and not calls:
            self._remember(statement)
        if is_uncertain and (calls or template >= 0):
            self.report(begin, "this instantiation uses a macro that builds define differently")

    def _remember(self, statement: list[Token]) -> None:
        """Keep the alias that a statement defines, unless the file defines it differently elsewhere."""
        alias = declarations.parse_alias(statement, self._aliases)
        if alias is None:
            return
        name, meaning = alias
        if name in self._ambiguous or self._aliases.get(name, meaning) != meaning:
            self._ambiguous.add(name)
            self._aliases.pop(name, None)
        else:
            self._aliases[name] = meaning

    def _found_calls(
        self, calls: list[declarations.Call], statement: list[Token], after: int, last: Token | None, *, follows: bool
    ) -> None:
        """Count calls of unknown macros, except one that a declaration or a body follows and that does not say so."""
        is_last_doubtful = (after < len(statement) and not follows) or (last is not None and last.text == "{")
        for number, (name, begin, end) in enumerate(calls, 1):
            if number == len(calls) and is_last_doubtful and "INST" not in name.upper():
                continue
            is_ended = last is not None and last.text == ";" and number == len(calls) and after == len(statement)
            self._found(Specialization(name, ()), begin, last.end if is_ended and last else end)

    def _found(self, made: Specialization, begin: int, end: int) -> None:
        branch = self.preprocessor.branch
        first, after = self._source.span(begin, end)
        if first >= self._line_offset:
            self._line += self._source.raw.count("\n", self._line_offset, first)
            self._line_offset = first
        self.result.instantiations.append(
            Instantiation(
                first,
                after,
                self._line,
                made.name,
                made.arguments,
                branch.conditions,
                branch.reach is Reach.CONDITIONAL,
            )
        )


_BOUNDARIES = frozenset(";{}")
_ACCESS = frozenset({".", "->", "::"})
_MOST_PROBLEMS = 20
_SHORTEST_STATEMENT = 3
"""Tokens before the boundary that an instantiation, an alias or a macro call needs."""
