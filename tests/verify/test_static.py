"""The static proof: a right build passes, and each wrong thing is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.library import FakeLibrary
from fakes.module import FakeModule

from w4a16gen import KernelConfig
from w4a16gen.build.emit import emit
from w4a16gen.kernels.render import source_name
from w4a16gen.verify import static
from w4a16gen.verify.static import KernelCode, read_code

WARPGROUPS, WARPS, CUTLASS = KERNELS = [
    KernelConfig.parse(name)
    for name in (
        "w4a16_sm90_native_fgs_cta128x16x128_cluster1x1x1_warpgroups2_streamk",
        "w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent",
        "w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk",
    )
]
OTHER = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x2_warpgroups4_persistent")


def right_code() -> dict[str, KernelCode]:
    """Return machine code in which nothing is wrong."""
    hgmma = Counter(HGMMA=12, UTMALDG=3, UBLKCP=2)
    return {
        WARPGROUPS.name: KernelCode(168, 0, hgmma.copy(), 12),
        WARPS.name: KernelCode(80, 0, Counter(HMMA=8, UTMALDG=3, UBLKCP=2)),
        CUTLASS.name: KernelCode(168, 0, hgmma.copy(), 12),
        "_ZN5w4a166native11pack_blocksILi3EEEv": KernelCode(32, 0, Counter(LDG=4)),
    }


class Built:
    """A build of three kernels, of which a test changes one thing."""

    def __init__(self, folder: Path) -> None:
        self.library = FakeLibrary(KERNELS)
        self.code = right_code()
        self.folder = folder
        emit(KERNELS, folder)

    @property
    def module(self) -> FakeModule:
        return self.library.module

    def change_manifest(self, **changes: object) -> None:
        manifest = replace(self.library.build.manifest, **changes)  # type: ignore[arg-type]
        self.library.build = replace(self.library.build, manifest=manifest)

    def violations(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.setattr(static, "read_code", lambda _library: self.code)
        return static.prove(self.library, self.folder).violations


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path / "generated")


def test_a_right_build_passes(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built.violations(monkeypatch) == []
    kernels = static.prove(built.library, built.folder).kernels
    assert [kernel["name"] for kernel in kernels] == [config.name for config in sorted(KERNELS)]
    assert {kernel["registers"] for kernel in kernels} == {80, 168}


def names(built: Built) -> tuple[str, ...]:
    return built.library.build.manifest.asked


def one_more_packed_byte(built: Built) -> None:
    kernels = built.library.bindings.library
    packed_bytes = kernels.packed_bytes
    kernels.packed_bytes = lambda *arguments: (0, "", packed_bytes(*arguments)[2] + 128)


WRONG: dict[str, tuple[Callable[[Built], object], str]] = {
    "a kernel failed": (lambda built: built.change_manifest(failed=(OTHER.name,)), f"{OTHER.name} .*failed to compile"),
    "asked, not there": (
        lambda built: built.change_manifest(asked=(*names(built), OTHER.name)),
        f"{OTHER.name} is asked for but not exported",
    ),
    "there, not asked": (
        lambda built: built.change_manifest(asked=tuple(name for name in names(built) if name != WARPS.name)),
        f"{WARPS.name} is exported but not asked for",
    ),
    "source gone": (lambda built: (built.folder / source_name(WARPS)).unlink(), WARPS.name),
    "no machine code": (lambda built: built.code.pop(WARPS.name), f"{WARPS.name} is exported but not in the machine"),
    "foreign machine code": (
        lambda built: built.code.update({OTHER.name: KernelCode(168, 0, Counter(HGMMA=1), 1)}),
        f"{OTHER.name} is in the machine code but not exported",
    ),
    "foreign symbol": (lambda built: built.code.update({"_Z3foo_bf16": KernelCode()}), "names a foreign type: bf16"),
    "weights from shared memory": (
        lambda built: setattr(built.code[WARPGROUPS.name], "register_hgmmas", 11),
        f"{WARPGROUPS.name} has 1 HGMMA that read weights from shared memory",
    ),
    "weights of CUTLASS from shared memory": (
        lambda built: setattr(built.code[CUTLASS.name], "register_hgmmas", 0),
        f"{CUTLASS.name} has 12 HGMMA that read weights from shared memory",
    ),
    "spill": (lambda built: built.code[WARPS.name].instructions.update(STL=1), f"{WARPS.name} spills"),
    "stack": (lambda built: setattr(built.code[WARPS.name], "stack_bytes", 8), f"{WARPS.name} uses 8 bytes of stack"),
    "packed sizes": (one_more_packed_byte, r"reads \d+ packed bytes for .*; packing writes \d+"),
}


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG.keys())
def test_each_wrong_thing_is_told(
    built: Built, monkeypatch: pytest.MonkeyPatch, change: Callable[[Built], object], text: str
) -> None:
    change(built)
    violations = built.violations(monkeypatch)
    assert any(re.search(text, violation) for violation in violations), violations


CODE = """
Fatbin elf code:
 Function {name}:
  REG:168 STACK:16 SHARED:100000 LOCAL:8 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6helperv:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
\t\tFunction : {name}
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 UTMALDG.2D [UR8], [UR4] ;                       /* 0x000000080400e5b4 */
        /*0020*/                   HGMMA.64x16x16.F32 R24, R4, gdesc[UR8], R24, gsb0 ; /* 0x0 */
        /*0030*/                   HGMMA.64x16x16.F32 R24, gdesc[UR4], R24, gsb0 ; /* 0x0 */
        /*0040*/              @UP1 UBLKCP.S.G [UR8], [UR4], UR6 ;                  /* 0x0 */
        /*0050*/                   STL [R1], R2 ;                                  /* 0x0 */
\t\tFunction : _Z6helperv
        /*0000*/                   EXIT ;                                          /* 0x0 */
"""


def test_machine_code_is_read_as_cuobjdump_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, program, library = tmp_path / "listing", tmp_path / "bin" / "cuobjdump", tmp_path / "library.so"
    listing.write_text(CODE.format(name=WARPGROUPS.name))
    library.touch()
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("w4a16gen.build.toolchain.find_cuobjdump", lambda: program)
    monkeypatch.setattr(static, "find_cuobjdump", lambda: program, raising=False)
    code = read_code(library)
    assert code.keys() == {WARPGROUPS.name, "_Z6helperv"}
    kernel = code[WARPGROUPS.name]
    assert (kernel.registers, kernel.stack_bytes, kernel.register_hgmmas) == (168, 24, 1)
    assert kernel.instructions == Counter(LDC=1, UTMALDG=1, HGMMA=2, UBLKCP=1, STL=1)
    assert kernel.code_bytes == 16 * 6
