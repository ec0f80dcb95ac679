"""What kernels that Numba compiles have in common; they run where Numba is installed, as it is with vLLM.

Numba is imported by what needs it and not before: without it, the torch references beside the kernels serve.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

HAS_NUMBA = importlib.util.find_spec("numba") is not None
"""Numba is installed."""

FAST_MATH = frozenset({"reassoc", "contract", "nsz"})
"""Sums in any order and multiply-adds, which vectors need; NaN and infinity keep their meaning."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile ``function`` at its first call for the types that it gets, without the interpreter's lock.

    The result is kept on disk for the next process, but for where neither the package's folder nor the user's
    cache can be written. Numba watches the file of ``function`` alone: after a change to what it calls in
    another file, delete ``__pycache__``.
    """
    import numba

    options = {"nogil": True, "fastmath": set(FAST_MATH), "error_model": "numpy"}
    try:
        found: Function = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # No place for a cache.
        found = numba.njit(**options)(function)
    return found
