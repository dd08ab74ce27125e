"""The structures of the C interface, for ctypes."""

from __future__ import annotations

import ctypes


class CProblem(ctypes.Structure):
    """`w4a16_problem`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")]


class CGemmArguments(ctypes.Structure):
    """`w4a16_gemm_arguments`."""

    _fields_ = [
        ("activations", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("alpha", ctypes.c_float),
        ("dependent_launch", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("residual", ctypes.c_void_p),
    ]
