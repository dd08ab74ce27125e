"""The environment of compilers, without what would change their result."""

from __future__ import annotations

import os

IGNORED_VARIABLES = (
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "OBJC_INCLUDE_PATH", "LIBRARY_PATH", "LD_RUN_PATH"),
    *("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CC", "CXX", "CUDACXX", "CUDAHOSTCXX"),
    *("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN", "CUDA_INC_PATH", "CUDA_LIB_PATH"),
    *("INCLUDES", "SYSTEM_INCLUDES", "LIBRARIES", "CUDAFE_FLAGS", "PTXAS_FLAGS", "NVVM_FLAGS", "OCG_FLAGS"),
    *("NV_NVVM_VERSION", "GNUTARGET", "LDEMULATION"),
    *("DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES", "GCC_COMPARE_DEBUG", "DESTDIR", "VERBOSE", "MAKEFLAGS"),
)
"""Variables that compilers and CMake honour and that a build does not pass on: its result must not depend on them."""
_IGNORED_PREFIXES = ("CMAKE_", "NINJA_")


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment of a compiler: this process's, without the variables that would change its result."""
    ignored = {*IGNORED_VARIABLES, *(name for name in os.environ if name.startswith(_IGNORED_PREFIXES))}
    kept = {name: value for name, value in os.environ.items() if name not in ignored}
    return {**kept, "LC_ALL": "C", **extra}
