"""What each client has had, for the interval log line and for the front end's metrics.

A scheduler's statistics reach the front end inside vLLM's ``SchedulerStats``, which has no field for others.
The one that is an open dictionary, ``kv_connector_stats``, carries ours under a key of its own, and the front
end takes them out before vLLM looks (``patches/vllm/stat_logging.py``). They travel only where the front end
is known to do so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.schedulers.client_service import EXPORT_INTERVAL_S, LOG_INTERVAL_S, snapshot
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.waiting import Clock, WaitingOrder

logger = logging.getLogger("vllm.penstock")


class ClientStats:
    """Adds snapshots to vLLM's statistics at intervals of ``clock``, and logs them at longer ones.

    ``settle`` is called before one is taken, to charge ``order`` with what it was not charged with yet.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        order: WaitingOrder,
        clock: Clock,
        *,
        settle: Callable[[], None],
        export: bool,
    ) -> None:
        self._config = config
        self._order = order
        self._clock = clock
        self._settle = settle
        self._export = export
        self._exported_s = self._logged_s = clock()

    def add_to(self, stats: Any, *, idle: bool) -> None:
        """Put a snapshot into a ``SchedulerStats`` if one is due. An ``idle`` engine makes no statistics
        until its next request, so its last ones are never left out."""
        now = self._clock()
        export = self._export and (idle or now - self._exported_s >= EXPORT_INTERVAL_S)
        log = now - self._logged_s >= LOG_INTERVAL_S
        if not export and not log:
            return
        self._settle()
        found = snapshot(self._order, self._config.shown_clients)
        if export:
            self._exported_s = now
            payload = {PAYLOAD_KEY: found.as_dict(self._config.policy)}
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), **payload}
        if log:
            self._logged_s = now
            if line := found.line(self._config.policy):
                logger.info("penstock: %s", line)
