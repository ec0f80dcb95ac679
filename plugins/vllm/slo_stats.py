"""The totals of the SLO policy on their way to ``/metrics``, inside vLLM's statistics."""

from __future__ import annotations

import logging
from typing import Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.schedulers.client_service import EXPORT_INTERVAL_S, LOG_INTERVAL_S
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.totals import SLOTotals
from penstock.schedulers.waiting import Clock

logger = logging.getLogger("vllm.penstock")


class SLOStats(SLOTotals):
    """Adds totals to vLLM's statistics at intervals."""

    def __init__(self, planner: Planner, tiers_s: tuple[float, ...], clock: Clock, *, export: bool) -> None:
        super().__init__(planner, tiers_s)
        self._clock = clock
        self._export = export
        self._exported_s = self._logged_s = clock()
        self._ready: dict[str, Any] | None = None

    def refresh(self) -> None:
        """Make what ``add_to`` puts into the next statistics, if it is due."""
        now = self._clock()
        if self._export and not 0 <= now - self._exported_s < EXPORT_INTERVAL_S:
            self._exported_s = now
            self._ready = self.payload()
        if not 0 <= now - self._logged_s < LOG_INTERVAL_S:
            self._logged_s = now
            if line := self.line():
                logger.info("penstock: %s", line)

    def add_to(self, stats: Any, *, idle: bool) -> None:
        """Put totals into a ``SchedulerStats`` if they were due; always when the engine falls ``idle``."""
        if self._export and (idle or self._ready is not None):
            totals = self.payload() if idle or self._ready is None else self._ready
            self._ready = None
            stats.kv_connector_stats = {
                **(stats.kv_connector_stats or {}),
                PAYLOAD_KEY: {"policy": "slo", "slo": totals},
            }
