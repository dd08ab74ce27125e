"""Torch: the operator `w4a16gen::gemm`, the module `W4A16Linear`, and models whose linear layers have 4 bits.

`import w4a16gen` does not import torch; this package does.
"""

from __future__ import annotations

from w4a16gen.errors import MissingToolError

try:
    import torch as _torch
except ImportError:
    raise MissingToolError("torch is not installed: pip install 'w4a16gen[torch]'") from None
del _torch

from w4a16gen.integrations.torch.device_weights import DeviceWeight, load_layer, pack_decoded  # noqa: E402
from w4a16gen.integrations.torch.experts import W4A16Experts  # noqa: E402
from w4a16gen.integrations.torch.fuse import fuse, fuse_gated  # noqa: E402
from w4a16gen.integrations.torch.linear import W4A16Linear  # noqa: E402
from w4a16gen.integrations.torch.mlp import W4A16MLP, FusedMlps, fuse_mlps  # noqa: E402
from w4a16gen.integrations.torch.ops import gemm  # noqa: E402
from w4a16gen.integrations.torch.overflow import calibrate, check_overflow, first_overflow  # noqa: E402
from w4a16gen.integrations.torch.replace import Replacement, replace_linears  # noqa: E402
from w4a16gen.integrations.torch.shared_experts import add_shared_experts  # noqa: E402

__all__ = [
    "W4A16MLP",
    "DeviceWeight",
    "FusedMlps",
    "Replacement",
    "W4A16Experts",
    "W4A16Linear",
    "add_shared_experts",
    "calibrate",
    "check_overflow",
    "first_overflow",
    "fuse",
    "fuse_gated",
    "fuse_mlps",
    "gemm",
    "load_layer",
    "pack_decoded",
    "replace_linears",
]
