"""Folders of builds: odd names, moved and copied ones, clocks that were moved, who may write, file modes."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import time
from pathlib import Path

import pytest
from fakes.workshop import CONFIGS, Workshop

from w4a16gen import load
from w4a16gen.build.pipeline import build
from w4a16gen.build.scratch import alias, is_safe, scratch_folder
from w4a16gen.errors import BuildError, InvalidValueError, NotBuiltError
from w4a16gen.files import write_if_changed
from w4a16gen.runtime.artifact import load_build, others_may_write
from w4a16gen.runtime.folders import load_default_build
from w4a16gen.runtime.library import Library

pytestmark = pytest.mark.compile

ODD_NAMES = (
    *(
        "a b",
        " leading",
        "trailing ",
        "a,b",
        "a;b",
        "a:b",
        "a=b",
        "a%b",
        "a+b",
        "a@b",
        "@A@",
        "a~b",
        "#a",
        "a&b",
        "a|b",
    ),
    *("a'b", 'a"b', "a`b", "a\\b", "a\\", "$HOME", "$(touch HACKED)", "`touch HACKED`", "${IFS}", "a>b", "a<b", "a*b"),
    *("a?b", "[a]", "{a,b}", "(a)", "!a", "^a", "-a", "--help", "-o", "ä", "日本", "a\nb", "a\tb", "é" * 60, "\udcff"),
)

NAMES_PER_PATH = 6


def test_the_list_of_names_is_long_enough() -> None:
    assert len(set(ODD_NAMES)) >= 40


@pytest.mark.parametrize("part", range(0, len(ODD_NAMES), NAMES_PER_PATH))
def test_any_folder_name_works_and_none_reaches_a_shell(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """The names are nested; `tools/fault_campaign.py` tries each by itself."""
    monkeypatch.chdir(workshop.root)
    names = ODD_NAMES[part : part + NAMES_PER_PATH]
    folder = Path(*names, "build")
    build(CONFIGS[:1], generated=Path(*names, "generated"), folder=folder, jobs=1)
    assert Library(load_build(folder)).configs() == CONFIGS[:1]
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "logs", "manifest.json", "objects", load_build(folder).manifest.libraries)
    }, "nothing is left over"
    assert {path.name for path in workshop.root.iterdir()} == {names[0]}, "no name was run as a command"


def test_compilers_get_safe_names_only(tmp_path: Path) -> None:
    odd = tmp_path / "$(touch HACKED); 'x'"
    odd.mkdir()
    with scratch_folder(odd) as scratch:
        assert is_safe(scratch)
        assert not scratch.is_relative_to(odd)
        assert alias(scratch, "toolkit", odd).resolve() == odd
        assert is_safe(alias(scratch, "toolkit", odd))
        (link,) = odd.iterdir()
        assert link.resolve() == scratch, "the next build finds it there if this one is killed"
    assert not scratch.exists()
    assert list(odd.iterdir()) == []


def test_without_any_safe_folder_the_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16gen.build.scratch.os.access", lambda *_: False)
    odd = tmp_path / "a;b"
    odd.mkdir()
    with pytest.raises(BuildError, match="has a name that compilers cannot take"), scratch_folder(odd):
        pass


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_moved_or_copied_build_loads_and_builds(workshop: Workshop, how: str) -> None:
    workshop.build(CONFIGS[:1])
    elsewhere = Workshop(workshop.root.parent / "elsewhere")
    if how == "moved":
        workshop.root.rename(elsewhere.root)
    else:
        shutil.copytree(workshop.root, elsewhere.root)
    assert elsewhere.built() == CONFIGS[:1]
    assert elsewhere.build(CONFIGS[:1]).compiled == 0
    assert elsewhere.build(CONFIGS[:2]).compiled == 1
    assert elsewhere.built() == CONFIGS[:2]
    assert load_build(elsewhere.folder).sources == elsewhere.generated


def test_times_of_files_decide_nothing(workshop: Workshop) -> None:
    workshop.build(CONFIGS[:1])
    for path in workshop.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() + 1e8, time.time() + 1e8))
    assert workshop.build(CONFIGS[:1]).compiled == 0
    assert workshop.build(CONFIGS[:2]).compiled == 1
    assert workshop.built() == CONFIGS[:2]


def test_sources_and_build_need_two_folders(workshop: Workshop) -> None:
    with pytest.raises(InvalidValueError, match="choose two folders"):
        build(CONFIGS[:1], generated=workshop.folder, folder=workshop.folder)


def test_a_build_needs_a_kernel(workshop: Workshop) -> None:
    with pytest.raises(InvalidValueError, match="at least one"):
        build([], generated=workshop.generated, folder=workshop.folder)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002, 0o000])
def test_modes_respect_the_umask_and_nobody_else_may_write_code(workshop: Workshop, mask: int) -> None:
    before = os.umask(mask)
    try:
        built = workshop.build().build
    finally:
        os.umask(before)
    for path in (built.library, built.module, workshop.folder / "manifest.json", built.library.parent, built.folder):
        assert stat.S_IMODE(path.stat().st_mode) & (mask | 0o022) == 0, path
    source = next(workshop.generated.glob("*.cu"))
    assert stat.S_IMODE(source.stat().st_mode) == 0o666 & ~mask


def test_a_written_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_if_changed(tmp_path / "file", "text")
        write_if_changed(tmp_path / "program", "text", mode=0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "program").stat().st_mode) == 0o750


@pytest.mark.parametrize("part", ["folder", "manifest", "libraries", "library", "module"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_build_that_others_may_write_is_loaded_only_if_it_is_named(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, part: str, mode: int
) -> None:
    built = workshop.build().build
    parts = {
        "folder": workshop.folder,
        "manifest": workshop.folder / "manifest.json",
        "libraries": built.library.parent,
        "library": built.library,
        "module": built.module,
    }
    monkeypatch.chdir(workshop.root)
    assert load_default_build().configs == CONFIGS[:1]
    parts[part].chmod(parts[part].stat().st_mode | mode)
    with pytest.raises(NotBuiltError, match=r"may be written by other users, and a build is code; run `chmod -R go-w"):
        load()
    assert load("build").configs() == CONFIGS[:1]
    monkeypatch.setenv("W4A16GEN_BUILD_DIR", "build")
    assert load().configs() == CONFIGS[:1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_build_of_another_user_is_loaded_only_if_it_is_named(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = workshop.build().build
    monkeypatch.chdir(workshop.root)
    os.chown(built.module, 12345, 12345)
    with pytest.raises(NotBuiltError, match="belongs to user 12345, and a build is code"):
        load()
    assert load("build").configs() == CONFIGS[:1]


@pytest.mark.parametrize(
    ("mode", "group", "members", "user", "others"),
    [
        (0o755, 1000, [], 1000, False),
        (0o775, 1000, [], 1000, False),
        (0o777, 1000, [], 1000, True),
        (0o775, 1000, ["bob"], 1000, True),
        (0o775, 50, [], 1000, True),
        (0o775, 0, [], 0, True),
    ],
)
def test_a_group_of_the_user_alone_is_the_user(
    monkeypatch: pytest.MonkeyPatch, *, mode: int, group: int, members: list[str], user: int, others: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("ann", "x", uid, uid, "", "", "")))
    name = "staff" if group == 50 else "ann"
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))
    status = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, user, group, 0, 0, 0, 0))
    assert others_may_write(status) is others
