"""The program that measures the tensor cores: what it measures, and that it compiles. Only a GPU can run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import wgmma_rates


def test_every_combination_that_fits_is_measured() -> None:
    text = wgmma_rates.source([64, 256], [1, 4])
    for count, warpgroups in ((64, 1), (64, 4), (256, 1)):
        for row in range(len(wgmma_rates.ROWS)):
            assert f"measure<{count}, {warpgroups}, {row}>" in text
    assert "measure<256, 4," not in text, "its sums would not fit"
    assert text.count("m64n64k16") == text.count("m64n256k16") == 1


@pytest.mark.compile
def test_it_compiles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert wgmma_rates.compiled(tmp_path, [64], [2]).stat().st_size
    assert "warning" not in capfd.readouterr().err
