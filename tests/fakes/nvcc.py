"""A stand-in for nvcc: gives every kernel of a compile unit an entry that can be described but not launched.

It lets the build's own machinery (units, failures, locks, interruption, linking) be tested in seconds. Nothing about
kernels is proven with it. FAKE_NVCC_FAIL names kernels that fail, FAKE_NVCC_SLEEP delays, FAKE_NVCC_LOG counts calls,
FAKE_NVCC_SAY is printed and makes every compilation fail, FAKE_NVCC_EXIT is its exit code. FAKE_NVCC_SPOIL is what is
wrong with every object: it is `cut`, `no object`, or has the `other name` of a kernel that is not there. FAKE_CACHE is
the folder of objects that were compiled before.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from w4a16gen.kernels.config import KernelConfig, Target

LAYOUTS = {Target.CUTLASS: "kmajor_s4_v1", Target.NATIVE: "fragment_blocks_v2"}
"""`TARGET_LAYOUTS`, whose module imports numpy: that would take four times as long as all else here."""
CPP = Path(__file__).resolve().parents[1] / "cpp"
RELEASE = "Cuda compilation tools, release {}, V13.0.88\nBuild fake"


def entry(config: KernelConfig) -> str:
    """Return the line of C++ that defines one kernel's entry; see tests/cpp/fake_kernel.h."""
    family = f'"{config.target}", "{LAYOUTS[config.target]}"'
    mode = f"{config.mode}, {str(config.mode.has_zeros).lower()}"
    mode += f", {config.epilogue.number}, {int(config.is_grouped)}"
    sizes = ", ".join(map(str, [*config.cta.as_list(), *config.cluster.as_list()]))
    return f"W4A16_FAKE_KERNEL({config.name}, {family}, {mode}, {sizes})"


def spoil(output: Path, how: str) -> None:
    """Damage an object before anyone takes its digest."""
    content = output.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "no object": bytes(len(content)),
        "other name": content.replace(b"_kernelE", b"_kernelF"),
    }[how]
    assert changed != content
    output.write_bytes(changed)


def main(arguments: list[str]) -> int:
    """Compile, and spoil the object if that is asked for."""
    returncode = compile_or_answer(arguments)
    if returncode == 0 and "-o" in arguments and (how := os.environ.get("FAKE_NVCC_SPOIL")):
        spoil(Path(arguments[arguments.index("-o") + 1]), how)
    return returncode


def compile_or_answer(arguments: list[str]) -> int:
    """Behave as nvcc does for the calls that a build makes."""
    if "--version" in arguments:
        print(RELEASE.format(os.environ.get("FAKE_NVCC_RELEASE", "13.0")))
        return 0
    source = Path(arguments[arguments.index("-c") + 1])
    names = re.findall(r'#include "(w4a16_sm90_\w+)\.cu"', source.read_text())
    if log := os.environ.get("FAKE_NVCC_LOG"):
        with Path(log).open("a") as file:
            file.write(" ".join(names) + "\n")
    time.sleep(float(os.environ.get("FAKE_NVCC_SLEEP", "0")))
    if said := os.environ.get("FAKE_NVCC_SAY"):
        print(said)
        return int(os.environ.get("FAKE_NVCC_EXIT", "2"))
    failing = os.environ.get("FAKE_NVCC_FAIL")
    if failing and any(failing in name for name in names):
        print(f"{source}(1): error: this kernel cannot be compiled")
        return 2
    text = "\n".join(['#include "fake_kernel.h"', *(entry(KernelConfig.parse(name)) for name in names), ""])
    generated = source.with_suffix(".cpp")
    generated.write_text(text)
    output = Path(arguments[arguments.index("-o") + 1])
    made = Path(os.environ["FAKE_CACHE"]) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.o"
    if made.exists():
        shutil.copyfile(made, output)
        return 0
    includes = [argument for argument in arguments if argument.startswith("-I")]
    includes += [f"-I{CPP}", f"-isystem{os.environ['FAKE_NVCC_INCLUDE']}"]
    fresh = made.with_name(f".{made.name}.{os.getpid()}")
    command = ["g++", "-std=c++17", "-fPIC", *includes, "-c", str(generated), "-o", str(fresh)]
    returncode = subprocess.run(command, check=False).returncode  # noqa: S603
    if returncode == 0:
        fresh.replace(made)
        shutil.copyfile(made, output)
    return returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
