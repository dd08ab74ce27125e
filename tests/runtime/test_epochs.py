"""Numbers of launches, by which stream-K tells its own partial sums from what a workspace holds already."""

from __future__ import annotations

from pathlib import Path

from host_programs import compile_for_host, output_of


def test_each_launch_has_a_number_of_its_own_that_no_cleared_workspace_holds(tmp_path: Path) -> None:
    program = compile_for_host("host_epochs", tmp_path)
    runs = [[int(line) for line in output_of(program)] for _ in range(2)]
    assert [distinct for distinct, _, _ in runs] == [4000, 4000]
    assert [even for _, _, even in runs] == [0, 0], "0 marks sums that have been read"
    assert runs[0][1] != runs[1][1], "another process may have left its sums in the memory"
