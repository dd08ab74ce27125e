"""Which build is used where nobody names one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fakes.runner import Runner

from w4a16gen import NotBuiltError
from w4a16gen.cli.services import Services
from w4a16gen.runtime import folders
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import folder_to_load, load_default_build, user_build_folder


@pytest.fixture
def places(fake_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Copy a build to each of the places, and return their folders in order."""
    monkeypatch.delenv("W4A16GEN_BUILD_DIR", raising=False)
    monkeypatch.setenv("W4A16GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "site" / "build"
    monkeypatch.setattr(folders, "installed_build_folder", lambda: installed if installed.exists() else None)
    found = {"local": tmp_path / "build", "user": user_build_folder(), "installed": installed}
    for folder in found.values():
        shutil.copytree(fake_build.folder, folder, symlinks=True)
    return found


def used() -> Path:
    assert folder_to_load().resolve() == load_default_build().folder.resolve()
    return load_default_build().folder.resolve()


def test_the_places_come_in_order(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_BUILD_DIR", str(places["installed"]))
    assert used() == places["installed"]
    monkeypatch.delenv("W4A16GEN_BUILD_DIR")
    for folder in places.values():
        assert used() == folder
        shutil.rmtree(folder)
    assert folder_to_load() == Path("build")
    with pytest.raises(NotBuiltError, match="No build found in build"):
        load_default_build()


def test_a_variable_that_names_no_build_is_not_passed_over(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert places
    monkeypatch.setenv("W4A16GEN_BUILD_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(NotBuiltError, match=r"No build found in .*nowhere"):
        load_default_build()


def test_a_damaged_build_of_the_user_is_not_passed_over(places: dict[str, Path], fake_build: Build) -> None:
    (places["local"] / fake_build.library.relative_to(fake_build.folder)).write_bytes(b"damaged")
    with pytest.raises(NotBuiltError, match="is damaged"):
        load_default_build()


@pytest.mark.parametrize("place", ["local", "user"])
def test_a_build_that_others_may_write_is_passed_over_with_a_warning(place: str, places: dict[str, Path]) -> None:
    order = list(places)
    if place == "user":
        shutil.rmtree(places["local"])
    places[place].chmod(0o777)
    with pytest.warns(UserWarning, match=r"may be written by other users.* is used instead"):
        build = load_default_build()
    assert build.folder == places[order[order.index(place) + 1]]


def test_without_another_build_it_is_refused(places: dict[str, Path]) -> None:
    shutil.rmtree(places["user"])
    shutil.rmtree(places["installed"])
    places["local"].chmod(0o777)
    with pytest.raises(NotBuiltError, match="may be written by other users"):
        load_default_build()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_build_of_another_user_is_passed_over_even_if_it_is_damaged(places: dict[str, Path]) -> None:
    (places["local"] / "manifest.json").write_text("{}")
    os.chown(places["local"], 12345, 12345)
    with pytest.warns(UserWarning, match="belongs to user 12345"):
        assert load_default_build().folder == places["user"]


def test_the_users_folder_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("W4A16GEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_build_folder().relative_to(tmp_path).parts[0] == "w4a16gen"


def test_build_user_writes_there(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_CACHE_DIR", str(tmp_path / "cache"))
    asked: dict[str, Path] = {}

    def build(_configs: object, **options: Path) -> None:
        asked.update(options)
        raise NotBuiltError("stop here")

    cli.services = Services(build=build)
    cli.run("build --user")
    assert asked["folder"] == user_build_folder()
    assert asked["generated"] == user_build_folder().parent / "generated"
    done = cli.run("build --user --build-dir other")
    assert done.exit_code == 2
    assert "--user and --build-dir name two folders" in done.stderr
