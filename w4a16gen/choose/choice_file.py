"""The file by which C++ chooses kernels as Python does: what sdk/choice_file.h reads beside an exported library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from w4a16gen.choose import cards
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.timing_table import TOKEN_STEP, table_for
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.legality import CTA_TOKENS

CHOICE_FILE = "share/w4a16/choice.txt"
"""Path in an exported prefix."""
SCHEMA = "w4a16gen.choice/4"
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def choice_text(content_hashes: Mapping[KernelConfig, str], tuning_table: Path) -> str:
    """Return the file for a build: one record per line, fields separated by single spaces, in a fixed order.

    The first line is the schema. Then come the constants of the estimates, the cards, the native kernels of the build
    with their rates, and the times of the build's tuning table. The last line counts the lines before it and holds
    their FNV-1a hash, so that a damaged file is recognised.

    Args:
        content_hashes: the built kernels, each with the hash of all that decided its machine code.
        tuning_table: path of the build's tuning table; it need not exist.
    """
    kernels = sorted(c for c in content_hashes if c.target is Target.NATIVE and not c.is_grouped)
    lines = [SCHEMA, *_constants(), *_cards(), *_kernels(kernels)]
    lines += _tuned({config: content_hashes[config] for config in kernels}, tuning_table)
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}end {len(lines)} {fnv1a(text.encode()):016x}\n"


def _constants() -> Iterator[str]:
    values: dict[str, float] = {
        name: value for name, value in asdict(default_cost_model().constants).items() if not name.startswith("dense_")
    }
    values |= {"token_step": TOKEN_STEP, "smallest_tile_tokens": CTA_TOKENS[0]}
    yield from (f"constant {name} {value!r}" for name, value in values.items())


def _cards() -> Iterator[str]:
    for word, card in (("h100", cards.H100), *(("card", card) for card in cards.CARDS)):
        yield f"{word} {card.sm_count} {card.memory_bandwidth!r} {card.tensor_rate!r} {card.name}"


def _kernels(kernels: Sequence[KernelConfig]) -> Iterator[str]:
    """Yield `kernel name ctas_per_sm`, followed by the kernel's rates."""
    for config in kernels:
        rates = default_cost_model().rates_of(config)
        yield " ".join(["kernel", config.name, str(native_arrangement(config).ctas_per_sm), *map(repr, rates)])


def _tuned(content_hashes: Mapping[KernelConfig, str], path: Path) -> Iterator[str]:
    """Yield the GPU of the tuning table, then `tuned kernel m n k group_size microseconds`."""
    table = table_for(path, None)
    if table is None:
        return
    yield f"tuned_on {table.sm_count} {' '.join(table.gpu.split())}"
    rows = [
        (config.name, *vars(problem).values(), microseconds)
        for mode, problem in table.times
        for config, microseconds in table.valid(mode, problem, content_hashes).items()
    ]
    for row in sorted(rows):
        yield " ".join(["tuned", *map(str, row)])


def fnv1a(data: bytes) -> int:
    """Return the 64-bit FNV-1a hash, which a few lines of C++ compute too."""
    value = _FNV_OFFSET
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & 0xFFFFFFFFFFFFFFFF
    return value
