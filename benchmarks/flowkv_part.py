"""What every part of the FlowKV bench is asked, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.report import Cell, Claim

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tell = Callable[[str], None]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Choices of the person who runs the bench."""

    quick: bool = False
    trace: Path | None = None
    seed: int = 0
    seeds: int | None = None
    """Seeds from ``seed`` on that the pools take; None leaves it to the bench."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one part."""

    rows: Sequence[dict[str, Cell]]
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    draw: Callable[[Axes], None] | None = None
    """Fills one set of axes; None where there is nothing to plot."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of a non-empty sample lies, without interpolation."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
