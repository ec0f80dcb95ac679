"""What SGLang's worker for n-grams is given to hold in the place of its corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class NoCorpus:
    """Remembers nothing: our texts are followed elsewhere. SGLang's own is compiled when the first one is
    made, for which it needs a C++ compiler, and sets memory aside."""

    def __init__(self, **_sizes: Any) -> None:
        """As ``NgramCorpus``."""

    def reset(self) -> None:
        """There is nothing to forget."""

    def erase_match_state(self, req_ids: Sequence[str]) -> None:
        """There is none."""
