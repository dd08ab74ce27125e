"""TensorRT-LLM's 63 W4A16 kernels by the template arguments of their instantiations."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

from w4a16gen.integrations.tensorrt_llm.emit import render_trtllm_unit
from w4a16gen.integrations.tensorrt_llm.instantiations import Instantiation, scan
from w4a16gen.integrations.tensorrt_llm.launcher import LAUNCHER
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

W4A16 = "FP16 x uint4"
_TYPES = {
    "half": "FP16",
    "__nv_bfloat16": "BF16",
    "__nv_fp8_e4m3": "FP8",
    "uint4b_t": "uint4",
    "uint8_t": "uint8",
    "float_e2m1_t": "FP4",
    "SafeFP4": "FP4",
}


class Found(NamedTuple):
    """An instantiation, and what it is."""

    instantiation: Instantiation
    types: str
    """Activation x weight in the field's words; other templates, and macros, by their name."""
    kernel: str | None
    """The name of the kernel of space `trtllm` that it is."""

    @property
    def is_conditional(self) -> bool:
        """Whether it needs a macro that neither the file nor TensorRT-LLM's build defines."""
        return self.instantiation.is_conditional


def classify(instantiation: Instantiation) -> Found:
    """Return an instantiation with its types and its kernel."""
    return Found(instantiation, *_meaning(instantiation.name, instantiation.arguments))


@lru_cache(maxsize=8192)
def _meaning(name: str, arguments: tuple[str, ...]) -> tuple[str, str | None]:
    if name != LAUNCHER or len(arguments) < 2:  # noqa: PLR2004 # activation and weight
        return name, None
    config = known_kernels().get(arguments)
    return " x ".join(_TYPES.get(argument, argument) for argument in arguments[:2]), config.name if config else None


@cache
def known_kernels() -> dict[tuple[str, ...], KernelConfig]:
    """Return the 63 by their template arguments, read from what is rendered for them."""
    known = {}
    for config in enumerate_space("trtllm"):
        (only,) = scan(render_trtllm_unit([config]).encode()).instantiations
        known[only.arguments] = config
    return known
