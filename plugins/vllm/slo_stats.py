"""The totals of the SLO policy on their way to ``/metrics``, inside vLLM's statistics."""

from __future__ import annotations

from typing import Any

from penstock.plugins.vllm.due_stats import DueStats
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.totals import SLOTotals
from penstock.schedulers.waiting import Clock


class SLOStats(SLOTotals, DueStats):
    """Totals that are added to vLLM's statistics at intervals."""

    def __init__(self, planner: Planner, tiers_s: tuple[float, ...], clock: Clock, *, export: bool) -> None:
        SLOTotals.__init__(self, planner, tiers_s)
        DueStats.__init__(self, clock, export=export)

    def carried(self) -> dict[str, Any]:
        return {"policy": "slo", "slo": self.payload()}
