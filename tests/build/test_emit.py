"""Emission: manifests of two kinds, stale sources, and the proof that sources are what the renderer returns."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from fakes.workshop import CONFIGS, WEB_APP_MANIFEST, Workshop

from w4a16gen.build.emit import emit
from w4a16gen.build.pipeline import build
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.render import source_name
from w4a16gen.runtime.artifact import load_build
from w4a16gen.verify.static import source_violations


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.cu")}


def test_only_files_that_an_earlier_call_wrote_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / "w4a16_sm90_mine.cu"
    legal = tmp_path / source_name(CONFIGS[3])
    for path in (mine, legal):
        path.write_text("// not this tool's")
    emit(CONFIGS[:2], tmp_path)
    emission = emit(CONFIGS[1:3], tmp_path, remove_stale=True)
    assert emission.removed == (tmp_path / source_name(CONFIGS[0]),)
    assert names(tmp_path) == {source_name(config) for config in CONFIGS[1:3]} | {mine.name, legal.name}


def test_sources_that_were_kept_stale_can_still_be_removed_later(tmp_path: Path) -> None:
    for config in CONFIGS[:3]:
        emit([config], tmp_path)
    kept = emit([CONFIGS[3]], tmp_path)
    assert kept.stale == tuple(sorted(tmp_path / source_name(config) for config in CONFIGS[:3]))
    removed = emit([CONFIGS[3]], tmp_path, remove_stale=True)
    assert removed.removed == kept.stale
    assert names(tmp_path) == {source_name(CONFIGS[3])}


def test_pipes_folders_and_links_in_place_of_sources_are_put_aside(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in (*map(source_name, CONFIGS[:3]), "manifest.json")]
    os.mkfifo(paths[0])
    paths[1].mkdir()
    paths[2].symlink_to(os.devnull)
    os.mkfifo(paths[3])
    emit(CONFIGS[:3], tmp_path)
    assert all(path.is_file() and not path.is_symlink() for path in paths)
    assert {path.name for path in tmp_path.glob("*.1")} == {f"{path.name}.1" for path in (*paths[:2], paths[3])}
    assert Path(os.devnull).is_char_device()


def test_the_manifest_of_another_program_is_not_overwritten(tmp_path: Path, workshop: Workshop) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(WEB_APP_MANIFEST)
    workshop.folder.mkdir(exist_ok=True)
    (workshop.folder / "manifest.json").write_text(WEB_APP_MANIFEST)
    for call in (
        partial(emit, CONFIGS[:1], tmp_path),
        partial(build, CONFIGS[:1], generated=tmp_path, folder=workshop.root / "new"),
        workshop.build,
    ):
        with pytest.raises(InvalidValueError, match=r"manifest\.json belongs to another program"):
            call()
    assert manifest.read_text() == (workshop.folder / "manifest.json").read_text() == WEB_APP_MANIFEST
    assert [path.name for path in workshop.folder.iterdir()] == ["manifest.json"]
    assert not names(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "w4a16gen.sources/1", "kernels": [{"name": "../x"}]}'])
def test_a_damaged_list_removes_nothing(tmp_path: Path, text: str) -> None:
    emit(CONFIGS[:2], tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    assert emit(CONFIGS[1:2], tmp_path, remove_stale=True).removed == ()
    assert len(names(tmp_path)) == 2


def test_emitting_into_a_build_is_refused_and_a_build_replaces_a_list_of_sources(workshop: Workshop) -> None:
    emit(CONFIGS[:1], workshop.folder)
    assert json.loads((workshop.folder / "manifest.json").read_text())["schema"] == "w4a16gen.sources/1"
    workshop.build(CONFIGS[:1])
    assert workshop.built() == CONFIGS[:1]
    with pytest.raises(InvalidValueError, match="contains a build"):
        emit(CONFIGS[:2], workshop.folder)
    assert workshop.built() == CONFIGS[:1]


def test_the_proof_reads_the_sources(workshop: Workshop) -> None:
    built = workshop.build(CONFIGS[:3]).build
    asked = built.manifest.asked
    assert built.sources == workshop.generated
    assert source_violations(asked, built.sources) == []
    first, second = (workshop.generated / source_name(config) for config in CONFIGS[:2])
    first.write_text("")
    (violation,) = source_violations(asked, built.sources)
    assert violation.startswith(f"{first} differs from what the kernel was compiled from")
    second.unlink()
    assert "lacks the sources of 1 of 3 kernels" in source_violations(asked, built.sources)[1]
    workshop.build(CONFIGS[:3])
    assert source_violations(asked, built.sources) == []


def test_a_huge_file_in_place_of_a_source_is_not_read_whole(workshop: Workshop) -> None:
    workshop.build(CONFIGS[:1])
    path = workshop.generated / source_name(CONFIGS[0])
    os.truncate(path, 1 << 40)
    violations = source_violations([CONFIGS[0].name], workshop.generated)
    assert violations == [f"{path} differs from what the kernel was compiled from: run `w4a16gen build`"]
    workshop.build(CONFIGS[:1])
    assert source_violations([CONFIGS[0].name], workshop.generated) == []


def test_missing_sources_are_one_violation(workshop: Workshop, tmp_path: Path) -> None:
    built = workshop.build(CONFIGS).build
    (violation,) = source_violations(built.manifest.asked, tmp_path / "elsewhere")
    assert violation.startswith(f"{tmp_path / 'elsewhere'} lacks the sources of 4 of 4 kernels: pass --generated-dir")
    (violation,) = source_violations(built.manifest.asked, None)
    assert "pass --generated-dir" in violation


def test_the_build_remembers_its_sources_from_any_folder(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.root)
    workshop.build()
    monkeypatch.chdir("/")
    assert load_build(workshop.folder).sources == workshop.generated


def test_a_folder_that_has_a_sources_name_is_set_aside_with_its_content(tmp_path: Path) -> None:
    source = tmp_path / source_name(CONFIGS[0])
    for path in (source, tmp_path / "manifest.json"):
        path.mkdir()
        (path / "mine").write_text("mine")
    emit(CONFIGS[:1], tmp_path)
    assert source.is_file()
    assert (tmp_path / f"{source.name}.1" / "mine").read_text() == "mine"
    assert (tmp_path / "manifest.json.1" / "mine").exists()
