"""What came of the targets, tier by tier, and how well steps were predicted: totals since the start."""

from __future__ import annotations

from typing import Any

from penstock.schedulers.slo.attainment import Tally
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.records import Record
from penstock.schedulers.slo.targets import Tiers


class SLOTotals:
    """Counts requests that ended by themselves, and steps."""

    def __init__(self, planner: Planner, tiers_s: tuple[float, ...]) -> None:
        self._planner = planner
        self._tiers = Tiers(tiers_s)
        self._tallies = {name_of(self._tiers, place): Tally() for place in range(len(self._tiers))}
        self.yielded_steps = 0
        """Steps left to the engine since the one before, as planned, held nothing."""
        self.predicted_s = self.measured_s = 0.0

    def ended(self, record: Record, tokens: int) -> None:
        """A request with ``tokens`` of prompt and output ended by itself."""
        targets = record.running.targets
        if targets is not None:
            tally = self._tallies[name_of(self._tiers, self._tiers.index(targets.tpot_s))]
            attained = record.running.first_token_s is not None and record.ttft_met and record.pace_met
            tally.add(tokens, attained)

    def stepped(self, predicted_s: float, measured_s: float) -> None:
        """A step took ``measured_s``."""
        self.predicted_s += predicted_s
        self.measured_s += measured_s

    def totals(self) -> dict[str, float]:
        """Everything that has no tier."""
        planner, model = self._planner, self._planner.model
        replans = planner.replan_counters
        return {
            "step_time_error_median": model.error(0.5),
            "step_time_error_p99": model.error(0.99),
            "predicted_seconds": self.predicted_s,
            "measured_seconds": self.measured_s,
            "rejected_step_times": model.rejected_steps,
            "plans": planner.counters.plans,
            "passive_plans": planner.counters.passive,
            "yielded_steps": self.yielded_steps,
            "replans": replans.replans,
            "replans_past_work_bound": replans.past_work_bound,
            "admitted_requests": replans.admitted,
            "demoted_requests": replans.demoted + planner.counters.demoted_running,
            "skipped": planner.counters.skipped,
            "preempted_requests": planner.counters.preempted,
            "clock_steps_back": planner.counters.clock_steps_back,
        }

    def payload(self) -> dict[str, Any]:
        """Plain values, which cross processes."""
        tiers = {
            name: [tally.requests, tally.attained, tally.tokens, tally.attained_tokens]
            for name, tally in self._tallies.items()
        }
        return {"tiers": tiers, "totals": self.totals()}

    def line(self) -> str:
        """One line for a log; empty before a request with targets has ended."""
        shown = [
            f"{name}: {tally.attained} of {tally.requests}"
            for name, tally in self._tallies.items()
            if tally.requests
        ]
        if not shown:
            return ""
        error = 100 * self._planner.model.error()
        attained = ", ".join(shown)
        return f"slo: attained by time per token {attained}; step time off by {error:.0f} % in the median"


def name_of(tiers: Tiers, place: int) -> str:
    """A tier's label: its time per token in milliseconds."""
    return f"{1e3 * tiers.tpots_s[place]:g} ms"
