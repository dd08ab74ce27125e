"""The modules that replace a model's linear layers: they load GPTQ's or AWQ's tensors, then keep the packed weight."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError, UnsupportedProblemError
from w4a16gen.integrations.engines.layer import RawLayer, pack_layer
from w4a16gen.integrations.engines.limits import LayerRequest, why_not_served
from w4a16gen.integrations.engines.order import plan_act_order, plan_order
from w4a16gen.integrations.engines.store import LayerStore
from w4a16gen.integrations.engines.switch import why_off
from w4a16gen.integrations.engines.words import awq_points, gptq_zero_points
from w4a16gen.integrations.torch.nibbles import expand, expand_awq
from w4a16gen.kernels.problem import DIMENSION_MULTIPLE, NATIVE_GROUP_MULTIPLE

LARGEST_GROUP = 1024
"""The largest group size that GPTQModel's table lists, beside k."""


def capability_of(device: Any) -> tuple[int, int] | None:
    """Return the compute capability of a device, or None if it is no CUDA GPU.

    Args:
        device: a device of torch, or a member of GPTQModel's `DEVICE`.
    """
    name = getattr(device, "type", None) or getattr(device, "value", None) or str(device)
    if str(name).partition(":")[0] != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device if isinstance(device, torch.device) else None)
    return int(major), int(minor)


class _Linear:
    """What the modules for GPTQ and AWQ share; GPTQModel's class is the other base."""

    def __init__(  # noqa: PLR0913  (GPTQModel's arguments)
        self,
        bits: int,
        group_size: int,
        desc_act: bool,
        sym: bool,
        in_features: int,
        out_features: int,
        bias: bool = False,
        pack_dtype: Any = torch.int32,
        adapter: Any = None,
        register_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        """Register the buffers that the checkpoint's tensors are loaded into; see GPTQModel's class."""
        del register_buffers  # the checkpoint's tensors need a place in any case
        inherited: Any = super()
        inherited.__init__(
            bits=bits,
            group_size=group_size,
            desc_act=desc_act,
            sym=sym,
            in_features=in_features,
            out_features=out_features,
            bias=bias,
            pack_dtype=pack_dtype,
            backend=kwargs.pop("backend", None),
            adapter=adapter,
            register_buffers=True,
            **kwargs,
        )
        self._store = LayerStore("qweight", keeps_address=False)

    @classmethod
    def validate_once(cls) -> tuple[bool, Exception | None]:
        """Return whether the kernels are turned on, and why not."""
        reason = why_off()
        return reason is None, None if reason is None else UnsupportedProblemError(reason)

    @classmethod
    def validate(cls, **args: Any) -> tuple[bool, Exception | None]:
        """Return whether a layer, or a model without sizes, is served, and why not.

        Args:
            **args: what GPTQModel knows about it: bits, group_size, sym, in_features, out_features, dtype, device.
        """
        inherited: Any = super()
        is_valid, error = inherited.validate(**args)
        if not is_valid:
            return is_valid, error
        reason = _why_not(args)
        return reason is None, None if reason is None else UnsupportedProblemError(reason)

    @classmethod
    def validate_device(cls, device: Any) -> None:
        """Raise unless a device is a Hopper GPU.

        Args:
            device: a device of torch, or a member of GPTQModel's `DEVICE`.

        Raises:
            NotImplementedError: if it is not; GPTQModel expects this class.
        """
        reason = why_not_served(_smallest(capability_of(device)))
        if reason is not None:
            raise NotImplementedError(reason)

    def post_init(self) -> None:
        """Pack the weight on the device that holds it, and free the checkpoint's tensors. It may be called again."""
        module: Any = self
        group = module.in_features if module.group_size == -1 else module.group_size
        if getattr(module, "desc_act", False) and group != module.in_features:
            order = plan_act_order(module.g_idx, group)
        else:
            order = plan_order(module.in_features, group, device=module.qweight.device)
        packed = pack_layer(self._raw(), order, name=str(module.name))
        self._store.fill(module, packed, ("scales", "qzeros", "g_idx"))
        inherited: Any = super()
        inherited.post_init()

    def _raw(self) -> RawLayer:
        raise NotImplementedError

    def forward(self, x: Any) -> Any:
        """Return the product of activations and the weight, plus the bias.

        Args:
            x: activations, fp16 or bf16 [..., in_features].

        Raises:
            InvalidValueError: if the weight has not been packed.
        """
        module: Any = self
        if x.numel() == 0:
            return module.empty_linear_output(x)
        if not self._store.is_filled:
            raise InvalidValueError(f"{module.name} has not been packed: call post_init() first")
        result = self._store.apply(module, x, getattr(module, "bias", None))
        return module.adapter.apply(x=x, out=result) if module.adapter else result


class GPTQLinear(_Linear):
    """A GPTQ layer. GPTQModel has converted its zero points to those of version 2."""

    def _raw(self) -> RawLayer:
        module: Any = self
        points = None if module.sym else gptq_zero_points(module.qzeros, version=2)
        return RawLayer(expand(module.qweight.t()), module.scales, points)


class AWQLinear(_Linear):
    """An AWQ layer of version GEMM."""

    def _raw(self) -> RawLayer:
        module: Any = self
        return RawLayer(expand_awq(module.qweight), module.scales, awq_points(module.qzeros))


def _smallest(capability: tuple[int, int] | None) -> LayerRequest:
    size = NATIVE_GROUP_MULTIPLE
    return LayerRequest(size, size, -1, has_zeros=False, dtype="float16", capability=capability)


def _why_not(args: dict[str, Any]) -> str | None:
    """Return why a layer is refused, from the arguments of `validate`; what they do not name is not judged."""
    device = args.get("device")
    capability = (9, 0) if device is None else capability_of(device)
    k, n = args.get("in_features"), args.get("out_features")
    if k is None or n is None:
        return why_not_served(_smallest(capability))
    group, has_zeros = args.get("group_size", -1), not args.get("sym", True)
    dtype = str(args.get("dtype") or "float16")
    return why_not_served(LayerRequest(n, k, group, has_zeros, dtype, capability))


def make_kernel(name: str, *, is_awq: bool) -> Any:
    """Return a class of GPTQModel's kind.

    Args:
        name: its name.
        is_awq: whether it serves AWQ; otherwise GPTQ.

    Raises:
        ImportError: if GPTQModel cannot be imported.
    """
    qlinear = importlib.import_module("gptqmodel.nn_modules.qlinear")
    places = importlib.import_module("gptqmodel.models._const")
    backends = importlib.import_module("gptqmodel.utils.backend").BACKEND
    methods = importlib.import_module("gptqmodel.quantization").METHOD
    lora = importlib.import_module("gptqmodel.adapter.adapter").Lora
    attributes = {
        "__module__": __name__,
        # Another class has the member of this closed list, so this one stays out of the selection by name.
        "SUPPORTS_BACKENDS": [backends.AWQ_MACHETE if is_awq else backends.GPTQ_MACHETE],
        "SUPPORTS_BACKEND_SELECTION": False,
        "SUPPORTS_METHODS": [methods.AWQ if is_awq else methods.GPTQ],
        "SUPPORTS_FORMATS": {},
        "SUPPORTS_BITS": [4],
        "SUPPORTS_GROUP_SIZE": [-1, *range(NATIVE_GROUP_MULTIPLE, LARGEST_GROUP + 1, NATIVE_GROUP_MULTIPLE)],
        "SUPPORTS_DESC_ACT": [False] if is_awq else [True, False],
        "SUPPORTS_SYM": [True, False],
        "SUPPORTS_SHARDS": True,
        "SUPPORTS_TRAINING": False,
        "SUPPORTS_AUTO_PADDING": False,
        "SUPPORTS_IN_FEATURES_DIVISIBLE_BY": [DIMENSION_MULTIPLE],
        "SUPPORTS_OUT_FEATURES_DIVISIBLE_BY": [DIMENSION_MULTIPLE],
        "SUPPORTS_DEVICES": [places.DEVICE.CUDA],
        "SUPPORTS_PLATFORM": [places.PLATFORM.LINUX],
        "SUPPORTS_PACK_DTYPES": [torch.int32],
        "SUPPORTS_ADAPTERS": [lora],
        "SUPPORTS_DTYPES": [torch.float16, torch.bfloat16],
        "REQUIRES_FORMAT_V2": not is_awq,
        "QUANT_TYPE": "w4a16gen",
    }
    bases = (AWQLinear, qlinear.AWQuantLinear) if is_awq else (GPTQLinear, qlinear.GPTQQuantLinear)
    return type(name, bases, attributes)
