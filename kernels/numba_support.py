"""What kernels that Numba compiles have in common; they run where Numba is installed, as it is with vLLM.

Numba is imported by what needs it and not before: without it, the torch references beside the kernels serve.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

HAS_NUMBA = importlib.util.find_spec("numba") is not None
"""Numba is installed."""

FAST_MATH = frozenset({"reassoc", "contract", "nsz"})
"""Sums in any order and multiply-adds, which vectors need; NaN and infinity keep their meaning."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile ``function`` at its first call for the types that it gets, without the interpreter's lock.

    The result is kept on disk for the next process, but for where neither the package's folder nor the user's
    cache can be written. It counts for as long as no source file of the kernels changes.
    """
    import numba

    found: Function = numba.njit(nogil=True, fastmath=set(FAST_MATH), error_model="numpy")(function)
    try:
        found._cache = _kept()(function)  # type: ignore[attr-defined]
    except RuntimeError:
        # No place for a cache.
        return found
    return found


@cache
def _kept() -> Callable[[Callable[..., Any]], Any]:
    """What ``numba.njit(cache=True)`` keeps, by one more key: Numba itself looks at the file of a function
    alone, and would join the new version of a caller with an old one of what it calls: the process ends."""
    from numba.core.caching import FunctionCache

    class OfSources(FunctionCache):
        def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
            return (*super()._index_key(*arguments), sources_digest())

    return OfSources


@cache
def sources_digest(folder: Path = Path(__file__).parent) -> str:
    """Of all modules below ``folder``: what the kernels are made from."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
