"""Packings of 4-bit values, one value at a time or one place of a word at a time, as the formats' own writers do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def along_rows(values: Array, dtype: type[np.generic] = np.uint32) -> Array:
    """Pack rows: values [rows, columns] to words [rows / values per word, columns], the first row lowest."""
    per_word = 2 * np.dtype(dtype).itemsize
    words = np.zeros((-(-len(values) // per_word), values.shape[1]), np.uint64)
    for row, row_values in enumerate(values):
        words[row // per_word] |= row_values.astype(np.uint64) << np.uint64(4 * (row % per_word))
    signed = np.dtype(f"i{np.dtype(dtype).itemsize}")
    return words.astype(f"u{signed.itemsize}").view(signed)


def along_columns(values: Array, dtype: type[np.generic] = np.uint32) -> Array:
    """Pack columns: values [rows, columns] to words [rows, columns / values per word]."""
    return np.ascontiguousarray(along_rows(values.T, dtype).T)


def gptq_version_1(zero_points: Array) -> Array:
    """Pack zero points as AutoGPTQ does: less 1 in 32 bits, so that 0 sets all bits above its place."""
    less_one = zero_points.astype(np.uint32) - np.uint32(1)
    words = np.zeros((len(zero_points), zero_points.shape[1] // 8), np.uint32)
    for place in range(8):
        words |= less_one[:, place::8] << np.uint32(4 * place)
    return words.view(np.int32)


def gptqmodel_version_1(zero_points: Array) -> Array:
    """Pack zero points as GPTQModel does for version 1: pack, then subtract 1 in each place from the whole word."""
    words = along_columns(zero_points).view(np.uint32)
    return (words - np.uint32(0x11111111)).view(np.int32)


def marlin_words(q: Array) -> Array:
    """Pack q [n, k] for the tensor cores' B fragments of 16 x 8: int32 [k / 16, 2 n]."""
    n, k = q.shape
    words = np.zeros((k // 16, 2 * n), np.uint32)
    for tile_k in range(k // 16):
        for word in range(2 * n):
            four_tiles, rest = divmod(word, 128)
            lane, tile = divmod(rest, 4)
            column = 64 * four_tiles + 16 * tile + lane // 4
            row = 16 * tile_k + 2 * (lane % 4)
            low_first = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
            places = low_first + [(r + 1, c) for r, c in low_first]
            for place, (r, c) in enumerate(places):
                words[tile_k, word] |= np.uint32(int(q[c, r]) << 4 * place)
    return words.view(np.int32)


def marlin_scales(scales: Array) -> Array:
    """Shuffle scales [groups, n] as Marlin's kernels read them."""
    groups, n = scales.shape
    if groups > 1:  # eight by eight, transposed
        return np.ascontiguousarray(scales.reshape(groups, n // 64, 8, 8).swapaxes(-1, -2).reshape(groups, n))
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.reshape(-1, 32)[:, order].reshape(1, n)


def awq_gemm_words(values: Array) -> Array:
    """Pack values [rows, n] to int32 [rows, n / 8], in AWQ's order of channels."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for column in range(values.shape[1] // 8):
        for place, channel in enumerate(AWQ_ORDER):
            words[:, column] |= values[:, 8 * column + channel].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def awq_fast_words(q: Array) -> Array:
    """Pack q [n, k] to int16 [n / 4, k], as AutoAWQ's pack_intweight(interleave=4, kstride=64) does."""
    n, k = q.shape
    order = np.arange(32).reshape(4, 4, 2).transpose(1, 0, 2).reshape(-1)
    packed = q.reshape(n, k // 32, 32)[:, :, order]
    packed = packed.reshape(n, k // 8, 8)[:, :, AWQ_ORDER].reshape(n // 4, 4, k // 64, 64)
    packed = packed.transpose(0, 2, 1, 3).reshape(n // 4, k // 64, 64, 4).astype(np.uint16)
    words: Array = packed[..., 0] | packed[..., 1] << 4 | packed[..., 2] << 8 | packed[..., 3] << 12
    return words.reshape(n // 4, k).view(np.int16)


def hqq_bytes(q: Array, group_size: int) -> Array:
    """Pack q [n, k] to uint8 [n * k / group size / 2, group size]: the first half of the rows in the upper bits."""
    rows = q.reshape(-1, group_size).astype(np.uint8)
    half = len(rows) // 2
    return (rows[:half] << 4 | rows[half:]).astype(np.uint8)


def torchao_plain(q: Array) -> Array:
    """Pack q [n, k] to int8 [n, k / 2], as signed values, even k in the lower bits."""
    signed = (q.astype(np.int16) - 8) & 15
    return (signed[:, ::2] | signed[:, 1::2] << 4).astype(np.uint8).view(np.int8)


def torchao_tile(q: Array) -> Array:
    """Pack q [n, k] to int32 [n / 8, k / 128, 32, 4], as tinygemm reads it."""
    n, k = q.shape
    words = np.zeros((n // 8, k // 128, 32, 4), np.uint32)
    for index in np.ndindex(*words.shape):
        a, b, lane, part = index
        row = 8 * a + lane // 4
        for step in range(4):
            even = 2 * (64 * b + 16 * part + lane % 4 + 4 * step)
            words[index] |= np.uint32(int(q[row, even]) << 4 * step)
            words[index] |= np.uint32(int(q[row, even + 1]) << 4 * (step + 4))
    return words.view(np.int32)


def modelopt_bytes(q: Array) -> Array:
    """Pack q [n, k] to uint8 [n / 2, k], as signed values, even rows in the lower bits."""
    signed = (q.astype(np.int16) - 8) & 15
    return (signed[::2] | signed[1::2] << 4).astype(np.uint8)


def q4_blocks(q: Array, d: Array, m: Array | None = None) -> bytes:
    """Return Q4_0 or Q4_1 blocks: q [n, k], d and m fp16 [n, k / 32]."""
    content = b""
    for row in range(len(q)):
        for block in range(q.shape[1] // 32):
            values = q[row, 32 * block : 32 * block + 32]
            content += d[row, block].tobytes() + (b"" if m is None else m[row, block].tobytes())
            content += bytes(int(values[j]) | int(values[j + 16]) << 4 for j in range(16))
    return content


def q4_k_blocks(q: Array, factors: tuple[Array, Array], d: Array, minimum: Array) -> bytes:
    """Return Q4_K blocks: q [n, k], six-bit scales and minima [n, k / 32], d and minimum fp16 [n, k / 256]."""
    of_scales, of_minima = factors
    content = b""
    for row in range(len(q)):
        for block in range(q.shape[1] // 256):
            sc, mn = (part[row, 8 * block : 8 * block + 8].astype(int) for part in (of_scales, of_minima))
            twelve = [sc[j] | (sc[j + 4] >> 4) << 6 for j in range(4)]
            twelve += [mn[j] | (mn[j + 4] >> 4) << 6 for j in range(4)]
            twelve += [(sc[j] & 15) | (mn[j] & 15) << 4 for j in range(4, 8)]
            values = q[row, 256 * block : 256 * block + 256].astype(int).reshape(4, 2, 32)
            content += d[row, block].tobytes() + minimum[row, block].tobytes() + bytes(twelve)
            content += bytes(int(low) | int(high) << 4 for chunk in values for low, high in chunk.T)
    return content
