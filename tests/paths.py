"""Where the tests find things."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
"""The repository, or an unpacked source distribution."""
CPP = TESTS / "cpp"
DATA = TESTS / "data"
FAKES = TESTS / "fakes"
GOLDEN = TESTS / "golden"
EXAMPLES = ROOT / "examples"
