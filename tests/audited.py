"""Folders of sources for the audit, and what it finds in them."""

from __future__ import annotations

from pathlib import Path

from fakes.generator import GOLDEN

from w4a16gen.integrations.tensorrt_llm.audit import Audit, audit
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.kernels.spaces import enumerate_space

BF16 = GOLDEN[0].replace("half", "__nv_bfloat16")
"""An instantiation that is none of W4A16."""


def audit_texts(folder: Path, *texts: str) -> Audit:
    """Audit sources with these texts."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.cu").write_text(text)
    return audit(folder)


def write_whole(folder: Path) -> Path:
    """Write a folder whose verdict is good."""
    emit_trtllm(enumerate_space("trtllm"), folder)
    assert audit(folder).ok
    return folder
