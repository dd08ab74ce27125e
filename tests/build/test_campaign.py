"""A short, seeded part of the fault campaign; `python tools/fault_campaign.py` runs all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.compile

CAMPAIGN = ROOT / "tools" / "fault_campaign.py"


@pytest.mark.usefixtures("fake_nvcc")
def test_builds_survive_one_fault_of_each_kind(fake_cache: Path) -> None:
    kinds = ["kills", "moves", "clocks", "full_disks", "pairs"]
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(CAMPAIGN), "--count", "1", "--seed", "1", "--only", *kinds],
        env={**os.environ, "FAKE_CACHE": str(fake_cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = dict(re.findall(r"^(.+): (\d+) trials, 0 failures", done.stdout, re.MULTILINE))
    expected = {"kills": "1", "moves": "1", "clocks": "1", "two at once": "1"}
    assert expected.items() <= trials.items(), done.stdout
