"""The options of a Ray cluster: what they refuse, and what a machine without Ray says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes.devices import H100, H200
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen.choose.timing_table import card_table
from w4a16gen.cli import main
from w4a16gen.cli.services import Services
from w4a16gen.cli.tuning import _tables_of
from w4a16gen.executors.executor import Executor
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.gpus import Cards

BUILD = "build --mode cs --cta 64x16x64"
TUNE = "tune --problem 16x512x1024"
BENCH = "bench --problem 16x512x1024"


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def library(cli: Runner) -> FakeLibrary:
    """Let commands load a build without GPUs."""
    found = FakeLibrary(enumerate_space("trtllm")[:2], devices=[])
    cli.services = Services(load=lambda _folder: found)
    return found


@pytest.mark.parametrize(
    "command", [BUILD, "build-and-verify", "tune --problem 16x512x1024", "bench --problem 16x512x1024"]
)
def test_without_ray_the_extra_is_named(cli: Runner, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cli.run(f"{command} --ray auto")
    assert done.exit_code == 3
    assert "ray is not installed, which this needs: pip install 'w4a16gen[ray]'" in said(done.stderr)


@pytest.mark.parametrize("command", [BUILD, TUNE, BENCH])
def test_an_address_that_nothing_listens_at_is_said(cli: Runner, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    done = cli.run(f"{command} --ray 127.0.0.1:1")
    assert done.exit_code == 3
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused): check the address" in said(done.stderr)


def test_an_empty_address_is_said(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    done = cli.invoke(main, [*BUILD.split(), "--ray", ""])
    assert done.exit_code == 3
    assert "'' is no address of a Ray cluster" in said(done.stderr)


def test_kinds_with_one_name_have_tables_of_their_own(tmp_path: Path) -> None:
    cards = [H100, replace(H100, sm_count=114), H200]
    kinds = [Cards(card, "", Executor([])) for card in cards]
    tables = _tables_of(tmp_path, None, kinds)
    assert list(tables) == ["NVIDIA H100 80GB HBM3 (132 SMs)", "NVIDIA H100 80GB HBM3 (114 SMs)", "NVIDIA H200"]
    assert list(tables.values()) == [tmp_path / card_table(card) for card in cards]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (f"{BUILD} --ray-env env.json", "--ray-env prepares the workers of a cluster: pass --ray too"),
        (f"{TUNE} --card H200", "--card names GPUs of a cluster: pass --ray too"),
        (f"{BENCH} --card H200", "--card names GPUs of a cluster: pass --ray too"),
        ("bench --random 5 --ray auto", "--random runs on this machine: drop --ray"),
    ],
)
def test_options_that_need_a_cluster_are_refused_without_one(
    cli: Runner, tmp_path: Path, command: str, sentence: str
) -> None:
    (tmp_path / "env.json").write_text("{}")
    done = cli.run(command)
    assert done.exit_code == 2
    assert sentence in said(done.stderr)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no", "env.json is not JSON"),
        ("[" * 100_000, "env.json is not JSON"),
        ("[1]", "env.json holds no JSON object"),
    ],
    ids=["text", "deep", "list"],
)
def test_a_runtime_env_that_is_no_object_is_refused(cli: Runner, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "env.json").write_text(text)
    done = cli.run(f"{BUILD} --ray auto --ray-env env.json")
    assert done.exit_code == 2
    assert sentence in said(done.stderr)


def test_the_runtime_env_goes_to_ray_as_it_is(cli: Runner, tmp_path: Path, library: FakeLibrary) -> None:
    given: list[Any] = []

    @contextmanager
    def connect(address: str, environment: Any, _tell: Any) -> Iterator[None]:
        given.append((address, environment))
        raise KeyboardInterrupt
        yield

    cli.services = Services(load=lambda _folder: library, connect=connect)
    (tmp_path / "env.json").write_text('{"py_modules": ["a.whl"]}')
    assert cli.run(f"{BUILD} --ray ray://head:10001 --ray-env env.json").exit_code == 130
    assert given == [("ray://head:10001", {"py_modules": ["a.whl"]})]
