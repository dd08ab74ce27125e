"""The types and options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from w4a16gen.cli.help import FILES, METHOD, OUTPUT, WHICH_KERNELS, option
from w4a16gen.cli.paths import NamedPath
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import NAME_PATTERN, ClusterShape, CtaShape, Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.named_spaces import SPACES
from w4a16gen.kernels.problem import MAX_DIMENSION, Problem

if TYPE_CHECKING:
    Type = click.ParamType[Any]
else:
    Type = click.ParamType  # generic from click 8.4 on only

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SHOWN_CHARACTERS = 100
_INTEGER = re.compile(r"-?[0-9]{1,20}")
SHAPE = "CHANNELSxTOKENSxK"
KERNEL_NAME_START = "w4a16_sm90_"


def shortened(text: str) -> str:
    """Return the beginning of a text that is too long for a message."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


class Parsed(Type):
    """A value that a function of this package parses; its error becomes a usage error."""

    def __init__(
        self,
        name: str,
        parse: Callable[[str], Any],
        complete: Callable[[click.Context], Iterable[str]] = lambda _: (),
    ) -> None:
        """Take the name for help texts, the parser, and the values to complete."""
        self.name = name
        self._parse = parse
        self._complete = complete

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text; return any other value as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidValueError as error:
            self.fail(str(error).replace(value, shortened(value)), param, ctx)
        except ValueError:
            self.fail(f"{shortened(value)!r} is not a valid {self.name}", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002
        """Return the name as help shows it."""
        return self.name

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Return the values that begin with what was typed."""
        try:
            return [CompletionItem(value) for value in self._complete(ctx) if value.startswith(incomplete)]
        except Exception:  # noqa: BLE001  (a shell has no use for errors)
            return []


def parse_mode(text: str) -> QuantMode:
    """Read a quantisation mode from its tag or its full name."""
    for mode in QuantMode:
        if text.lower() in (mode.value, mode.name.lower()):
            return mode
    raise InvalidValueError(f"{text!r} is not one of {', '.join(mode.value for mode in QuantMode)}")


def parse_target(text: str) -> Target:
    """Read a kernel family from its name."""
    if text in (target.value for target in Target):
        return Target(text)
    raise InvalidValueError(f"{text!r} is not one of {', '.join(target.value for target in Target)}")


def parse_kernel(text: str) -> KernelConfig:
    """Read a kernel's name, with or without the prefix that all kernels share."""
    whole = f"{KERNEL_NAME_START}{text}"
    return KernelConfig.parse(whole if NAME_PATTERN.fullmatch(whole) else text)


def _shapes(axis: str) -> list[str]:
    """Return the shapes of all legal kernels along an axis, as texts."""
    from w4a16gen.kernels.spaces import enumerate_space

    return [str(shape) for shape in sorted({getattr(config, axis) for config in enumerate_space("all")})]


def complete_kernels(ctx: click.Context) -> list[str]:
    """Return the long and short names of the build's kernels, or of the default space's if there is no build."""
    import json

    from w4a16gen.kernels.spaces import enumerate_space
    from w4a16gen.runtime.artifact import MANIFEST
    from w4a16gen.runtime.folders import folder_to_load

    folder = ctx.params.get("folder") or folder_to_load()
    try:
        kernels = json.loads((folder / MANIFEST).read_bytes())["kernels"]
        names = [str(kernel["name"]) for kernel in kernels]
    except (OSError, ValueError, KeyError, TypeError):
        names = [config.name for config in enumerate_space("default")]
    return [*names, *(name.removeprefix(KERNEL_NAME_START) for name in names)]


def counts(least: int, most: int = MAX_DIMENSION) -> Parsed:
    """Return the type of a whole number in a range."""

    def parse(text: str) -> int:
        number = int(text) if _INTEGER.fullmatch(text) else least - 1
        if not least <= number <= most:
            raise InvalidValueError(f"{text!r} must be a whole number from {least} to {most}")
        return number

    return Parsed("COUNT", parse)


MODE = Parsed("MODE", parse_mode, lambda _: [mode.value for mode in QuantMode])
MODE_HELP = "cs: one scale per channel; fgs: one scale per group; fgsz: scales and zeros per group."
TARGETS = [target.value for target in Target]
SPACE_SUMMARIES = ". ".join(f"{name}: {space.summary}" for name, space in SPACES.items())

cta_option = option(
    "--cta",
    "ctas",
    multiple=True,
    type=Parsed(SHAPE, CtaShape.parse, lambda _: _shapes("cta")),
    section=WHICH_KERNELS,
    help="CTA shape: output channels, tokens, K. Repeatable.",
)
cluster_option = option(
    "--cluster",
    "clusters",
    multiple=True,
    type=Parsed(SHAPE, ClusterShape.parse, lambda _: _shapes("cluster")),
    section=WHICH_KERNELS,
    help="Cluster shape in CTAs: along output channels, tokens, K. Repeatable.",
)
modes_option = option(
    "--mode", "modes", multiple=True, type=MODE, section=WHICH_KERNELS, help=f"{MODE_HELP} Repeatable."
)
EPILOGUE = Parsed("EPILOGUE", Epilogue.parse, lambda _: [epilogue.value for epilogue in Epilogue])
EPILOGUE_HELP = (
    "none: the plain product; elementwise: an activation, a residual or both, chosen by each call; gated: SwiGLU or "
    "GeGLU. Native kernels only."
)
epilogues_option = option(
    "--epilogue",
    "epilogues",
    multiple=True,
    type=EPILOGUE,
    section=WHICH_KERNELS,
    help=f"{EPILOGUE_HELP} Repeatable.  [default: none]",
)
target_option = option(
    "--target",
    "targets",
    multiple=True,
    type=Parsed("TARGET", parse_target, lambda _: TARGETS),
    section=WHICH_KERNELS,
    help="Kernel family: native or cutlass. Repeatable.",
)
space_option = option(
    "--space",
    "spaces",
    multiple=True,
    type=click.Choice(list(SPACES)),
    metavar="SPACE",
    section=WHICH_KERNELS,
    help=f"Named set of kernels. {SPACE_SUMMARIES}. Repeatable: the union. Without it: default, or with the filters "
    "above the first of these sets with a kernel for every value named.",
)


def filter_options(command: _Command) -> _Command:
    """Add the options that select kernels; the command gets ctas, clusters, modes, targets, epilogues and spaces."""
    for add in (space_option, epilogues_option, target_option, modes_option, cluster_option, cta_option):
        command = add(command)
    return command


mode_option = option("--mode", type=MODE, default="fgs", show_default=True, section=METHOD, help=MODE_HELP)
json_option = option(
    "--json", "as_json", is_flag=True, section=OUTPUT, help="Print one JSON object on standard output, errors included."
)
wide_option = option("--wide", is_flag=True, section=OUTPUT, help="Print all columns, whatever the terminal's width.")
generated_option = option(
    "--generated-dir",
    "generated",
    type=NamedPath(file_okay=False),
    default=Path("generated"),
    show_default=True,
    section=FILES,
    help="Folder of the kernel sources.",
)
sources_option = option(
    "--generated-dir",
    "generated",
    type=NamedPath(file_okay=False),
    section=FILES,
    help="Folder of the kernel sources.  [default: the one that the build names]",
)
build_option = option(
    "--build-dir",
    "folder",
    type=NamedPath(file_okay=False),
    section=FILES,
    help="Folder of the build.  [default: $W4A16GEN_BUILD_DIR, else ./build]",
)
jobs_option = option(
    "--jobs",
    "-j",
    type=counts(1),
    section=METHOD,
    help="Compilers to run at once.  [default: by cores and free memory]",
)


def count_option(
    *names: str, section: str, most: int = MAX_DIMENSION, **attributes: Any
) -> Callable[[_Command], _Command]:
    """Add an option that takes a positive whole number."""
    return option(*names, section=section, type=counts(1, most), **attributes)


def dimension_arguments(least_tokens: int) -> Callable[[_Command], _Command]:
    """Add the arguments M, N and K, and --group-size."""

    def decorate(command: _Command) -> _Command:
        command = count_option(
            "--group-size", section=METHOD, help="Values of K that share a scale.  [default: 128; K in mode cs]"
        )(command)
        for name, least in (("k", 1), ("n", 1), ("m", least_tokens)):
            command = click.argument(name, metavar=name.upper(), type=counts(least))(command)
        return command

    return decorate


def problem_of(m: int, n: int, k: int, group_size: int | None, mode: QuantMode) -> Problem:
    """Return the problem that M, N, K and --group-size name."""
    return Problem(m, n, k, group_size or (min(128, k) if mode.is_grouped else k))


MOST_MINUTES = 365 * 24 * 60


def parse_minutes(text: str) -> float:
    """Read a positive number of minutes, a year at most."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= MOST_MINUTES:
        raise InvalidValueError(f"{text!r} must be a number of minutes above 0, {MOST_MINUTES} at most")
    return minutes


def parse_percent(text: str) -> float:
    """Read a number from 0 to 100."""
    try:
        percent = float(text)
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:  # noqa: PLR2004
        raise InvalidValueError(f"{text!r} must be a percentage, 0 to 100")
    return percent
