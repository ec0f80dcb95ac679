"""Prometheus series of shared prefixes, in the process that serves ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from penstock.patches.gauges import ENGINE, engine_gauge

TOTALS = {
    "steps": "Decode steps that read what is shared once.",
    "stock_steps": "Decode steps of several requests that would have saved too little.",
    "runs": "Runs of blocks that were read once for several requests, in those that shared.",
    "blocks": "Blocks that requests had in those steps.",
    "blocks_read": "Blocks that were read in those steps, a shared one once.",
    "searches": "Times that shared blocks were looked for; in other steps, tables had only grown.",
    "planning_seconds": "Time that looking for shared blocks and laying out steps took.",
}
"""Totals since the start. Each is a series ``penstock_shared_prefix_<name>``."""


class SharedPrefixGauges:
    """Shows the latest totals of each engine, named by the values of ``engine_labels``."""

    def __init__(self, engine_labels: Sequence[str] = ENGINE) -> None:
        self._gauges = {
            name: engine_gauge(f"penstock_shared_prefix_{name}", text, engine_labels)
            for name, text in TOTALS.items()
        }

    def show(self, totals: Mapping[str, float], *engine: str) -> None:
        """Replace what is shown of one engine."""
        for name, gauge in self._gauges.items():
            gauge.labels(*engine).set(totals[name])


@cache
def shared_prefix_gauges() -> SharedPrefixGauges:
    """The series of this process."""
    return SharedPrefixGauges()
