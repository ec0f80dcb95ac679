"""What sparse attention did in this worker, for ``/metrics``.

It travels with the outputs of the worker's steps (``patches/vllm/worker_stats.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from penstock.plugins.sparse_stats import summary

if TYPE_CHECKING:
    from penstock.plugins.sparse_worker import SparseWorker

PART = "sparse"
"""Its key in what travels."""


class Sources:
    """Who is counted in this process, and whether anybody hears of it."""

    def __init__(self) -> None:
        self._workers: WeakSet[SparseWorker] = WeakSet()
        self._muted = False

    def add(self, worker: SparseWorker) -> None:
        """Count what ``worker`` does, for as long as it lives."""
        self._workers.add(worker)

    def mute(self) -> None:
        """Collect nothing: the front end is known not to take it out of vLLM's statistics."""
        self._muted = True

    def collect(self) -> dict[str, Any] | None:
        """``summary`` of all, under its key; None where no layer can be sparse, or nobody hears."""
        return None if self._muted or not self._workers else {PART: summary(list(self._workers))}


sources = Sources()
