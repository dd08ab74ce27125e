"""Weights in other people's formats, one module each."""
