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


def _pointers(names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def _sizes(names: str) -> list[tuple[str, type[ctypes.c_int64]]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _flags(names: str) -> list[tuple[str, type[ctypes.c_int32]]]:
    return [(name, ctypes.c_int32) for name in names.split()]


class CKernelInfo(ctypes.Structure):
    """`w4a16_kernel_info`."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("name", "target", "layout")),
        ("mode", ctypes.c_int32),
        ("cta", ctypes.c_int32 * 3),
        ("cluster", ctypes.c_int32 * 3),
        *_flags("stages threads group_multiple"),
        ("shared_memory_bytes", ctypes.c_int64),
        *_flags("epilogue grouped"),
    )


class CRouteArguments(ctypes.Structure):
    """`w4a16_route_arguments`."""

    _fields_ = (
        *_pointers("ids"),
        *_flags("id_bytes dependent_launch"),
        *_pointers("expert_map"),
        *_sizes("global_experts experts tokens slots tile_tokens"),
        *_pointers("offsets routes_of_rows rows_of_routes token_tiles"),
        ("token_tiles_bytes", ctypes.c_size_t),
        *_pointers("stream hidden weights rows"),
        *_sizes("columns"),
    )


class CListingArguments(ctypes.Structure):
    """`w4a16_listing_arguments`."""

    _fields_ = (
        *_pointers("offsets counts"),
        *_sizes("stride"),
        *_pointers("indices"),
        *_sizes("experts rows tile_tokens"),
        *_pointers("token_tiles"),
        ("token_tiles_bytes", ctypes.c_size_t),
        *_pointers("stream"),
        *_flags("dependent_launch"),
    )


class CIds(ctypes.Structure):
    """`w4a16_ids`."""

    _fields_ = (
        *_pointers("ids expert_map"),
        *_sizes("global_experts"),
        *_flags("id_bytes"),
    )

    def __repr__(self) -> str:
        """Return the values, so that every process gives a test the same name."""
        return f"CIds({', '.join(str(getattr(self, name)) for name, *_ in self._fields_)})"


class CExperts(ctypes.Structure):
    """`w4a16_experts`."""

    _fields_ = (
        *_sizes("count"),
        ("packed_stride", ctypes.c_size_t),
        *_pointers("token_tiles"),
        ("token_tiles_bytes", ctypes.c_size_t),
        *_sizes("tile_tokens"),
        *_flags("list_is_complete rows_are_shared"),
        ("unsorted", CIds),
        *_sizes("slots"),
    )


class CGatherArguments(ctypes.Structure):
    """`w4a16_gather_arguments`."""

    _fields_ = (
        *_pointers("hidden row_count routes_of_rows weights rows"),
        *_sizes("tokens slots columns"),
        *_pointers("stream"),
        *_flags("dependent_launch"),
    )


class CActivateArguments(ctypes.Structure):
    """`w4a16_activate_arguments`."""

    _fields_ = (
        *_pointers("gates_and_factors row_count output"),
        *_sizes("rows columns"),
        *_pointers("stream"),
        *_flags("activation dependent_launch"),
    )


class CCombineArguments(ctypes.Structure):
    """`w4a16_combine_arguments`."""

    _fields_ = (
        *_pointers("rows rows_of_routes weights output"),
        *_sizes("tokens slots columns"),
        *_pointers("stream"),
        *_flags("dependent_launch"),
        ("unsorted", CIds),
        *_sizes("experts"),
    )
