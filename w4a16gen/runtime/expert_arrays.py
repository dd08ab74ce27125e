"""The arrays of calls of experts on a GPU: packed experts, routes and workspaces, checked, and what is allocated."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from w4a16gen.errors import InvalidValueError
from w4a16gen.runtime.arrays import ArrayView, check, dtype_name, view
from w4a16gen.runtime.expert_calls import check_packed
from w4a16gen.runtime.streams import empty_like_library, is_torchs_stream

NO_IDS = (0, 0, 0, 0)
"""The arguments of ids where routes are sorted."""
_BYTES_OF_IDS = {"<i4": 4, "<i8": 8}
"""By dtype."""
_MATRIX = 2


class ExpertChoice(NamedTuple):
    """The expert of each route, as routing reads it."""

    ids: ArrayView
    expert_map: ArrayView | None

    @property
    def global_experts(self) -> int | None:
        """Entries of the map of experts; None without a map."""
        return None if self.expert_map is None else self.expert_map.shape[0]

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """The arguments with which the module's `route` begins."""
        mapped = self.expert_map
        return (
            self.ids.pointer,
            _BYTES_OF_IDS[self.ids.dtype],
            0 if mapped is None else mapped.pointer,
            self.global_experts or 0,
        )


class ExpertArrays:
    """Views of a call's arrays, checked, and new arrays, through the module of one build."""

    def __init__(self, module: ModuleType) -> None:
        """Use a build's pybind11 module."""
        self._module = module

    def packed(self, name: str, w: Any, device: int | None = None) -> ArrayView:
        """Return the buffer of packed experts, checked.

        Raises:
            InvalidValueError: if they are no packed experts for native kernels, or not on a GPU, or not on this one.
        """
        check_packed(name, w)
        packed = view(name, w.data, self._module)
        check(name, packed, dtype="|u1", shape=(w.experts, w.stride), device=device)
        return packed

    def choice(
        self, topk_ids: Any, expert_map: Any, device: int | None = None, tokens: int | None = None
    ) -> ExpertChoice:
        """Return the experts of a call's routes, checked.

        Args:
            topk_ids: the ids.
            expert_map: the map, or None.
            device: where both must be; None is where the ids are.
            tokens: their number; None is that of the ids.

        Raises:
            InvalidValueError: if the ids are not int32 or int64 [tokens, slots], contiguous, or the map is not int32
                [all experts] on the same GPU.
        """
        ids = view("topk_ids", topk_ids, self._module)
        if ids.dtype not in _BYTES_OF_IDS or len(ids.shape) != _MATRIX or ids.shape[1] == 0:
            raise InvalidValueError(
                f"topk_ids of dtype {dtype_name(ids.dtype)} and shape {list(ids.shape)} must be int32 or int64 "
                "[tokens, slots]"
            )
        shape = ids.shape[0] if tokens is None else tokens, ids.shape[1]
        check("topk_ids", ids, dtype=ids.dtype, shape=shape, device=device)
        if expert_map is None:
            return ExpertChoice(ids, None)
        mapped = view("expert_map", expert_map, self._module)
        if len(mapped.shape) != 1 or mapped.shape[0] == 0:
            raise InvalidValueError(f"expert_map of shape {list(mapped.shape)} must be [all experts]")
        there = ids.device or 0 if device is None else device
        check("expert_map", mapped, dtype="<i4", shape=mapped.shape, device=there)
        return ExpertChoice(ids, mapped)

    def workspace(self, given: Any, needed: int, device: int) -> int:
        """Return the address of a workspace.

        Raises:
            InvalidValueError: if it is no array of bytes on the GPU, or too short.
        """
        room = view("workspace", given, self._module)
        check("workspace", room, dtype="|u1", shape=room.shape, device=device, written=True)
        if room.nbytes < needed:
            raise InvalidValueError(f"workspace of {room.nbytes} bytes must be at least {needed} bytes")
        return room.pointer

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        """Allocate beside an array, in the order of a stream; see `empty_like_library`.

        Args:
            like: the array.
            shape: shape to allocate.
            dtype: `<f2`, `<i4` or `|u1`.
            device: the GPU.
            stream: address of the stream that will write.

        Raises:
            InvalidValueError: if a graph would write to memory that is freed with the array.
        """
        if not is_torchs_stream(like, stream) and self._module.is_capturing(stream, device):
            raise InvalidValueError("pass out= and workspace= in a capture: the graph writes there at every replay")
        return empty_like_library(like, self._module, shape, dtype, device, stream=stream)
