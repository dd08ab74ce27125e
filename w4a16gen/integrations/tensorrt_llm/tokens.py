"""C++ tokens as a compiler forms them: spliced lines, comments, literals, digraphs. One pass, no recursion."""

from __future__ import annotations

import enum
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import NamedTuple


class Kind(enum.Enum):
    """What a token is."""

    WORD = enum.auto()
    """An identifier or a keyword."""
    NUMBER = enum.auto()
    LITERAL = enum.auto()
    """A string or a character literal."""
    PUNCTUATION = enum.auto()
    STATEMENT = enum.auto()
    """From `template` to `;`, where only words, numbers and plain punctuation stand between: a whole instantiation."""
    HASH = enum.auto()
    """The `#` that starts a directive."""
    END = enum.auto()
    """The end of a directive's line."""
    STRAY = enum.auto()
    """A character that no token starts with, or the start of a comment or literal that does not end."""


class Token(NamedTuple):
    """One token, and where it is in `Source.text`."""

    kind: Kind
    text: str
    begin: int
    end: int


_make_token: Callable[[tuple[Kind, str, int, int]], Token] = partial(tuple.__new__, Token)
"""Makes a token in half the time, where there are a million."""
_SPLICE = re.compile(r"\\[ \t\v\f]*\r?\n")


class Source:
    """A file's bytes, one character a byte, with its line continuations removed.

    Bytes above 127 are letters of identifiers, as UTF-8 is to a compiler. Trigraphs are none since C++17.
    """

    def __init__(self, data: bytes) -> None:
        """Decode and splice a file's bytes.

        Args:
            data: the bytes of the file, in ASCII or a superset of it.
        """
        self.raw = data.decode("latin-1")
        self.start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        cuts = [match.span() for match in _SPLICE.finditer(self.raw)] if "\\" in self.raw else []
        ends = [0, *(end for _, end in cuts)]
        starts = [*(begin for begin, _ in cuts), len(self.raw)]
        self.text = "".join(self.raw[begin:end] for begin, end in zip(ends, starts, strict=True)) if cuts else self.raw
        self._cut_starts = starts[:-1]
        self._shifts = [0]
        for begin, end in cuts:
            self._shifts.append(self._shifts[-1] + end - begin)
        self._text_starts = [begin - shift for begin, shift in zip(self._cut_starts, self._shifts, strict=False)]

    def origin(self, offset: int) -> int:
        """Return the offset in the file of a character of `text`."""
        return offset + self._shifts[bisect_right(self._text_starts, offset)]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the offsets in the file of a non-empty part of `text`."""
        return self.origin(begin), self.origin(end - 1) + 1

    def raw_literal_end(self, quote: int) -> int:
        """Return where a raw string ends in `text`, from the offset of its first quote; -1 if it does not end.

        Inside, nothing is spliced: it is read from the bytes of the file.
        """
        opening = _RAW_OPENING.match(self.raw, self.origin(quote))
        if opening is None:
            return -1
        closing = f'){opening[1]}"'
        found = self.raw.find(closing, opening.end())
        if found < 0:
            return -1
        end = found + len(closing)
        return end - self._shifts[bisect_left(self._cut_starts, end)]


_TOKEN = re.compile(
    r"""
    [ \t\r\v\f]*
    (?: (?P<word> [A-Za-z_$\x80-\xff][\w$\x80-\xff]* )
      | (?P<number> \.?[0-9][\w.]*(?:(?:(?<=[eEpP])[+-]|'(?=\w))[\w.]*)* )
      | (?P<newline> \n\s* )
      | (?P<comment> //[^\n]* )
      | (?P<block> /\* )
      | (?P<quote> ["'] )
      | (?P<punctuation>
          %:%: | \#\# | <=> | <<=? | <= | <(?=::(?![:>])) | <% | %> | <: | :> | %: | -> | :: | >= | && | \|\| | [=!]=
          | [-+{}()\[\]<>;:,.?~!*/%^&|=\#] )
      | (?P<rest> \Z )
      | (?P<stray> . )
    )
    """,
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_KINDS = {"number": Kind.NUMBER, "stray": Kind.STRAY}
_DIGRAPHS = {"<%": "{", "%>": "}", "<:": "[", ":>": "]", "%:": "#", "%:%:": "##"}
_RAW_PREFIXES = frozenset({"R", "LR", "uR", "UR", "u8R"})
_RAW_OPENING = re.compile(r"\"([^ ()\\\t\v\f\n]{0,16})\(")
_LITERAL_STOPS = {quote: re.compile(rf"[{quote}\\\n]") for quote in "\"'"}
_HEADER_NAME = re.compile(r"[ \t]*(?:<[^>\n]*>|\"[^\"\n]*\")")
_INCLUDES = frozenset({"include", "include_next", "import", "embed"})
_TEMPLATE_NAME = re.compile(r"\s+[A-Za-z_:]", re.ASCII)
_NOT_PLAIN = re.compile(r"[^\w:\s*&<>,()]", re.ASCII)


def tokenize(
    source: Source, begin: int | None = None, end: int | None = None, *, statements: bool = True
) -> Iterator[Token]:
    """Yield the tokens of a source, in order.

    Every character is read a bounded number of times.

    Args:
        source: the file.
        begin: offset in `source.text` of the first character; by default the start of the file.
        end: offset after the last character; by default the end of the file.
        statements: whether plain explicit instantiations come as one token of kind STATEMENT.
    """
    text = source.text
    stop = len(text) if end is None else end
    position: int | None = source.start if begin is None else begin
    lexer = _Lexer(source, stop, statements=statements)
    while position is not None:
        position = yield from lexer.run(text, position)
    if lexer.in_directive:
        yield Token(Kind.END, "", stop, stop)


class _Lexer:
    """The state that outlives a restart of the regular expression after something that it cannot match itself."""

    def __init__(self, source: Source, stop: int, *, statements: bool) -> None:
        self.in_directive = False
        self._source = source
        self._stop = stop
        self._statements = statements
        self._line_is_empty = True
        self._directive_name = False
        self._plain_until = -1

    def run(self, text: str, position: int) -> Generator[Token, None, int | None]:
        """Yield tokens from a position on; return where to go on, or None at the end."""
        for match in _TOKEN.finditer(text, position, self._stop):
            group = match.lastgroup or ""
            mark = match[group]
            end = match.end()
            begin = end - len(mark)
            first, self._line_is_empty = self._line_is_empty, False
            if group == "punctuation":
                yield self._mark(mark, begin, end, is_first=first)
            elif group == "word":
                after = yield from self._word(text, mark, begin, end)
                if after != end:
                    return after
            elif group == "newline":
                self._line_is_empty = True
                yield from self._end_of_line(begin)
            elif group in _KINDS:
                yield Token(_KINDS[group], mark, begin, end)
            elif group == "quote":
                return (yield from self._literal(text, begin, mark))
            elif group == "block":
                self._line_is_empty = first
                return (yield from self._comment(text, begin, end))
        return None

    def _end_of_line(self, at: int) -> Iterator[Token]:
        if self.in_directive:
            self.in_directive = self._directive_name = False
            yield Token(Kind.END, "", at, at)

    def _mark(self, mark: str, begin: int, end: int, *, is_first: bool) -> Token:
        """Return a punctuation mark, or the start of a directive."""
        mark = _DIGRAPHS.get(mark, mark)
        if is_first and mark == "#":
            self.in_directive = self._directive_name = True
            return Token(Kind.HASH, mark, begin, end)
        return _make_token((Kind.PUNCTUATION, mark, begin, end))

    def _word(self, text: str, word: str, begin: int, end: int) -> Generator[Token, None, int | None]:
        """Yield a word, and what only a word can introduce; return where to go on, or None at the end."""
        if end < self._stop and text[end] == '"' and word in _RAW_PREFIXES:
            after = self._source.raw_literal_end(end)
            yield Token(
                Kind.LITERAL if after >= 0 else Kind.STRAY, text[begin : max(after, end)], begin, max(after, end)
            )
            return after if after >= 0 else None
        if self._directive_name:
            self._directive_name = False
            if word in _INCLUDES and (header := _HEADER_NAME.match(text, end, self._stop)):
                yield Token(Kind.WORD, word, begin, end)
                yield Token(Kind.LITERAL, header[0].strip(), end, header.end())
                return header.end()
        elif word == "template" and self._statements and not self.in_directive:
            semicolon = self._plain_end(text, end)
            if semicolon >= 0:
                yield Token(Kind.STATEMENT, text[begin : semicolon + 1], begin, semicolon + 1)
                return semicolon + 1
        yield _make_token((Kind.WORD, word, begin, end))
        return end

    def _comment(self, text: str, begin: int, end: int) -> Generator[Token, None, int | None]:
        """Skip a comment from its opening mark; return where it ends, or None if it does not end."""
        closing = text.find("*/", end, self._stop)
        if closing >= 0:
            return closing + 2
        yield Token(Kind.STRAY, "/*", begin, end)
        return None

    def _literal(self, text: str, begin: int, quote: str) -> Generator[Token, None, int | None]:
        """Yield a literal from its first quote, or what stands there of its line; return where it ends."""
        position = begin + 1
        while (found := _LITERAL_STOPS[quote].search(text, position, self._stop)) and found[0] == "\\":
            position = found.end() + 1
        kind = Kind.LITERAL if found and found[0] == quote else Kind.STRAY
        end = self._stop if found is None else found.start() if kind is Kind.STRAY else found.end()
        yield Token(kind, text[begin:end], begin, end)
        return end

    def _plain_end(self, text: str, position: int) -> int:
        """Return the offset of the semicolon of a plain instantiation, from the end of its `template`; -1 if none."""
        if not _TEMPLATE_NAME.match(text, position, self._stop):
            return -1
        if position > self._plain_until:
            found = _NOT_PLAIN.search(text, position, self._stop)
            self._plain_until = found.start() if found else self._stop
        until = self._plain_until
        if until >= self._stop or text[until] != ";" or text.find("template", position, until) >= 0:
            return -1
        return until
