"""Prometheus series of draft control, in the process that serves ``/metrics``."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Gauge

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
    """Shows the latest counts of each engine."""

    def __init__(self) -> None:
        # As vLLM does for its gauges: several front ends hear of one engine in turn.
        mode: Any = "mostrecent"
        self._gauges = {
            key: Gauge(name, text, ("engine",), multiprocess_mode=mode)
            for key, (name, text) in SERIES.items()
        }

    def show(self, counts: dict[str, float], engine: int) -> None:
        """Replace what is shown of one engine."""
        for key, gauge in self._gauges.items():
            gauge.labels(str(engine)).set(counts[key])


@cache
def draft_gauges() -> DraftGauges:
    """The series of this process."""
    return DraftGauges()
