"""The edges of a CUDA graph, which the driver tells."""

from __future__ import annotations

import ctypes

_PROGRAMMATIC = 1


class _EdgeData(ctypes.Structure):
    """`CUgraphEdgeData`."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def programmatic_edges(graph: int) -> int:
    """Return how many dependent launches a graph holds: kernels that may start before the one ahead has ended."""
    get_edges = ctypes.CDLL("libcuda.so.1").cuGraphGetEdges_v2
    most = 1000
    nodes, data = ctypes.c_void_p * most, (_EdgeData * most)()
    count = ctypes.c_size_t(most)
    assert get_edges(ctypes.c_void_p(graph), nodes(), nodes(), data, ctypes.byref(count)) == 0
    return sum(edge.type == _PROGRAMMATIC for edge in data[: count.value])
