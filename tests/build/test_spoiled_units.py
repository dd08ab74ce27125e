"""Compile units that a node of a cluster spoils: another node compiles them, and the objects stay the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from w4a16gen.build.compile import Compilation, compile_kernels
from w4a16gen.build.nvcc import UNIT, Compiled
from w4a16gen.build.scratch import make_folders
from w4a16gen.errors import BuildError
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.place import Place, TaskFunction
from w4a16gen.kernels.spaces import enumerate_space

KERNELS = enumerate_space("trtllm-native")[:8]
HASHES = {config: config.name for config in KERNELS}


class OfCluster(Place):
    """A node that compiles nothing, but returns what a compiler would leave."""

    def __init__(self, node: str, spoil: Callable[[Compiled], Compiled] = lambda made: made) -> None:
        super().__init__(node)
        self._spoil = spoil

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Compiled]:
        del function, memory
        content = arguments[0][UNIT].encode()
        yield self._spoil(Compiled(0, "", 1.0, 1, content, hashlib.sha256(content).hexdigest()))

    def stop(self) -> None:
        """End nothing: nothing runs."""


class OfThisMachine(OfCluster):
    """The same in this process."""

    is_here = True


def killed(made: Compiled) -> Compiled:
    return replace(made, returncode=9, text="Killed", content=b"", digest="")


def full(made: Compiled) -> Compiled:
    return replace(made, returncode=1, content=b"", digest="", full=True, fault="No space left on device: /tmp")


SPOILED = {
    "an object was damaged on its way": lambda made: replace(made, content=made.content[:-1] + b"x"),
    "a compiler was killed (out of memory?)": killed,
    "its disk for temporary files is full": full,
    "/usr/bin/g++ is incomplete": lambda made: replace(
        made, returncode=1, content=b"", digest="", fault="/usr/bin/g++ is incomplete"
    ),
}


def compile_on(places: Sequence[Place], folder: Path, told: list[str], most: int | None = None) -> Compilation:
    make_folders(folder)
    return compile_kernels(KERNELS, HASHES, Executor(places, tell=told.append, most=most), folder)


def objects(made: Compilation) -> dict[str, bytes]:
    return {unit.path.name: unit.path.read_bytes() for unit in made.units}


@pytest.mark.parametrize("reason", SPOILED)
def test_what_one_node_spoils_another_one_compiles(tmp_path: Path, reason: str) -> None:
    good = compile_on([OfCluster("a"), OfCluster("b")], tmp_path / "good", [])
    told: list[str] = []
    made = compile_on([OfCluster("bad", SPOILED[reason]), OfCluster("good")], tmp_path / "bad", told)
    assert not made.failures
    assert objects(made) == objects(good), "not divided in another way either"
    assert set(told) == {f"bad lost a task, which goes on elsewhere: {reason}"}


def test_what_every_node_kills_is_compiled_kernel_by_kernel_and_named(tmp_path: Path) -> None:
    made = compile_on([OfCluster("a", killed), OfCluster("b", killed), OfCluster("c")], tmp_path, [])
    assert made.compiled + len(made.failures) == len(KERNELS)
    assert all(failure.killed for failure in made.failures)


def test_a_fault_of_this_machine_still_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No space left on device"):
        compile_on([OfThisMachine("here", full)], tmp_path, [])


def test_units_do_not_depend_on_how_many_nodes_have_answered(tmp_path: Path) -> None:
    few = compile_on([OfCluster("a")], tmp_path / "few", [], most=4)
    many = compile_on([OfCluster(name) for name in "abcd"], tmp_path / "many", [], most=4)
    assert objects(few) == objects(many)
    assert len(few.units) == 4
