"""What `tools/compare_sass.py` calls a difference."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from paths import ROOT

NAME = "w4a16_sm90_native_cs_cta64x8x128_cluster1x1x1_warps8_persistent"
SASS = """
Fatbin elf code:
================
arch = sm_90a
host = linux

	code for sm_90a
		Function : _ZN5w4a166native6kernelINS_63{name}ELi{rows}EEEvNS0_{type}E
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][{address}] ;   /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
"""


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    """Load the script."""
    return runpy.run_path(str(ROOT / "tools" / "compare_sass.py"))


def sass(rows: int = 1, address: str = "0x28", name: str = "10Parameters") -> str:
    return SASS.format(name=NAME, rows=rows, type=name, address=address)


def functions(tool: dict[str, Any], rows: int = 1, address: str = "0x28", name: str = "10Parameters") -> Any:
    return tool["functions_of"](sass(rows, address, name).splitlines())


def test_a_renamed_parameter_type_is_no_difference(tool: dict[str, Any]) -> None:
    assert functions(tool).keys() == {f"{NAME}<1>"}
    assert tool["differences"](functions(tool), functions(tool, name="9Arguments")) == []


def test_another_constant_address_is_a_difference(tool: dict[str, Any]) -> None:
    (difference,) = tool["differences"](functions(tool), functions(tool, address="0x30"))
    assert f"{NAME}<1>: 3 and 3 lines, line 1" in difference
    assert "c[0x0][0x30]" in difference


def test_another_division_into_units_is_no_difference(tool: dict[str, Any]) -> None:
    twice, once = (tool["functions_of"]((sass() * units).splitlines()) for units in (2, 1))
    assert tool["differences"](twice, once) == []


def test_a_missing_and_a_new_function_are_differences(tool: dict[str, Any]) -> None:
    assert tool["differences"](functions(tool, rows=1), functions(tool, rows=2)) == [
        f"{NAME}<1>: only before",
        f"{NAME}<2>: only after",
    ]


def test_functions_without_a_kernel_name_are_told_apart_by_template_arguments(tool: dict[str, Any]) -> None:
    key = tool["function_key"]
    assert key("_ZN5w4a166native11pack_blocksILi2EEEvNS0_14PackParametersE") == "pack_blocks<2>"
    assert key("_ZN5w4a166native10probe_readILi3EEEvPKhll") == "probe_read<3>"
