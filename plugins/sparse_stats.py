"""What sparse attention did in some workers, as plain values that travel and that series show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.plugins.sparse_worker import SparseWorker


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
        "layers": layers,
        "dense": dict(dense),
        "masses": {quantile: mass for quantile, mass in masses.items() if mass is not None},
        "totals": totals,
    }
