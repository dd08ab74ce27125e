"""Transformers: models whose linear layers have 4 bits, out of checkpoints of any format that this package reads.

`import w4a16gen` imports neither torch nor transformers; this package does.
"""

from __future__ import annotations

from w4a16gen.errors import missing_extra

try:
    import transformers as _transformers
except ImportError:
    raise missing_extra("transformers", "transformers") from None
del _transformers

from w4a16gen.integrations.transformers.load import from_pretrained  # noqa: E402
from w4a16gen.integrations.transformers.quantizer import W4A16Config, W4A16Quantizer, register  # noqa: E402
from w4a16gen.integrations.transformers.report import LoadReport  # noqa: E402

__all__ = ["LoadReport", "W4A16Config", "W4A16Quantizer", "from_pretrained"]

register()
