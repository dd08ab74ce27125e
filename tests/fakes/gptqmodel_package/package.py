"""GPTQModel's base classes, which check a class's attributes and register the checkpoint's buffers."""

from __future__ import annotations

import sys
from collections import OrderedDict
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch


class BACKEND(str, Enum):
    """GPTQModel's closed list of kernels."""

    GPTQ_MACHETE = "gptq_machete"
    AWQ_MACHETE = "awq_machete"


class METHOD(str, Enum):
    """Methods of quantization."""

    GPTQ = "gptq"
    AWQ = "awq"


class FORMAT(str, Enum):
    """Formats of checkpoints."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    GEMM = "gemm"
    GEMV = "gemv"


class DEVICE(str, Enum):
    """Families of devices."""

    CUDA = "cuda"
    CPU = "cpu"


class PLATFORM(str, Enum):
    """Operating systems."""

    LINUX = "linux"


class Lora:
    """An adapter."""

    def apply(self, x: Any, out: Any) -> Any:
        del x
        return out + 1


REQUIRED = (
    *("BACKENDS", "METHODS", "FORMATS", "BITS", "GROUP_SIZE", "DESC_ACT", "SYM", "SHARDS", "TRAINING", "AUTO_PADDING"),
    *("IN_FEATURES_DIVISIBLE_BY", "OUT_FEATURES_DIVISIBLE_BY", "PACK_DTYPES", "ADAPTERS", "DEVICES", "PLATFORM"),
    "DTYPES",
)
"""What a class says that it supports, in its own attributes."""


class BaseQuantLinear(torch.nn.Module):  # type: ignore[misc]
    """The base of kernels."""

    def __init__(
        self, *, bits: int, in_features: int, out_features: int, bias: bool, backend: Any, adapter: Any, **options: Any
    ) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, in_features, out_features
        self.backend, self.adapter, self.name = backend, adapter, options.pop("name", "a layer")
        self.requested_group_size = options["group_size"]
        self.group_size = in_features if options["group_size"] == -1 else options["group_size"]
        self.desc_act, self.sym = options["desc_act"], options["sym"]
        is_valid, error = self.validate(
            bits=bits, in_features=in_features, out_features=out_features, **options_of_validate(options)
        )
        if error is not None:
            assert not is_valid
            raise error
        self.bias = None
        if bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))
        self.was_initialised = False

    @classmethod
    def validate_once(cls) -> tuple[bool, Exception | None]:
        return True, None

    @classmethod
    def validate(cls, **args: Any) -> tuple[bool, Exception | None]:
        supported = cls.__dict__
        assert [name for name in REQUIRED if f"SUPPORTS_{name}" not in supported] == []
        is_valid, error = cls.validate_once()
        if not is_valid:
            return is_valid, error
        for name, key in (("BITS", "bits"), ("SYM", "sym"), ("DESC_ACT", "desc_act")):
            if key in args and args[key] not in supported[f"SUPPORTS_{name}"]:
                return False, NotImplementedError(f"{key} = {args[key]}")
        group, k = args.get("group_size", -1), args.get("in_features")
        if group not in supported["SUPPORTS_GROUP_SIZE"] and group != k:
            return False, NotImplementedError(f"group_size = {group}")
        if args.get("device") is not None:
            try:
                cls.validate_device(args["device"])
            except NotImplementedError as caught:
                return False, caught
        return True, None

    @classmethod
    def validate_device(cls, device: Any) -> None:
        del device

    def post_init(self) -> None:
        self.was_initialised = True

    def empty_linear_output(self, x: Any) -> Any:
        return x.new_empty((*x.shape[:-1], self.out_features))


def options_of_validate(options: dict[str, Any]) -> dict[str, Any]:
    """Return what a constructor passes on to `validate`."""
    return {name: options[name] for name in ("group_size", "desc_act", "sym", "pack_dtype")}


class GPTQQuantLinear(BaseQuantLinear):
    """A GPTQ layer."""

    def __init__(self, *, register_buffers: bool = False, **options: Any) -> None:
        super().__init__(**options)
        assert register_buffers
        k, n, groups = self.in_features, self.out_features, self.in_features // self.group_size
        self.register_buffer("qweight", torch.zeros(k // 8, n, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, n // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, n, dtype=torch.float16))
        self.register_buffer("g_idx", (torch.arange(k) // self.group_size).to(torch.int32))


class AWQuantLinear(BaseQuantLinear):
    """An AWQ layer."""

    def __init__(self, *, register_buffers: bool = False, **options: Any) -> None:
        super().__init__(**options)
        assert register_buffers
        k, n, groups = self.in_features, self.out_features, self.in_features // self.group_size
        self.register_buffer("qweight", torch.zeros(k, n // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, n // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, n, dtype=torch.float16))


class Machete:
    """GPTQModel's own first kernel."""


def table() -> Any:
    """Return the table of kernels, without this package's."""
    first: Any = [(BACKEND.GPTQ_MACHETE, Machete)]
    return {
        METHOD.GPTQ: {FORMAT.GPTQ: OrderedDict(first), FORMAT.GPTQ_V2: OrderedDict(first)},
        METHOD.AWQ: {FORMAT.GEMM: OrderedDict(first), FORMAT.GEMV: OrderedDict(first)},
    }


MODULES: dict[str, tuple[str, ...]] = {
    "gptqmodel.utils.importer": (),
    "gptqmodel.utils.backend": ("BACKEND",),
    "gptqmodel.quantization": ("METHOD", "FORMAT"),
    "gptqmodel.models._const": ("DEVICE", "PLATFORM"),
    "gptqmodel.adapter.adapter": ("Lora",),
    "gptqmodel.nn_modules.qlinear": ("BaseQuantLinear", "GPTQQuantLinear", "AWQuantLinear"),
}


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the modules into place for one test, and return them by name."""
    made: dict[str, Any] = {}
    for name, members in MODULES.items():
        for part in range(name.count(".") + 1):
            path = ".".join(name.split(".")[: part + 1])
            made.setdefault(path, ModuleType(path))
        made[name].__dict__.update({member: globals()[member] for member in members})
    made["gptqmodel.utils.importer"].AUTO_BACKEND_KERNEL_MAPPING = table()
    for path, module in made.items():
        patch.setitem(sys.modules, path, module)
    return made
