"""Measurements of the time that kernels take."""
