"""Launches that are left to the library: which ones become dependent, by what the driver says of a stream capture."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_programs import compile_for_host, output_of

ORDINARY, DEPENDENT, AUTO = "0", "1", "2"
QUESTIONS = (
    "cuStreamGetCaptureInfo",
    "cuGraphNodeGetType",
    "cuGraphKernelNodeGetParams",
    "cuGraphNodeGetDependencies",
    "cuFuncGetName",
    "cuKernelGetName",
    "cuFuncGetAttribute",
    "cuKernelGetFunction",
)

pytestmark = pytest.mark.xdist_group("captures")  # one worker compiles the program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library against a stand-in of the driver; see tests/cpp/host_captures.cpp."""
    return compile_for_host("host_captures", tmp_path_factory.mktemp("captures"))


@pytest.mark.parametrize("facts", ["native", "native_handle", "native:132,384,80,115712", "native:1,640,48,0"])
@pytest.mark.parametrize("asked", [AUTO, DEPENDENT])
def test_a_launch_is_dependent_beside_a_native_kernel_that_leaves_room(program: Path, asked: str, facts: str) -> None:
    assert output_of(program, asked, facts) == ["dependent"]


@pytest.mark.parametrize(
    "facts",
    [
        "native:133,384,80,1024",
        "native:132,384,81,1024",
        "native:132,640,49,1024",
        "native:132,384,80,115713",
        "native fail:cuFuncGetAttribute",
        "native_handle fail:cuKernelGetFunction",
        "edge",
    ],
)
@pytest.mark.parametrize("asked", [AUTO, DEPENDENT])
def test_a_dependent_launch_that_finds_no_room_takes_sms_alone(program: Path, asked: str, facts: str) -> None:
    assert output_of(program, asked, *facts.split()) == ["dependent, alone"]


def test_a_dependent_launch_behind_an_ordinary_kernel_takes_sms_alone(program: Path) -> None:
    assert output_of(program, DEPENDENT, "ordinary") == ["dependent, alone"]


@pytest.mark.parametrize(
    "facts",
    [
        "none native",
        "ended native",
        "",
        "ordinary",
        "pack",
        "cutlass",
        "copy",
        "other_edge",
        "part",
        "native native",
        "native ordinary",
        "edge copy",
    ],
)
def test_any_other_launch_is_ordinary(program: Path, facts: str) -> None:
    assert output_of(program, AUTO, *facts.split()) == ["ordinary"]


@pytest.mark.parametrize(
    ("behind", "name"),
    [
        ("native", "cuStreamGetCaptureInfo"),
        ("native", "cuGraphNodeGetType"),
        ("native", "cuGraphKernelNodeGetParams"),
        ("native", "cuFuncGetName"),
        ("native_handle", "cuKernelGetName"),
        ("edge", "cuGraphNodeGetDependencies"),
    ],
)
def test_a_question_that_fails_is_answered_with_no(program: Path, behind: str, name: str) -> None:
    assert output_of(program, AUTO, behind, f"fail:{name}") == ["ordinary"]


def test_one_answer_is_enough(program: Path) -> None:
    assert output_of(program, AUTO, "edge", "fail:cuGraphKernelNodeGetParams") == ["dependent, alone"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_driver_that_lacks_a_question_leaves_launches_ordinary(program: Path, name: str) -> None:
    assert output_of(program, AUTO, "native", f"absent:{name}") == ["ordinary"]


@pytest.mark.parametrize(("asked", "launched"), [(ORDINARY, "ordinary"), (DEPENDENT, "dependent")])
def test_a_launch_that_is_named_is_taken_as_it_is(program: Path, asked: str, launched: str) -> None:
    for facts in ("none", "native", "copy"):
        assert output_of(program, asked, facts) == [launched]


@pytest.mark.parametrize("asked", ["-1", "3"])
def test_another_number_is_refused(program: Path, asked: str) -> None:
    assert output_of(program, asked) == [f"dependent_launch of {asked} must be a w4a16_launch, 0 to 2"]
