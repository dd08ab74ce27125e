"""Where a source tree declares the launcher that its kernels instantiate, and how it names schedules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.folders import NotReadError, find_files, printable, read_file
from w4a16gen.integrations.tensorrt_llm.tokens import Kind, Source, Token, tokenize

LAUNCHER = "sm90_generic_mixed_gemm_kernelLauncher"
"""The function template whose instantiations are the kernels."""
_HEADER = "fpA_intB_launcher_sm90.inl"
_GENERATOR = "generate_kernels.py"
_NAMESPACE = re.compile(r"[A-Za-z_]\w*(?:::[A-Za-z_]\w*)*", re.ASCII)
_INCLUDE = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
_ADDS_MIXED_INPUT = re.compile(rb"^[^#\n]*\+=\s*[\"']MixedInput[\"']", re.MULTILINE)


@dataclass(frozen=True)
class Launcher:
    """The launcher of a source tree. The default fits every release of TensorRT-LLM."""

    include: str = f"tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/{_HEADER}"
    """The header that defines it, as `#include` names it."""
    namespace: str | None = None
    """Its namespace; None if the emitted files are to find it: `cutlass_kernels` or `cutlass_kernels_oss`."""
    root: str = "tensorrt_llm"
    """The namespace that encloses `cutlass_extensions`, whose types it takes, and `kernels`."""
    mixed_input: bool = False
    """Whether main loop schedules end in MixedInput, as TensorRT-LLM's generator wrote them until CUTLASS 3.6."""

    def __post_init__(self) -> None:
        """Refuse what is no name.

        Raises:
            InvalidValueError: if a namespace or the header's path is none.
        """
        for namespace in (self.root, *([] if self.namespace is None else [self.namespace])):
            if not _NAMESPACE.fullmatch(namespace):
                raise InvalidValueError(
                    f"{namespace!r} is not a namespace such as tensorrt_llm::kernels::cutlass_kernels"
                )
        if not _INCLUDE.fullmatch(self.include):
            raise InvalidValueError(f"{self.include!r} is not a header's path such as a/b.inl")


def read_launcher(folder: Path) -> Launcher:
    """Read from a source tree where it declares the launcher, and whether its generator writes MixedInput schedules.

    Args:
        folder: a source tree of TensorRT-LLM or a descendant, or a part that has `fpA_intB_launcher_sm90.inl`.

    Example:
        >>> read_launcher(Path("TensorRT-LLM"))  # doctest: +SKIP
        Launcher(include='tensorrt_llm/...', namespace='tensorrt_llm::kernels::cutlass_kernels_oss', ...)

    Raises:
        InvalidValueError: if there is not exactly one such header, or it does not define the launcher.
    """
    found, _ = find_files(folder, lambda name: name in {_HEADER, _GENERATOR})
    headers = [path for path in found if path.name == _HEADER]
    if len(headers) != 1:
        what = "no" if not headers else ", ".join(printable(str(path)) for path in headers[:3]) + ": more than one"
        raise InvalidValueError(f"{what} {_HEADER} under {folder}: name the folder of one source tree")
    try:
        header = read_file(headers[0])
        generators = [read_file(path) for path in found if path.name == _GENERATOR]
    except NotReadError as error:
        raise InvalidValueError(f"a file under {folder} {error}") from None
    tokens = list(tokenize(Source(header), statements=False))
    scopes = _scopes_of_launcher(tokens)
    if scopes is None:
        raise InvalidValueError(f"{headers[0]} does not define {LAUNCHER}: emit without a source tree")
    root = _root(tokens)
    return Launcher(
        include=_include(tokens) or headers[0].relative_to(folder).as_posix(),
        namespace=_namespace(root, scopes),
        root=root,
        mixed_input=any(_ADDS_MIXED_INPUT.search(text) for text in generators),
    )


def _namespace(root: str, scopes: list[str]) -> str:
    """Return the launcher's namespace from the scopes around it; macros may have opened those that are missing."""
    if scopes[:1] == root.split("::")[:1]:
        return "::".join(scopes)
    return "::".join([root, *([] if "kernels" in scopes else ["kernels"]), *scopes])


def _scopes_of_launcher(tokens: list[Token]) -> list[str] | None:
    """Return the names of the namespaces around the launcher's definition, or None if there is none."""
    scopes: list[list[str]] = []
    names: list[str] | None = None
    for at, token in enumerate(tokens):
        if token.text == "namespace":
            names = []
        elif names is not None and token.kind is Kind.WORD:
            names.append(token.text)
        elif token.text == "{":
            scopes.append(names or [])
            names = None
        elif token.text == "}" and scopes:
            scopes.pop()
        elif token.text != "::":
            names = None
        if token.text == LAUNCHER and at + 1 < len(tokens) and tokens[at + 1].text == "(":
            return [name for scope in scopes for name in scope]
    return None


def _root(tokens: list[Token]) -> str:
    """Return the namespace that the header names before `cutlass_extensions`."""
    for at, token in enumerate(tokens):
        if token.text == "cutlass_extensions" and token.kind is Kind.WORD:
            names: list[str] = []
            while at >= 2 and tokens[at - 1].text == "::" and tokens[at - 2].kind is Kind.WORD:  # noqa: PLR2004 # name and ::
                at -= 2  # noqa: PLW2901 # walks back over the qualifiers
                names.append(tokens[at].text)
            if names:
                return "::".join(reversed(names))
    return "tensorrt_llm"


def _include(tokens: list[Token]) -> str | None:
    """Return the header's own path, from the path of its declaration that it includes."""
    declaration = f"/{_HEADER.removesuffix('.inl')}.h"
    for token in tokens:
        path = token.text[1:-1]
        if token.kind is Kind.LITERAL and path.endswith(declaration) and not path.startswith("."):
            return path.removesuffix(".h") + ".inl"
    return None
