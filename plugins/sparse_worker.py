"""What the layers of a worker share under sparse attention, on any engine, and what they tell the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.serving_stats import ServingStats, Snapshot


class SparseWorker:
    """Configuration, margins and counts; one object for each group of layers with the same blocks.

    ``logger`` is one of the engine's.
    """

    def __init__(self, config: ServingConfig, logger: logging.Logger) -> None:
        self.config = config
        self._logger = logger
        self.calibration = Calibration(config.core())
        self.stats = ServingStats()
        self._told = 0
        self.index_bytes = self.cache_bytes = 0
        """Of all layers: what the index takes at most, and the KV cache."""

    def tell_layers(self, reasons: Mapping[str, str | None]) -> None:
        """Say which layers stay dense whatever they hold."""
        dense = {name: reason for name, reason in reasons.items() if reason}
        if dense:
            listed = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
            self._logger.warning("penstock: sparse attention leaves %d layers dense: %s", len(dense), listed)

    def tell_ready(self, seconds: float) -> None:
        """Say how pages are chosen, and how long that took to compile or to load."""
        if HAS_NUMBA:
            self._logger.info("penstock: sparse attention has compiled kernels after %.1f s", seconds)
        else:
            self._logger.warning(
                "penstock: sparse attention without Numba: choosing pages takes several times as long"
            )

    def tell_index(self, index_bytes: int, cache_bytes: int) -> None:
        """A layer has an index of so many bytes at most, beside its KV cache."""
        self.index_bytes += index_bytes
        self.cache_bytes += cache_bytes

    def tell_progress(self) -> None:
        """Write a line every ``log_steps`` selections."""
        every = self.config.log_steps
        if every and self.stats.selections >= self._told + every:
            self._told = self.stats.selections
            self._logger.info("penstock: sparse attention: %s", self.line(self.stats.snapshot()))

    def line(self, now: Snapshot) -> str:
        """One line of a log."""
        mass = "not measured"
        if now.mass_p10 is not None and now.mass_p50 is not None:
            mass = f"P10 {now.mass_p10:.3f}, P50 {now.mass_p50:.3f} of {now.measurements} measured"
        dense = ", ".join(f"{reason} {count}" for reason, count in sorted(now.dense.items())) or "none"
        index = 100 * self.index_bytes / max(1, self.cache_bytes)
        # On a GPU the host takes no times.
        each = (
            f", {1e3 * now.selection_seconds / now.selections:.2f} ms each" if now.selection_seconds else ""
        )
        built = f", {now.index_blocks} blocks in {now.index_seconds:.2f} s" if now.index_blocks else ""
        return (
            f"read {100 * now.selected_share:.1f} % of pages in {now.selections} selections{each}; "
            f"attained mass {mass}; "
            f"dense: {dense}; index at most {self.index_bytes / 2**20:.0f} MiB, {index:.1f} % of the KV "
            f"cache{built}"
        )


def first_reason(reasons: Mapping[str, bool]) -> str | None:
    """The first of the reasons to stay dense that holds, or None."""
    return next((reason for reason, holds in reasons.items() if holds), None)
