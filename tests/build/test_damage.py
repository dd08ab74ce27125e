"""Damaged builds: each part is checked where it is used, and the next build makes it good again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.workshop import CONFIGS, Workshop

from w4a16gen.build.objects import damaged_units
from w4a16gen.build.units import CompiledUnit
from w4a16gen.errors import BuildError, NotBuiltError
from w4a16gen.files import seal
from w4a16gen.runtime.artifact import load_build

pytestmark = pytest.mark.compile

Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "content").write_text("content")


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (truncate, empty, flip, remove, replace_by_folder, replace_by_dangling_link, replace_by_pipe)


@pytest.mark.parametrize("part", ["library", "module"])
def test_a_damaged_library_or_module_is_not_loaded_and_is_linked_again(workshop: Workshop, part: str) -> None:
    workshop.build()
    for damage in DAMAGES:
        path: Path = getattr(load_build(workshop.folder), part)
        damage(path)
        with pytest.raises(NotBuiltError, match=r"is missing|is damaged"):
            load_build(workshop.folder)
        assert workshop.build().compiled == 0, f"{damage.__name__}: its objects are good"
        assert load_build(workshop.folder).configs == CONFIGS[:1], damage.__name__


@pytest.mark.parametrize("suffix", [".o", ".json"])
def test_a_damaged_object_or_record_is_compiled_again(workshop: Workshop, suffix: str) -> None:
    workshop.build()
    for damage in DAMAGES:
        for path in (workshop.folder / "objects").glob("*.o"):
            damage(path.with_suffix(suffix))
        assert workshop.build(CONFIGS[:1]).compiled == 1, damage.__name__
        assert workshop.build(CONFIGS[:1]).compiled == 0, damage.__name__
        assert load_build(workshop.folder).configs == CONFIGS[:1], damage.__name__


@pytest.mark.parametrize("how", ["cut", "no object", "other name"])
def test_an_object_that_was_damaged_before_it_was_stored_is_compiled_again_by_the_next_build(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    workshop.build(CONFIGS[:1])
    monkeypatch.setenv("FAKE_NVCC_SPOIL", how)
    with pytest.raises(BuildError, match=r"Damaged objects: 1\. .* the next build compiles them again"):
        workshop.build(CONFIGS[:2])
    monkeypatch.delenv("FAKE_NVCC_SPOIL")
    assert workshop.build(CONFIGS[:2]).compiled == 1, "the other object is good"
    assert workshop.built() == CONFIGS[:2]


def test_only_objects_in_which_the_linker_finds_a_fault_are_damaged() -> None:
    units = [
        CompiledUnit(Path(f"{letter * 32}.o"), "", {f"w4a16_sm90_{letter}": ""}, 0.0, 0) for letter in ("a", "b", "c")
    ]
    a, b, c = (str(unit.path) for unit in units)
    assert damaged_units(units, f"FAILED: g++ objects/{a} objects/{b} -o library.so") == []
    assert damaged_units(units, f"ld: warning: objects/{a}: missing .note.GNU-stack section") == []
    refers = f"ld: objects/{a}: in function `f':\nunit.cu:(.text+0x1): undefined reference to `cudaLaunch'"
    assert damaged_units(units, refers) == []
    assert damaged_units(units, f"ld: objects/{a}:(.data+0x1): undefined reference to `cudaLaunch'") == []
    assert damaged_units(units, f"ld: objects/{b}: file not recognized: file format not recognized") == [units[1]]
    assert damaged_units(units, f"ld: objects/{b}(.text): unknown relocation type 0x9d") == [units[1]]
    twice = f"ld: {c}:(.data+0x0): multiple definition of `f'; {a}:(.data+0x0): first defined here"
    assert damaged_units(units, twice) == [units[0], units[2]]
    missing = "ld: registry.o:(.data+0x8): undefined reference to `w4a16::w4a16_sm90_c_kernel'"
    assert damaged_units(units, missing) == [units[2]]


def test_a_damaged_manifest_is_no_build_and_is_written_again(workshop: Workshop) -> None:
    workshop.build()
    for damage in DAMAGES:
        damage(workshop.folder / "manifest.json")
        with pytest.raises(NotBuiltError, match=r"run `w4a16gen build`|No build found"):
            load_build(workshop.folder)
        assert workshop.build().compiled == 0, damage.__name__
        assert load_build(workshop.folder).configs == CONFIGS[:1], damage.__name__


@pytest.mark.parametrize("folder", ["objects", "logs"])
@pytest.mark.parametrize("how", ["file", "link", "gone"])
def test_a_damaged_folder_is_made_again(workshop: Workshop, folder: str, how: str) -> None:
    workshop.build()
    path = workshop.folder / folder
    shutil.rmtree(path)
    if how == "file":
        path.write_text("")
    elif how == "link":
        path.symlink_to("nowhere")
    workshop.build(CONFIGS[:2])
    assert workshop.built() == CONFIGS[:2]


MANIFESTS = (
    "",
    "null",
    "[]",
    "{}",
    '"manifest"',
    "[" * 100_000,
    '{"schema": "w4a16gen.sources/1", "kernels": []}',
    '{"schema": "w4a16gen.build/2"}',
    json.dumps(seal({"schema": "w4a16gen.build/2"})),
    json.dumps(seal({"schema": "w4a16gen.build/2", "cuda_version": [13, 0], "libraries": "../../lib"})),
    '{"schema": 1, "kernels": 7}',
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
)


@pytest.mark.parametrize("text", MANIFESTS)
def test_anything_else_is_no_build_and_build_makes_one(workshop: Workshop, text: str) -> None:
    workshop.folder.mkdir()
    (workshop.folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(NotBuiltError, match="is not the manifest of a build"):
        load_build(workshop.folder)


def test_every_edit_of_a_manifest_is_noticed(workshop: Workshop) -> None:
    workshop.build()
    path = workshop.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in manifest:
        changed = {**manifest, key: None if manifest[key] is not None else "."}
        path.write_text(json.dumps(changed))
        with pytest.raises(NotBuiltError):
            load_build(workshop.folder)
    path.write_text(json.dumps({**manifest, "libraries": "../elsewhere"}))
    with pytest.raises(NotBuiltError, match="does not match its digest"):
        load_build(workshop.folder)


def test_what_no_process_can_load_is_not_vouched_for(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker's output is broken twice: the earlier build stays, and stays loadable."""
    workshop.build(CONFIGS[:1])
    before = (workshop.folder / "manifest.json").read_bytes()
    monkeypatch.setenv("FAKE_CMAKE_TRUNCATE", "2")
    with pytest.raises(BuildError, match=r"ends the process that loads it|cannot be loaded"):
        workshop.build(CONFIGS[:2])
    assert (workshop.folder / "manifest.json").read_bytes() == before
    assert workshop.built() == CONFIGS[:1]
    monkeypatch.delenv("FAKE_CMAKE_TRUNCATE")
    workshop.build(CONFIGS[:2])
    assert workshop.built() == CONFIGS[:2]


def test_a_library_of_other_kernels_is_not_vouched_for(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CMAKE_OTHER_KERNELS", "1")
    with pytest.raises(BuildError, match="contains other kernels than its objects"):
        workshop.build(CONFIGS[:2])
    with pytest.raises(NotBuiltError, match="No build found"):
        load_build(workshop.folder)


def test_one_failure_of_cmake_costs_one_more_try(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = workshop.root / "trap"
    trap.touch()
    monkeypatch.setenv("FAKE_CMAKE_FAIL", str(trap))
    workshop.build()
    assert not trap.exists()
    assert workshop.built() == CONFIGS[:1]


def test_the_earlier_build_stays_while_the_next_one_is_linked(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.build(CONFIGS[:1])
    first = load_build(workshop.folder)
    monkeypatch.setenv("FAKE_CMAKE_ALWAYS_FAIL", "1")
    with pytest.raises(BuildError, match="linking failed"):
        workshop.build(CONFIGS[:2])
    assert load_build(workshop.folder) == first
    monkeypatch.delenv("FAKE_CMAKE_ALWAYS_FAIL")
    assert workshop.build(CONFIGS[:2]).compiled == 0, "the objects are good"
    assert first.library.exists(), "a program that has read the old manifest may still open it"
    workshop.build(CONFIGS[:2])
    assert not first.library.exists(), "the next build removes it"
