"""A driver that is older than the CUDA release of the kernels: every command says so, instead of `no GPU`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.workshop import Workshop

SOURCE = Path(__file__).resolve().parents[1] / "cpp" / "old_driver.cpp"
SENTENCE = "supports CUDA 12.4; kernels built with CUDA {} need driver 580 or newer"
TO_DEVICE = """
import numpy, w4a16gen
try:
    w4a16gen.to_device(numpy.zeros(8, numpy.float16))
except w4a16gen.errors.NoHopperGpuError as error:
    print(error)
"""


@pytest.fixture
def old_driver(tmp_path: Path) -> str:
    """Return the folder of a stand-in driver."""
    folder = tmp_path / "driver"
    folder.mkdir()
    command = ["g++", "-shared", "-fPIC", str(SOURCE), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)  # noqa: S603
    return str(folder)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a driver of its own")
def test_an_old_driver_is_named_by_everything_that_needs_it(workshop: Workshop, old_driver: str) -> None:
    sentence = SENTENCE.format(".".join(map(str, workshop.build().build.manifest.cuda_version)))
    run = workshop.run("run", "16", "4096", "4096", "--mode", "cs", LD_LIBRARY_PATH=old_driver)
    assert run.returncode == 3
    assert sentence in " ".join(run.stderr.split())
    doctor = workshop.run("doctor", "--json", LD_LIBRARY_PATH=old_driver)
    assert doctor.returncode == 3
    (driver,) = [found for found in json.loads(doctor.stdout)["findings"] if found["subject"] == "NVIDIA driver"]
    assert driver["detail"] == sentence
    assert driver["fix"] == "install NVIDIA's driver 580 or newer"
    copied = subprocess.run(  # noqa: S603
        [sys.executable, "-c", TO_DEVICE],
        cwd=workshop.root,
        env={**os.environ, "LD_LIBRARY_PATH": old_driver},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sentence in copied.stdout
