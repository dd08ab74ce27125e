"""Checkpoints that no uint4 kernel can represent are refused by name, with the reason and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import LAYER, N
from fakes.checkpoints.files import gguf_bytes, write_folder

import w4a16gen
from w4a16gen import InvalidValueError


def changed(folder: Path, **changes: Any) -> Path:
    """Change settings of the quantization in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config" if "quantization_config" in config else "quantization"].update(changes)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("bitsandbytes", "code book"),
        ("mxfp4", "not evenly spaced"),
        ("nvfp4", "not evenly spaced"),
        ("fp8", "no 4-bit integers"),
        ("aqlm", "code book"),
        ("exl2", "code book"),
    ],
)
def test_methods_without_4_bit_integers(method: str, reason: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.weight": np.zeros((4, 4), np.uint8)}, {"quant_method": method})
    with pytest.raises(InvalidValueError, match=rf"{method} holds .*{reason}.*quantize the original model with GPTQ"):
        w4a16gen.open_checkpoint(tmp_path)


def test_a_method_that_nobody_knows(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.weight": np.zeros(1, np.uint8)}, {"quant_method": "magic"})
    with pytest.raises(InvalidValueError, match="quant_method 'magic' must be one of gptq, awq"):
        w4a16gen.open_checkpoint(tmp_path)


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.weight": np.zeros((4, 4), np.float16)}, {})
    with pytest.raises(InvalidValueError, match="A model in FP16 is quantized first: `w4a16gen quantize`"):
        w4a16gen.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, "must be pack-quantized"),
        ("compressed-tensors", {"format": "float-quantized"}, "must be pack-quantized"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 4}}}},
            "weights of type 'float' must be int",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"strategy": "block"}}}},
            "strategy 'block' must be group or channel",
        ),
        ("gptq-v1", {"checkpoint_format": "bitblas"}, "'bitblas' must be marlin or one of gptq, gptq_v2, gptq_p"),
        ("awq-gemm", {"version": "new"}, "AWQ version 'new' must be gemm"),
        ("autoround-auto_gptq", {"packing_format": "auto_round:llm_compressor"}, "export the model as auto_gptq"),
        ("mlx", {"mode": "mxfp4"}, "quantize the model in mode affine"),
        ("mlx", {"bits": 8}, "has 8 bits, not 4"),
        ("modelopt", {"quant_algo": "NVFP4"}, "quant_algo 'nvfp4' must be W4A16_AWQ"),
    ],
)
def test_other_forms_of_a_format(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    CASES[case](tmp_path, rng)
    with pytest.raises(InvalidValueError, match=message):
        w4a16gen.open_checkpoint(changed(tmp_path, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": 0}, "has axis 0: its groups run across rows.*quantize it with axis=1"),
        ({"nbits": 3}, "has 3 bits, not 4"),
        ({"nbits": 8}, "has 8 bits, not 4"),
        ({"quant_zero": 1}, "quantizes its own scales or zeros"),
    ],
)
def test_other_settings_of_hqq(settings: dict[str, int], message: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {f"{LAYER}.W_q": np.zeros((32, 64), np.uint8)}
    tensors |= {f"{LAYER}.{name}": np.array(value, np.int32) for name, value in settings.items()}
    with pytest.raises(InvalidValueError, match=message):
        w4a16gen.open_checkpoint(write_folder(tmp_path, tensors, {"quant_method": "hqq"}))


def test_the_axis_of_hqq_may_stand_in_the_configuration(tmp_path: Path) -> None:
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 0}}}
    tensors: dict[str, Any] = {f"{LAYER}.W_q": np.zeros((32, 64), np.uint8)}
    with pytest.raises(InvalidValueError, match="has axis 0"):
        w4a16gen.open_checkpoint(write_folder(tmp_path, tensors, config))


@pytest.mark.parametrize("kind", ["Int4PlainInt32Tensor", "Int4PreshuffledTensor", "Float8Tensor"])
def test_other_tensors_of_torchao(kind: str, tmp_path: Path) -> None:
    tensors = {f"{LAYER}._weight_qdata": np.zeros((8, 32), np.int8)}
    metadata = {f"{LAYER}.weight": json.dumps({"_type": kind, "_data": {}})}
    with pytest.raises(InvalidValueError, match=f'{kind}.*int4_packing_format="plain"'):
        w4a16gen.open_checkpoint(write_folder(tmp_path, tensors, {"quant_method": "torchao"}, metadata=metadata))


def test_experts_of_modelopt(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        f"{LAYER}.weight": np.zeros((2, 4, 64), np.uint8),
        f"{LAYER}.weight_scale": np.ones((2, 8, 1), np.float16),
    }
    with pytest.raises(InvalidValueError, match="export experts one by one"):
        w4a16gen.open_checkpoint(
            write_folder(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"})
        )


def test_other_blocks_of_gguf_are_named_and_left_dense(tmp_path: Path, rng: np.random.Generator) -> None:
    kinds = {"IQ4_NL": (18, "not evenly spaced"), "Q8_0": (34, "no 4-bit integers"), "Q4_0": (18, "")}
    tensors = {
        f"blk.{number}.ffn_up.weight": (kind, (N, 64), rng.bytes(N * 2 * size))
        for number, (kind, (size, _)) in enumerate(kinds.items())
    }
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(tensors))
    checkpoint = w4a16gen.open_checkpoint(tmp_path / "model.gguf")
    assert list(checkpoint) == ["blk.2.ffn_up"]
    assert "of type IQ4_NL holds levels that are not evenly spaced" in checkpoint.unsupported["blk.0.ffn_up"]
    assert "of type Q8_0 holds no 4-bit integers: leave it dense" in checkpoint.unsupported["blk.1.ffn_up"]
    assert checkpoint.dense == ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]
    with pytest.raises(InvalidValueError, match="of dtype Q8_0 cannot be read with numpy"):
        checkpoint.tensor("blk.1.ffn_up.weight")


def test_attention_of_llama_in_gguf_says_that_its_rows_are_rotated(tmp_path: Path) -> None:
    tensors = {f"blk.0.{name}.weight": ("Q4_0", (N, 32), bytes(N * 18)) for name in ("attn_q", "attn_v")}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(tensors))
    checkpoint = w4a16gen.open_checkpoint(tmp_path)
    assert "rotary" in checkpoint["blk.0.attn_q"].notes[0]
    assert checkpoint["blk.0.attn_v"].notes == ()
