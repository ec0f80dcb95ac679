"""What was attained, as a user, a benchmark and a provider count it.

A request attains its targets under one of three rules for the time per token: every token by its cumulative
deadline (PolyServe), the mean (``vllm bench serve``), or no gap longer than the target. Misses that are
counted by request make it free to refuse long prompts, so tokens are counted as well, and each tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from penstock.schedulers.slo.targets import Targets, Tiers

PaceRule = Literal["cumulative", "mean", "gap"]
TOLERANCE = 0.05


def attains(
    targets: Targets,
    arrival_s: float,
    times_s: Sequence[float],
    rule: PaceRule = "cumulative",
    tolerance: float = TOLERANCE,
) -> bool:
    """Whether tokens that came at ``times_s`` met the targets; the pace may be off by a tolerance."""
    if not times_s or times_s[0] > targets.due_s(arrival_s, 0):
        return False
    paced = targets.tpot_s * (1 + tolerance)
    if rule == "gap":
        return all(right - left <= paced for left, right in pairwise(times_s))
    if rule == "mean":
        return len(times_s) < 2 or (times_s[-1] - times_s[0]) / (len(times_s) - 1) <= paced
    allowed_s = tolerance * targets.tpot_s
    return all(
        time_s <= targets.due_s(arrival_s, token, times_s[0]) + token * allowed_s
        for token, time_s in enumerate(times_s)
        if token
    )


@dataclass(slots=True)
class Tally:
    """Requests and tokens, and how many of them belong to requests that met their targets."""

    requests: int = 0
    attained: int = 0
    tokens: int = 0
    attained_tokens: int = 0

    def add(self, tokens: int, attained: bool) -> None:
        """Count one request."""
        self.requests += 1
        self.tokens += tokens
        if attained:
            self.attained += 1
            self.attained_tokens += tokens

    @property
    def share(self) -> float:
        """Share of requests; 1 of none."""
        return self.attained / self.requests if self.requests else 1.0

    @property
    def token_share(self) -> float:
        """Share of tokens; 1 of none."""
        return self.attained_tokens / self.tokens if self.tokens else 1.0


@dataclass(slots=True)
class Attainment:
    """Tallies under each rule: of all requests, and of each tier."""

    tiers: Tiers
    rules: tuple[PaceRule, ...] = ("cumulative", "mean", "gap")
    total: dict[PaceRule, Tally] = field(init=False)
    by_tier: dict[PaceRule, list[Tally]] = field(init=False)

    def __post_init__(self) -> None:
        self.total = {rule: Tally() for rule in self.rules}
        self.by_tier = {rule: [Tally() for _ in range(len(self.tiers))] for rule in self.rules}

    def add(self, targets: Targets, arrival_s: float, prompt_tokens: int, times_s: Sequence[float]) -> None:
        """Count a request that has ended. One without a token attained nothing."""
        tier = self.tiers.index(targets.tpot_s)
        for rule in self.rules:
            attained = attains(targets, arrival_s, times_s, rule)
            tokens = prompt_tokens + len(times_s)
            self.total[rule].add(tokens, attained)
            self.by_tier[rule][tier].add(tokens, attained)
