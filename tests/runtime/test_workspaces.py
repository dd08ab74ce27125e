"""Workspaces that the module allocates, against a stand-in for the CUDA runtime that fails at each of its calls."""

from __future__ import annotations

from pathlib import Path

from host_programs import compile_for_host, output_of


def test_no_failure_leaks_memory_waits_for_a_lock_or_changes_the_capture_mode(tmp_path: Path) -> None:
    lines = output_of(compile_for_host("host_workspaces", tmp_path))
    assert len(lines) == 11
    assert [line for line in lines if not line.endswith(": ok")] == []
