"""Which of a scheduler's ranks shows what: as SGLang has it for its own series."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.runtime_context import get_parallel

from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.publishing import MakeGauges, Publisher, Source
from penstock.schedulers.waiting import Clock


def shown_labels(scheduler: Any) -> Mapping[str, Any] | None:
    """The labels of SGLang's own series; None where this rank shows none."""
    context = scheduler.metrics_collector_context
    return context.collector.labels if context.current_scheduler_metrics_enabled else None


def leads(scheduler: Any) -> bool:
    """Whether this rank speaks for its engine: in the log, and in series that do not say of which rank they
    are."""
    return bool(scheduler.metrics_collector_context.is_stats_logging_rank and get_parallel().pp_rank == 0)


def publisher_of(
    scheduler: Any,
    source: Source,
    make_gauges: MakeGauges,
    clock: Clock = time.monotonic,
    settle: Callable[[], None] = lambda: None,
) -> Publisher:
    """Shows what ``source`` counts in a scheduler's process; ``settle`` as for ``Publisher``."""
    return Publisher(
        source,
        make_gauges,
        shown_labels(scheduler),
        clock,
        upstream().logger,
        leads=leads(scheduler),
        settle=settle,
    )
