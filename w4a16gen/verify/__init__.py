"""Proofs: static ones that need no GPU, numerical ones on a Hopper GPU, and the report of both."""

from w4a16gen.verify.report import HEADINGS, Report, verify

__all__ = ["HEADINGS", "Report", "verify"]
