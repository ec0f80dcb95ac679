"""What sparse attention did in one worker: masses, shares, fallbacks, times."""

from __future__ import annotations

from collections import Counter, deque

import msgspec

from penstock.kernels.sparse.fallback import Reason

WINDOW = 4096
"""Measured masses that quantiles are of."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the start, but for the quantiles, which are of the last measurements."""

    selections: int
    """(layer, request, step) in which pages were chosen."""
    selected_share: float
    """Of the pages, how many were read, over all selections."""
    layer_shares: dict[int, float]
    """The same by layer."""
    layer_pages: dict[int, tuple[int, int]]
    """Pages read, and pages there were, by layer."""
    mass_mean: float | None
    mass_p10: float | None
    mass_p50: float | None
    """Attained mass as measured, exactly, on samples; None before the first."""
    measurements: int
    dense: dict[str, int]
    """(layer, request, step) that stayed dense, by reason."""
    selection_seconds: float
    measuring_seconds: float
    index_blocks: int
    index_seconds: float


class ServingStats:
    """Counts; one object a worker, not safe between threads."""

    def __init__(self) -> None:
        self._pages: dict[int, list[int]] = {}
        self._dense: Counter[str] = Counter()
        self._masses: deque[float] = deque(maxlen=WINDOW)
        self._ordered: list[float] | None = []
        """Masses in order, until another one comes."""
        self._measurements = self._selections = self._blocks = 0
        self._selecting = self._measuring = self._indexing = 0.0

    def dense(self, reason: Reason) -> None:
        """A layer was dense for a request in a step."""
        self._dense[reason.value] += 1

    def chosen(self, layer: int, read: int, of: int, seconds: float) -> None:
        """Pages were chosen: ``read`` of ``of``, over all KV heads."""
        pages = self._pages.setdefault(layer, [0, 0])
        pages[0] += read
        pages[1] += of
        self._selections += 1
        self._selecting += seconds

    def tallied(self, layer: int, *, selections: int, read: int, of: int, short: int) -> None:
        """The same of many steps, as a device counted it; ``short`` contexts were dense."""
        pages = self._pages.setdefault(layer, [0, 0])
        pages[0] += read
        pages[1] += of
        self._selections += selections
        if short:
            self._dense[Reason.SHORT_CONTEXT.value] += short

    def indexed(self, blocks: int, seconds: float) -> None:
        """Blocks were summarised."""
        self._blocks += blocks
        self._indexing += seconds

    def measured(self, mass: float) -> None:
        """The exact mass of what a query head reads."""
        self._masses.append(mass)
        self._ordered = None
        self._measurements += 1

    def measuring(self, seconds: float) -> None:
        """Time that measurements took."""
        self._measuring += seconds

    @property
    def selections(self) -> int:
        """(layer, request, step) in which pages were chosen."""
        return self._selections

    def snapshot(self) -> Snapshot:
        """All of it at this moment."""
        if self._ordered is None:
            self._ordered = sorted(self._masses)
        masses = self._ordered
        return Snapshot(
            selections=self._selections,
            selected_share=_share(list(self._pages.values())),
            layer_shares={layer: _share([pages]) for layer, pages in sorted(self._pages.items())},
            layer_pages={layer: (read, of) for layer, (read, of) in sorted(self._pages.items())},
            mass_mean=sum(masses) / len(masses) if masses else None,
            mass_p10=_quantile(masses, 0.1),
            mass_p50=_quantile(masses, 0.5),
            measurements=self._measurements,
            dense=dict(self._dense),
            selection_seconds=self._selecting,
            measuring_seconds=self._measuring,
            index_blocks=self._blocks,
            index_seconds=self._indexing,
        )


def _share(pages: list[list[int]]) -> float:
    total = sum(of for _, of in pages)
    return sum(read for read, _ in pages) / total if total else 1.0


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
