"""A finished build: found, opened, called."""
