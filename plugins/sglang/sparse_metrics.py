"""What sparse attention counts, shown on ``/metrics`` by the process that computes: the scheduler's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from penstock.patches.sparse_gauges import sparse_gauges
from penstock.plugins.sglang.publishing import Publisher
from penstock.plugins.sglang.scheduler_metrics import publisher_of
from penstock.plugins.sparse_stats import summary
from penstock.plugins.sparse_worker import SparseWorker

workers: WeakSet[SparseWorker] = WeakSet()
"""Who is counted in this process."""
_publishers: WeakKeyDictionary[Any, Publisher] = WeakKeyDictionary()


class _Source:
    """All workers together. Their lines of the log come by the number of selections."""

    def payload(self) -> dict[str, Any]:
        return summary(list(workers))

    def line(self) -> str:
        return ""


def process_batch_result(original: Callable[..., Any], scheduler: Any, *args: Any) -> Any:
    """Around ``Scheduler.process_batch_result``."""
    found = original(scheduler, *args)
    if publisher := _publisher(scheduler):
        publisher.passed()
    return found


def on_idle(original: Callable[[Any], Any], scheduler: Any) -> Any:
    """Around ``Scheduler.on_idle``, which may sleep until a request comes."""
    if publisher := _publisher(scheduler):
        publisher.idle()
    return original(scheduler)


def _publisher(scheduler: Any) -> Publisher | None:
    if scheduler not in _publishers and workers:
        _publishers[scheduler] = publisher_of(scheduler, _Source(), sparse_gauges)
    return _publishers.get(scheduler)
