"""A program of its own: load a linked pair and print the names of its kernels as JSON.

It runs in a child process, so that a library that crashes its process cannot crash the build. Run as
`python load_check.py MODULE LIBRARY`; it imports nothing of this package.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys


def main(module_path: str, library_path: str) -> None:
    """Load the module, open the library with it, and print the kernels' names."""
    loader = importlib.machinery.ExtensionFileLoader("_w4a16", module_path)
    spec = importlib.util.spec_from_file_location("_w4a16", module_path, loader=loader)
    if spec is None:
        raise ImportError(module_path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    library = module.KernelLibrary(library_path)
    sys.stdout.write(json.dumps([kernel["name"] for kernel in library.kernels()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
