"""The FP16 x uint4 instantiations of audited files, byte for byte, without the others."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import Audit, AuditedFile
from w4a16gen.integrations.tensorrt_llm.folders import NotReadError, read_file
from w4a16gen.integrations.tensorrt_llm.instantiations import Instantiation, scan
from w4a16gen.integrations.tensorrt_llm.known import W4A16, classify
from w4a16gen.integrations.tensorrt_llm.owned import write_owned
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, Token, tokenize

SCHEMA = "w4a16gen.extract/1"
"""Kind and version of the manifest in a folder of extracted files."""
_CONDITIONS = frozenset({"if", "ifdef", "ifndef", "elif", "elifdef", "elifndef", "else", "endif"})
_COMMENT_LINE = re.compile(rb"[ \t]*//(?:(?!\*/)[^\"\\\n])*\n")
_REST_OF_LINE = re.compile(rb"[ \t]*(?:/\*[^\n*]*\*/)?[ \t]*(?://[^\\\n]*)?\r?\n")
_BLANK_LINES = re.compile(rb"(?:[ \t]*\r?\n)+")


def extract(audited: Audit, output: Path, *, remove_stale: bool = False) -> Sequence[Path]:
    """Write the FP16 x uint4 instantiations of a folder, also those in mixed files.

    A file keeps all its other bytes: includes, namespaces, macros, comments. Conditions around kept instantiations stay
    whole; conditions that enclosed only removed ones go. Of an instantiation that builds have twice, the first stays.

    Args:
        audited: the result of `audit`.
        output: a new folder, an empty one, or one that an earlier call wrote.
        remove_stale: whether to remove files that an earlier call wrote there and this one does not.

    Returns:
        The extracted files, whether they had to be written or were there already.

    Example:
        >>> extract(audit(Path("generated")), Path("w4a16"))  # doctest: +SKIP

    Raises:
        InvalidValueError: if the output folder is, contains or lies in the audited one, or has a file that no earlier
            call wrote, or if a file cannot be taken apart. Nothing is written then.
        OSError: if the output folder cannot be written.
    """
    here, there = (Path(os.path.realpath(folder)) for folder in (audited.folder, output))
    if here == there or here in there.parents or there in here.parents:
        raise InvalidValueError(f"{output} is, contains or lies in the audited folder: choose another output folder")
    contents: dict[str, bytes] = {}
    kept: dict[tuple[str, ...], list[set[str]]] = {}
    refused = []
    for file in audited.files:
        if W4A16 in file.types:
            try:
                content = _extracted(file, kept)
            except (InvalidValueError, NotReadError) as error:
                refused.append(f"{file.name}: {error}")
            else:
                if content is not None:
                    contents[os.path.relpath(file.path, audited.folder)] = content
    if refused:
        raise InvalidValueError("cannot extract, and wrote nothing: " + "; ".join(refused))
    write_owned(output, SCHEMA, contents, remove_stale=remove_stale, is_exclusive=True)
    return [output / name for name in contents]


def _extracted(file: AuditedFile, kept: dict[tuple[str, ...], list[set[str]]]) -> bytes | None:
    """Return what a file becomes, or None if nothing of it is kept."""
    data = read_file(file.path)
    found = scan(data)
    if found.problems:
        line, message = found.problems[0]
        raise InvalidValueError(f"line {line}: {message}")
    stay: list[Instantiation] = []
    go: list[Instantiation] = []
    for instantiation in found.instantiations:
        conditions = set(instantiation.conditions)
        earlier = kept.setdefault(instantiation.arguments, [])
        is_wanted = classify(instantiation).types == W4A16
        if is_wanted and not any(others <= conditions for others in earlier):
            earlier.append(conditions)
            stay.append(instantiation)
        else:
            go.append(instantiation)
    spans = {(part.begin, part.end) for part in stay}
    for part in go:
        if (part.begin, part.end) in spans:
            raise InvalidValueError(f"line {part.line}: one macro call instantiates kernels to keep and others")
    return _without(data, sorted({(part.begin, part.end) for part in go})) if stay else None


@dataclass
class _Group:
    """A condition from its `#if` to its `#endif`."""

    begin: int
    has_more: bool = False
    """Whether it has anything but removed instantiations."""
    removed: list[tuple[int, int]] = field(default_factory=list)


def _without(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """Return bytes without some parts, and without the conditions that have nothing else."""
    source = Source(data)
    groups = [_Group(0)]
    directive: list[Token] = []
    number = after = 0
    for token in tokenize(source, statements=False):
        begin, end = source.span(token.begin, max(token.end, token.begin + 1))
        while number < len(spans) and spans[number][1] <= begin:
            groups[-1].removed.append(spans[number])
            number += 1
        if token.kind is Kind.END:
            _end_directive(source, groups, directive)
            directive = []
        elif directive or token.kind is Kind.HASH:
            directive.append(token)
        elif token.text == ";" and groups[-1].removed and after <= groups[-1].removed[-1][1]:
            groups[-1].removed[-1] = (groups[-1].removed[-1][0], end)
        elif number == len(spans) or begin < spans[number][0]:
            groups[-1].has_more = True
        after = end
    return _cut(data, groups[0].removed + spans[number:])


def _end_directive(source: Source, groups: list[_Group], directive: list[Token]) -> None:
    """Open or close a group by a directive's tokens."""
    word = directive[1].text if len(directive) > 1 else ""
    if word in {"if", "ifdef", "ifndef"}:
        groups.append(_Group(source.origin(directive[0].begin)))
    elif word == "endif" and len(groups) > 1:
        group = groups.pop()
        if group.removed and not group.has_more:
            groups[-1].removed.append((group.begin, source.span(directive[-1].begin, directive[-1].end)[1]))
        else:
            groups[-1].removed += group.removed
            groups[-1].has_more = True
    elif word not in _CONDITIONS:
        groups[-1].has_more = True


def _cut(data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """Return bytes without some parts, their own comment lines, and the lines that would be left empty."""
    parts = []
    position = 0
    for first, last in spans:
        begin, end = first, last
        line = data.rfind(b"\n", position, begin) + 1 or position
        if not data[line:begin].strip(b" \t"):
            begin = line
            while begin > position:
                line = data.rfind(b"\n", position, begin - 1) + 1 or position
                if not _COMMENT_LINE.fullmatch(data, line, begin):
                    break
                begin = line
            if rest := _REST_OF_LINE.match(data, end):
                end = rest.end()
                is_after_blank = data[max(0, begin - 3) : begin].endswith((b"\n\n", b"\n\r\n"))
                if is_after_blank and (blank := _BLANK_LINES.match(data, end)):
                    end = blank.end()
        parts.append(data[position:begin])
        position = end
    return b"".join([*parts, data[position:]])
