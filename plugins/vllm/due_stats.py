"""Statistics of ours on their way to the front end and to the log, at intervals.

A scheduler's statistics reach the front end inside vLLM's ``SchedulerStats``, which has no field for others.
The one that is an open dictionary, ``kv_connector_stats``, carries ours under a key of its own, and the front
end takes them out before vLLM looks (``patches/vllm/stat_logging.py``). They travel only where the front end
is known to do so.
"""

from __future__ import annotations

import logging
from typing import Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.schedulers.client_service import EXPORT_INTERVAL_S, LOG_INTERVAL_S
from penstock.schedulers.waiting import Clock

logger = logging.getLogger("vllm.penstock")


class DueStats:
    """Makes statistics where no step waits for them, and adds them to vLLM's next ones.

    ``clock`` is that of the intervals. Whoever derives from this says what travels and what is logged.
    """

    def __init__(self, clock: Clock, *, export: bool) -> None:
        self._clock = clock
        self._export = export
        self._exported_s = self._logged_s = clock()
        self._ready: dict[str, Any] | None = None

    def carried(self) -> dict[str, Any]:
        """What travels, as plain values."""
        raise NotImplementedError

    def line(self) -> str:
        """What is logged; empty where there is nothing to say."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Make what ``add_to`` puts into the next statistics, if it is due."""
        now = self._clock()
        if self._export and not 0 <= now - self._exported_s < EXPORT_INTERVAL_S:
            self._exported_s = now
            self._ready = self.carried()
        if not 0 <= now - self._logged_s < LOG_INTERVAL_S:
            self._logged_s = now
            if line := self.line():
                logger.info("penstock: %s", line)

    def add_to(self, stats: Any, *, idle: bool) -> None:
        """Put what was due into a ``SchedulerStats``. An ``idle`` engine makes none until its next request,
        so its last ones always carry how things stand."""
        if self._export and (idle or self._ready is not None):
            found = self.carried() if idle or self._ready is None else self._ready
            self._ready = None
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), PAYLOAD_KEY: found}
