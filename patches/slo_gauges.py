"""Prometheus series of the SLO policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from penstock.patches.gauges import ENGINE, engine_gauge

PER_TIER = {
    "penstock_slo_requests": "Requests with targets that ended.",
    "penstock_slo_attained_requests": "Requests that met their targets.",
    "penstock_slo_tokens": "Prompt and output tokens of requests with targets that ended.",
    "penstock_slo_attained_tokens": "Prompt and output tokens of requests that met their targets.",
}
"""In the order in which a payload lists a tier's totals since the start."""

TOTALS = {
    "step_time_error_median": "Median relative error of the last predictions of step time.",
    "step_time_error_p99": "99th percentile of the relative error of the last predictions of step time.",
    "predicted_seconds": "Sum of predicted step times.",
    "measured_seconds": "Sum of measured step times.",
    "rejected_step_times": "Measured step times that no clock that works can say.",
    "plans": "Steps that were planned, passive ones included.",
    "passive_plans": "Steps in which nobody had targets.",
    "yielded_steps": "Steps left to the engine since the plan before held nothing.",
    "replans": "Decisions on admission.",
    "replans_past_work_bound": "Decisions that fell back to a simpler rule at the bound on work.",
    "admitted_requests": "Requests admitted to be served in time.",
    "demoted_requests": "Requests whose deadline was out of reach.",
    "skipped": "Times that a running request was passed over in a step.",
    "preempted_requests": "Best-effort requests thrown out for admitted ones.",
    "clock_steps_back": "Times that the clock ran backwards.",
}
"""Totals since the start, but for the errors. Each is a series ``penstock_slo_<name>``."""


class SLOGauges:
    """Shows the latest totals of each engine.

    ``prefix`` goes before the names of the series, ``engine_labels`` say which engine a series is of.
    """

    def __init__(self, prefix: str = "", engine_labels: Sequence[str] = ENGINE) -> None:
        self._tiers = [
            engine_gauge(prefix + name, text, engine_labels, "tier") for name, text in PER_TIER.items()
        ]
        self._totals = {
            name: engine_gauge(f"{prefix}penstock_slo_{name}", text, engine_labels)
            for name, text in TOTALS.items()
        }

    def show(self, payload: dict[str, Any], *engine: str) -> None:
        """Replace what is shown of one engine, named by the values of ``engine_labels``."""
        for tier, values in payload["tiers"].items():
            for gauge, value in zip(self._tiers, values, strict=True):
                gauge.labels(*engine, tier).set(value)
        for name, value in payload["totals"].items():
            self._totals[name].labels(*engine).set(value)


@cache
def slo_gauges(prefix: str = "", engine_labels: tuple[str, ...] = ENGINE) -> SLOGauges:
    """The series of this process."""
    return SLOGauges(prefix, engine_labels)
