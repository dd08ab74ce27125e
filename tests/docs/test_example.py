"""The Python example says in one sentence what it cannot read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import EXAMPLES


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"], ids=["missing", "empty", "of another kind"])
def test_weights_that_cannot_be_read_are_named(content: bytes | None, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    if content is not None:
        weights.write_bytes(content)
    command = [sys.executable, str(EXAMPLES / "quantize_minilm.py"), "--weights", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot read {weights} as safetensors: ")
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "safetensors.py").write_text("raise ImportError")
    command = [sys.executable, str(EXAMPLES / "quantize_minilm.py")]
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: safetensors is not installed. Run `pip install safetensors`.\n",
    )
