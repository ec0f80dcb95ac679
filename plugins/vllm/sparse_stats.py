"""What sparse attention did in this worker, for ``/metrics``.

It travels with the outputs of the worker's steps (``patches/vllm/worker_stats.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from penstock.plugins.vllm.sparse_worker import SparseWorker

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
        """``summary`` of all; None where no layer can be sparse, or nobody hears."""
        return None if self._muted or not self._workers else summary(list(self._workers))


sources = Sources()


def summary(workers: Sequence[SparseWorker]) -> dict[str, Any]:
    """Totals since the start, but for the masses, as plain values.

    Masses are those of the worker with the most measurements: quantiles of several cannot be added up, and
    the others stand for groups of layers of another kind, which are dense as a rule.
    """
    counted = [(worker, worker.stats.snapshot()) for worker in workers]
    layers: dict[str, tuple[int, int]] = {}
    dense: Counter[str] = Counter()
    for _, now in counted:
        layers |= {str(layer): pages for layer, pages in now.layer_pages.items()}
        dense.update(now.dense)
    most = max((now for _, now in counted), key=lambda now: now.measurements)
    masses = {"0.1": most.mass_p10, "0.5": most.mass_p50}
    totals = {
        name: sum(getattr(now, name) for _, now in counted)
        for name in (
            "selections",
            "measurements",
            "selection_seconds",
            "measuring_seconds",
            "index_blocks",
            "index_seconds",
        )
    }
    totals["index_bytes"] = sum(worker.index_bytes for worker, _ in counted)
    totals["cache_bytes"] = sum(worker.cache_bytes for worker, _ in counted)
    return {
        PART: {
            "layers": layers,
            "dense": dict(dense),
            "masses": {quantile: mass for quantile, mass in masses.items() if mass is not None},
            "totals": totals,
        }
    }
