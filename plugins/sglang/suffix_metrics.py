"""What became of drafts, beside SGLang's own counts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.patches.draft_gauges import draft_gauges
from penstock.plugins.sglang.publishing import PREFIX
from penstock.plugins.sglang.scheduler_metrics import leads, shown_labels

COUNTED = ("allocated", "accepted", "wasted")
"""Of ``patches.draft_gauges``: no draft is cut off here, and no pass is made to learn from."""


def update_spec_metrics(original: Callable[..., Any], reporter: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``SchedulerMetricsReporter.update_spec_metrics``: a pass came back, its drafts are counted."""
    found = original(reporter, *args, **kwargs)
    labels = shown_labels(reporter.scheduler)
    if labels is not None:
        counts = reporter.scheduler.draft_worker.counts
        if leads(reporter.scheduler):
            draft_gauges(keys=COUNTED).show(counts, str(labels.get("dp_rank", 0)))
        draft_gauges(PREFIX, tuple(labels), COUNTED).show(counts, *map(str, labels.values()))
    return found
