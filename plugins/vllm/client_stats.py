"""What each client has had, for the interval log line and for the front end's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.plugins.vllm.due_stats import DueStats
from penstock.schedulers.client_service import Snapshot, snapshot
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.waiting import Clock, WaitingOrder


class ClientStats(DueStats):
    """Snapshots of an order's clients.

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
        super().__init__(clock, export=export)
        self._config = config
        self._order = order
        self._settle = settle

    def carried(self) -> dict[str, Any]:
        return self._snapshot().as_dict(self._config.policy)

    def line(self) -> str:
        return self._snapshot().line(self._config.policy)

    def _snapshot(self) -> Snapshot:
        self._settle()
        return snapshot(self._order, self._config.shown_clients)
