"""Directives: which tokens a compiler reads in some build, under which conditions, with the file's macros expanded."""

from __future__ import annotations

import re
from collections.abc import Iterator

from w4a16gen.integrations.tensorrt_llm.branches import Branch, Reach, condition_text, negated
from w4a16gen.integrations.tensorrt_llm.conditions import LONGEST_CONDITION, Value, evaluate
from w4a16gen.integrations.tensorrt_llm.macros import ExpansionError, Macro, Macros, Tokens
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, Token, tokenize

DEEPEST_CONDITION = 256
"""Conditions within conditions; a file with more is reported and read no further."""
LONGEST_DIRECTIVE = 20_000
"""Tokens; a longer macro is reported, and the file read no further."""
_OF_BUILDS = re.compile(r"ENABLE_\w+|COMPILE_\w+|EXCLUDE_\w+|USE_\w+|CUDA_VERSION|CUDART_VERSION|_[A-Z_]\w*", re.ASCII)
"""Names that TensorRT-LLM's or its descendants' builds, or compilers, may define or not."""
_PREDEFINED = {"__cplusplus": "201703", "__CUDACC__": "1", "__NVCC__": "1"}
_FORMS = (("defined", ""), ("defined", "(", "", ")"), ("!", "defined", ""), ("!", "defined", "(", "", ")"))


class SourceError(Exception):
    """A file that no compiler accepts, or that passes a bound."""

    def __init__(self, message: str, at: int) -> None:
        """Keep a message and the offset in `Source.text` that it is about."""
        super().__init__(message)
        self.at = at


class Preprocessor:
    """The tokens of a source that some build reads. Branches are marked by HASH tokens: `if`, `else`, `endif`.

    A mark comes before the branch changes.
    """

    def __init__(self, source: Source, *, statements: bool = True) -> None:
        """Prepare to read a source; see `tokenize` for `statements`."""
        self.branch = Branch(None, 0, Reach.LIVE)
        self.macros = Macros(source)
        for name, value in _PREDEFINED.items():
            self.macros.table[name] = Macro(None, (Token(Kind.NUMBER, value, 0, 0),))
        self._assumed: dict[str, list[bool]] = {}
        self._source = source
        self._stream = Tokens(tokenize(source, statements=statements))
        self._depth = 0

    def __iter__(self) -> Iterator[Token]:
        """Yield the tokens.

        Raises:
            SourceError: if directives do not match, or a bound is passed.
        """
        names = self.macros.table
        for token in self._stream:
            kind = token.kind
            if kind is Kind.HASH:
                yield from self._directive(token)
            elif self.branch.reach is Reach.DEAD:
                continue
            elif kind is Kind.STATEMENT:
                if self.macros.concern(token.text):
                    self._stream.push(list(tokenize(self._source, token.begin, token.end, statements=False)))
                else:
                    yield token
            elif kind is Kind.WORD and names.get(token.text) is not None:
                yield from self._expanded(token)
            else:
                yield token
        if self.branch.parent is not None:
            raise SourceError("this #if has no #endif", self.branch.begin)

    def _expanded(self, token: Token) -> list[Token]:
        try:
            return self.macros.expand(token, self._stream)
        except ExpansionError as error:
            raise SourceError(str(error), token.begin) from None

    def _directive(self, hash_token: Token) -> Iterator[Token]:
        line: list[Token] = []
        while (token := self._stream.next()) is not None and token.kind is not Kind.END:
            if len(line) < LONGEST_DIRECTIVE:
                line.append(token)
        name = line[0].text if line else ""
        rest = line[1:]
        if name in {"if", "ifdef", "ifndef"}:
            yield hash_token._replace(text="if")
            self._open(hash_token, self._condition(name, rest))
        elif name in {"elif", "elifdef", "elifndef", "else", "endif"}:
            if self.branch.parent is None:
                raise SourceError(f"#{name} without #if", hash_token.begin)
            yield hash_token._replace(text="endif" if name == "endif" else "else")
            self._leave()
            if name == "endif":
                self._close()
            elif self.branch.has_else:
                raise SourceError(f"#{name} after #else", hash_token.begin)
            else:
                self._next(self._condition(name[2:], rest) if name != "else" else [], is_else=name == "else")
        elif self.branch.reach is not Reach.DEAD and name in {"define", "undef"}:
            if len(line) == LONGEST_DIRECTIVE:
                raise SourceError(f"this #{name} has {LONGEST_DIRECTIVE} tokens or more", hash_token.begin)
            changed = self.macros.define(rest) if name == "define" else self._undefine(rest)
            self.branch.changed += [changed] if changed else []

    def _undefine(self, rest: list[Token]) -> str | None:
        name = rest[0].text if rest else ""
        if name in self.macros.table or self.branch.is_in_every_build:
            self.macros.table[name] = None
            return name
        return None

    @staticmethod
    def _condition(name: str, rest: list[Token]) -> list[Token]:
        """Return the condition of a directive as `#if` has it."""
        if name == "if":
            return rest
        words = [("defined", Kind.WORD)] if name == "ifdef" else [("!", Kind.PUNCTUATION), ("defined", Kind.WORD)]
        return [*(Token(kind, text, 0, 0) for text, kind in words), *rest[:1]]

    def _open(self, hash_token: Token, condition: list[Token]) -> None:
        parent = self.branch
        self._depth += 1
        if self._depth > DEEPEST_CONDITION:
            raise SourceError(f"conditions nest deeper than {DEEPEST_CONDITION}", hash_token.begin)
        self.branch = Branch(parent, hash_token.begin, parent.reach)
        self._enter(condition)

    def _next(self, condition: list[Token], *, is_else: bool) -> None:
        branch = self.branch
        branch.has_else = is_else
        if branch.condition:
            branch.earlier.append(negated(branch.condition))
        if branch.decides_on is not None:
            values = self._assumed[branch.decides_on]
            values[-1] = not values[-1]
        self._enter(condition if not is_else else [Token(Kind.NUMBER, "1", 0, 0)])

    def _enter(self, condition: list[Token]) -> None:
        """Decide in which builds the branch with a condition is read."""
        branch = self.branch
        outer = branch.parent.reach if branch.parent else Reach.LIVE
        branch.decides_on = None
        if outer is Reach.DEAD:
            branch.reach = Reach.DEAD
            return
        ours, any_build = (self._value(condition, of_any=of_any) for of_any in (False, True))
        possible = [value != 0 and not taken for value, taken in zip((ours, any_build), branch.taken, strict=True)]
        branch.reach = Reach.DEAD if not possible[1] else outer if possible[0] else Reach.CONDITIONAL
        is_sure = any_build not in {0, None}
        branch.is_certain = is_sure and not branch.may_be_taken
        branch.is_in_every_build = branch.is_certain and (branch.parent is None or branch.parent.is_in_every_build)
        branch.condition = "" if is_sure else condition_text(condition)
        branch.taken = [
            taken or value not in {0, None} for value, taken in zip((ours, any_build), branch.taken, strict=True)
        ]
        branch.may_be_taken |= possible[1]
        texts = tuple(token.text for token in condition)
        for form in _FORMS:
            if len(form) == len(texts) and all(part in {"", text} for part, text in zip(form, texts, strict=True)):
                name = texts[form.index("")]
                self._assumed.setdefault(name, []).append(form[0] != "!")
                branch.assumed.append(name)
                branch.decides_on = name

    def _leave(self) -> None:
        """End a branch: what it defined is uncertain after it, unless every build reads it."""
        branch = self.branch
        if not branch.is_certain:
            for name in branch.changed:
                macro = self.macros.table.get(name)
                self.macros.table[name] = (
                    Macro(macro.parameters, macro.body, False) if macro else Macro(None, (), False)
                )
        if branch.parent is not None:
            branch.parent.changed += branch.changed
        branch.changed = []

    def _close(self) -> None:
        branch = self.branch
        for name in branch.assumed:
            self._assumed[name].pop()
        self._depth -= 1
        self.branch = branch.parent or branch

    def _value(self, condition: list[Token], *, of_any: bool) -> Value:
        """Return a condition's value in builds of TensorRT-LLM, or in any build; None where builds differ."""
        if len(condition) > LONGEST_CONDITION:
            return None
        tokens: list[Token] = []
        at = 0
        while at < len(condition):
            token = condition[at]
            operand = condition[at + 1 : at + 4]
            if token.text == "defined" and operand:
                name = operand[1].text if operand[0].text == "(" and len(operand) > 1 else operand[0].text
                at += 4 if operand[0].text == "(" else 2
                value = self._is_defined(name, of_any=of_any)
                made = (
                    Token(Kind.WORD, "__unknown", 0, 0) if value is None else Token(Kind.NUMBER, str(int(value)), 0, 0)
                )
                tokens.append(made)
            else:
                tokens.append(token)
                at += 1
        try:
            expanded = self.macros.expand_all(tokens)
        except ExpansionError:
            return None
        if self.macros.used_uncertain:
            self.macros.used_uncertain = False
            return None
        return evaluate(expanded, lambda name: self._value_of(name, of_any=of_any))

    def _is_defined(self, name: str, *, of_any: bool) -> bool | None:
        macro = self.macros.table.get(name)
        if name in self.macros.table and (macro is None or macro.is_certain):
            return macro is not None
        if self._assumed.get(name):
            return self._assumed[name][-1]
        if name in self.macros.table or of_any or _OF_BUILDS.fullmatch(name):
            return None
        return False

    def _value_of(self, name: str, *, of_any: bool) -> Value:
        return 0 if self._is_defined(name, of_any=of_any) is False else None
