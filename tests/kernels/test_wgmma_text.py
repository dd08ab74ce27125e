"""The text of the WGMMA instructions, whose operands are numbered by hand. The emulation has a stand-in for it."""

from __future__ import annotations

import re

import pytest

from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.kernels.legality import NATIVE_CTA_TOKENS

TEXT = (CUDA_FOLDER / "native" / "wgmma_instruction.cuh").read_text()
COUNTS = [tokens // 2 for tokens in NATIVE_CTA_TOKENS]


def definition(name: str) -> str:
    """Return what a macro of one line stands for."""
    found = re.findall(rf"#define {re.escape(name)} (.*)", TEXT)
    assert len(found) == 1, name
    return str(found[0])


def test_each_number_of_tokens_has_an_instruction_whose_operands_follow_the_sums() -> None:
    lines = re.findall(r"^W4A16_WGMMA\(([\d, ]+)\);$", TEXT, re.MULTILINE)
    found = [tuple(map(int, numbers.split(", "))) for numbers in lines]
    assert found == [(2 * count, count, *range(count, count + 6)) for count in COUNTS]


@pytest.mark.parametrize("count", COUNTS)
def test_each_text_adds_four_sums_to_the_one_before(count: int) -> None:
    before = count - 4
    numbers = ", ".join(f"%{number}" for number in range(before, count))
    assert definition(f"W4A16_TEXT_{count}") == (f'W4A16_TEXT_{before} ", {numbers}"' if before else f'"{numbers}"')
    places = ("first", "first + 1", "first + 2", "first + 3")
    four = ", ".join(f'"+f"(sum[{place}])' for place in places)
    sums = f"W4A16_SUMS_{before}(first), W4A16_SUMS_4((first) + {before})"
    assert definition(f"W4A16_SUMS_{count}(first)") == (sums if before else four)
