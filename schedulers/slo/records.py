"""What an adapter remembers of a live request with targets, and what came of them so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Targets


@dataclass(slots=True)
class Record:
    """One live request. ``arrived`` is the engine's time of arrival, by which a session's next turn is
    noticed; ``seen`` are generated tokens that were noted; ``ttft_met`` and ``pace_met`` say what came of the
    targets so far. After the first token, token ``i`` may come until ``start_s`` and ``i`` times
    ``allowed_s``."""

    running: Running
    client: str
    weight: float
    arrived: float = 0.0
    seen: int = 0
    ttft_met: bool = True
    pace_met: bool = True
    start_s: float = math.inf
    allowed_s: float = 0.0

    def note(self, generated: int, now_s: float, tolerance: float, *, first_new: int) -> float:
        """At ``now_s`` the request has ``generated`` tokens in all, more than before. The token of index
        ``first_new`` is held to its deadline. Returns when the next one is due; never once one was late."""
        self.seen = generated
        running = self.running
        running.last_token_s = now_s
        if running.first_token_s is None:
            self._first_token(now_s, tolerance)
        elif now_s > self.start_s + first_new * self.allowed_s:
            self.pace_met = False
        return self.start_s + generated * self.allowed_s if self.pace_met else math.inf

    def _first_token(self, now_s: float, tolerance: float) -> None:
        """From here on every further token has a time that does not change any more."""
        running = self.running
        running.first_token_s = now_s
        targets = running.targets
        if targets is not None:
            self.ttft_met = now_s <= targets.due_s(running.arrival_s, 0)
            self.allowed_s = (1 + tolerance) * targets.tpot_s
            if math.isfinite(targets.tpot_s):
                self.start_s = targets.due_s(running.arrival_s, 1, now_s) - targets.tpot_s


def targets_of(asking: Asking, config: SchedulerConfig) -> Targets | None:
    """What a request asks for in seconds; the deployment's defaults where it names no target at all."""
    ttft_ms, tpot_ms = asking.ttft_slo_ms, asking.tpot_slo_ms
    if ttft_ms is None and tpot_ms is None:
        ttft_ms, tpot_ms = config.default_ttft_slo_ms, config.default_tpot_slo_ms
    if ttft_ms is None and tpot_ms is None:
        return None
    return Targets(
        math.inf if ttft_ms is None else ttft_ms / 1e3, math.inf if tpot_ms is None else tpot_ms / 1e3
    )


def class_of(client: str, targets: Targets | None) -> str:
    """Requests of one client with one pace are expected to have outputs of similar length."""
    return f"{client} {targets.tpot_s:.3g}" if targets is not None else client
