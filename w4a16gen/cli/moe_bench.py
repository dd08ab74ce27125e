"""`w4a16gen bench --moe`: layers of experts, beside dense ones, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from w4a16gen.cli.help import WHICH_PROBLEMS, option
from w4a16gen.cli.options import Parsed, shortened
from w4a16gen.cli.output import end_of_bench, note
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import InvalidValueError

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode
    from w4a16gen.measure.moe import MoeBench, MoePoint, MoeTiming

_Command = TypeVar("_Command", bound=Callable[..., Any])
MOE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
COLUMNS = (
    Column("tokens", right=True, keep=True),
    Column("kernels", keep=True),
    Column("us", right=True, keep=True),
    Column("least", right=True),
    Column("most", right=True),
    Column("of floor", right=True),
    Column("TFLOP/s", right=True),
    Column("experts hit", right=True),
    Column("MB", right=True),
    Column("floor us", right=True),
)
"""Columns in front of those of parts."""


@dataclass(frozen=True)
class MoeChoice:
    """What the options of the command say."""

    models: Sequence[str]
    tokens: Sequence[int]
    """Of each GPU."""
    mode: QuantMode
    rounds: int
    humming: bool | None
    """Whether humming's kernels take part; None where they are installed."""


def mixture_names() -> Iterable[str]:
    """Return the names that `--moe` takes."""
    from w4a16gen.measure.models import MIXTURES

    return MIXTURES


def parse_mixture(text: str) -> str:
    """Read the name of a mixture of experts.

    Raises:
        InvalidValueError: if there is no such model; the text lists them.
    """
    if text not in mixture_names():
        raise InvalidValueError(f"{shortened(text)!r} is not one of {', '.join(mixture_names())}")
    return text


def moe_option(command: _Command) -> _Command:
    """Add the option of layers of experts; the command gets mixtures."""
    return option(
        "--moe",
        "mixtures",
        multiple=True,
        type=Parsed("NAME", parse_mixture, lambda _: mixture_names()),
        section=WHICH_PROBLEMS,
        help="Time a layer of a mixture of experts with grouped kernels. --tokens counts those of each GPU, "
        f"{', '.join(map(str, MOE_TOKENS))} unless given. Repeatable. An unknown name lists the models.",
    )(command)


def moe_bench(choice: MoeChoice, folder: Path | None, *, wide: bool, as_json: bool) -> int:
    """Time layers of experts, show them, and return the exit status."""
    from w4a16gen.measure.models import MIXTURES

    library = services().load(folder)
    measured: list[MoeBench] = []
    for name in choice.models:
        found: MoeBench = services().moe_bench(
            library,
            (name, MIXTURES[name]),
            choice.tokens,
            choice.mode,
            choice.rounds,
            tell=note,
            show_progress=services().show_progress,
            humming=choice.humming,
        )
        measured.append(found)
        if not as_json:
            rows = [_cells(point, timing) for point in found.points for timing in point.timings]
            print_table(_title(found), _columns(), rows, wide=wide)
    wrong = [f"{found.name}, {tokens} tokens: {reason}" for found in measured for tokens, reason in found.wrong.items()]
    return end_of_bench("moe", measured, wrong, library, as_json=as_json)


def _columns() -> Sequence[Column]:
    """Return the columns of the table."""
    from w4a16gen.runtime.expert_plan import MOE_PARTS

    parts = (Column(part, right=True) for part in MOE_PARTS)
    return *COLUMNS, *parts, Column("gate_up kernel"), Column("down kernel")


def _title(found: MoeBench) -> str:
    sizes = found.mixture
    shared = f", on one of {sizes.gpus} GPUs" if sizes.gpus > 1 else ""
    experts = f"{sizes.experts} experts of {sizes.hidden_size} x {sizes.intermediate_size}{shared}"
    slots = sizes.num_experts_per_tok
    return f"{found.name}: {experts}, {slots} for each token; {found.gpu.name}, mode {found.mode}, cold L2, medians"


def _cells(point: MoePoint, timing: MoeTiming) -> tuple[str, ...]:
    """Return the cells of an entrant's row. Those of the point itself are in this package's row."""
    from w4a16gen.measure.moe_entrants import OWN
    from w4a16gen.runtime.expert_plan import MOE_PARTS

    share, times = point.share_of_floor(timing), timing.microseconds.isolated
    cells = (
        str(point.tokens),
        timing.name,
        *(f"{microseconds:.1f}" for microseconds in (timing.median, min(times), max(times))),
        "" if share is None else f"{share:.2f}",
        f"{point.tflops(timing):.0f}",
    )
    if timing.name != OWN:
        return (*cells, *[""] * (len(_columns()) - len(cells)))
    return (
        *cells,
        f"{point.experts_hit:.1f}",
        f"{point.weight_bytes / 1e6:.1f}",
        "" if point.floor is None else f"{point.floor:.1f}",
        *(f"{point.parts[part]:.1f}" if part in point.parts else "" for part in MOE_PARTS),
        *(kernel.shape_name for kernel in point.kernels),
    )
