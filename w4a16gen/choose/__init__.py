"""The choice of a kernel for a call."""
