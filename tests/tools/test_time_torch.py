"""The synthetic checkpoint that loading is timed with."""

from __future__ import annotations

from pathlib import Path

import pytest

import w4a16gen

pytest.importorskip("torch")
time_torch = pytest.importorskip("time_torch")


def test_the_checkpoint_is_one_of_gptq_with_zero_points(tmp_path: Path) -> None:
    size = time_torch.write_checkpoint(tmp_path, {"up": (64, 256), "down": (256, 128)})
    checkpoint = w4a16gen.open_checkpoint(tmp_path)
    assert {(layer.n, layer.k, layer.group_size, str(layer.mode)) for layer in checkpoint.values()} == {
        (64, 256, 128, "fgsz"),
        (256, 128, 128, "fgsz"),
    }
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 1024
    found = time_torch.pack_decoded(
        time_torch.formats.gptq(
            *(
                time_torch.torch.from_numpy(checkpoint.tensor(f"up.{part}").copy())
                for part in ("qweight", "scales", "qzeros")
            ),
            version=2,
        )
    )
    assert found.packed.data.numpy().tobytes() == w4a16gen.pack_weight(checkpoint["up"].quantized()).data.tobytes()
