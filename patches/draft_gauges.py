"""Prometheus series of drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from penstock.patches.gauges import ENGINE, engine_gauge

SERIES = {
    "allocated": ("penstock_draft_tokens_allocated", "Draft tokens that were verified or are to be."),
    "accepted": ("penstock_draft_tokens_accepted", "Draft tokens that were right."),
    "wasted": ("penstock_draft_tokens_wasted", "Draft tokens that were verified and not accepted."),
    "cut_off": ("penstock_draft_tokens_cut_off", "Draft tokens that were proposed and not worth their time."),
    "probes": (
        "penstock_draft_probes",
        "Steps that drafted, or did not, only to learn what drafts are worth.",
    ),
    "step_time_error": ("penstock_step_time_error_ratio", "Median relative error of predicted step times."),
}


class DraftGauges:
    """Shows the latest counts of each engine.

    ``prefix`` goes before the names of the series, ``engine_labels`` say which engine a series is of.
    ``keys`` are those of ``SERIES`` that the engine counts.
    """

    def __init__(
        self, prefix: str = "", engine_labels: Sequence[str] = ENGINE, keys: Sequence[str] = tuple(SERIES)
    ) -> None:
        self._gauges = {
            key: engine_gauge(prefix + SERIES[key][0], SERIES[key][1], engine_labels) for key in keys
        }

    def show(self, counts: Mapping[str, float], *engine: str) -> None:
        """Replace what is shown of one engine, named by the values of ``engine_labels``."""
        for key, gauge in self._gauges.items():
            gauge.labels(*engine).set(counts[key])


@cache
def draft_gauges(
    prefix: str = "", engine_labels: tuple[str, ...] = ENGINE, keys: tuple[str, ...] = tuple(SERIES)
) -> DraftGauges:
    """The series of this process."""
    return DraftGauges(prefix, engine_labels, keys)
