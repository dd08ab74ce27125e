"""Whatever an object or a link is made of is in its hash: an edit of any of it compiles or links again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.workshop import Workshop

import w4a16gen
from w4a16gen.build import units
from w4a16gen.errors import BuildError

PACKAGE = Path(w4a16gen.__file__).parent
PROGRAM = """
import json, sys
from pathlib import Path
from w4a16gen.build.link import Link
from w4a16gen.build.toolchain import find_toolchain
from w4a16gen.build.units import kernel_hashes
from w4a16gen.kernels.spaces import enumerate_space
tools = find_toolchain()
native, cutlass = enumerate_space("default")[0], enumerate_space("trtllm")[0]

def hashes():
    kernels = kernel_hashes([native, cutlass], tools)
    return {"native": kernels[native], "cutlass": kernels[cutlass], "link": Link([], [native], tools).digest}

found = {"": hashes(), "registry": hashes() | {"link": Link([], [cutlass], tools).digest}}
for name in sys.argv[1:]:
    path = Path("w4a16gen/cuda", name)
    text = path.read_text()
    path.write_text(text + ("# edited" if name.endswith(".txt") else "// edited"))
    found[name] = hashes()
    path.write_text(text)
assert hashes() == found[""]
print(json.dumps(found))
"""
"""Prints the hashes of a native kernel, of one of CUTLASS's and of a link: as it is, and with each file edited."""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Copy the package and its templates, to be edited."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "w4a16gen", ignore=skipped)
    if (PACKAGE.parent / "templates").is_dir():
        shutil.copytree(PACKAGE.parent / "templates", tmp_path / "copy" / "templates", ignore=skipped)
    return tmp_path / "copy"


EDITS = {
    "registry": {"link"},
    "native/mainloop.cuh": {"native"},
    "native/tiles.h": {"native"},
    "cutlass/gemm.cuh": {"cutlass"},
    "library/kernel.h": {"native", "cutlass", "link"},
    "library/epilogue.h": {"native", "link"},
    "library/driver.h": {"native", "link"},
    "library/capture.h": {"link"},
    "library/hopper.h": {"native", "link"},
    "library/problem.h": {"link"},
    "library/registry.h": {"link"},
    "library/checks.h": {"link"},
    "library/gemm.h": {"link"},
    "library/epoch.h": {"link"},
    "library/experts.h": {"native", "link"},
    "library/library.cpp": {"link"},
    "library/experts.cpp": {"link"},
    "w4a16.h": {"native", "cutlass", "link"},
    "CMakeLists.txt": {"link"},
    "python/module.cpp": {"link"},
    "python/call_cache.h": {"link"},
    "python/experts.h": {"link"},
    "sdk/runner.h": set(),
}
"""The hashes that an edit of each file changes; other kernels make another registry."""


@pytest.mark.usefixtures("fake_nvcc")
def test_hashes_cover_what_objects_and_links_are_made_of(copied: Path) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROGRAM, *(name for name in EDITS if "." in name)],
        cwd=copied,
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before = found.pop("")
    changed = {name: {kind for kind in before if hashes[kind] != before[kind]} for name, hashes in found.items()}
    assert changed == EDITS


def test_serialised_wgmma_is_a_failure_though_the_compiler_succeeds(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x"
    monkeypatch.setenv("FAKE_NVCC_SAY", warning)
    monkeypatch.setenv("FAKE_NVCC_EXIT", "0")
    with pytest.raises(BuildError, match=r"wgmma\.mma_async instructions are serialized"):
        workshop.build()


def test_objects_of_other_flags_are_not_taken(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workshop.build().compiled == 1
    assert workshop.build().compiled == 0
    with monkeypatch.context() as changed:
        changed.setattr(units, "FLAGS", (*units.FLAGS, "-DOTHER"))
        assert workshop.build().compiled == 1
    assert workshop.build().compiled == 0, "the older object is still there"
