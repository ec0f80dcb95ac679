"""What the SLO bench amounts to: a row for each application, rule and family, and the claims."""

from __future__ import annotations

import math
from collections.abc import Sequence

from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.slo_capacity import Interval, capacity_interval, geometric_mean, ratio_interval
from penstock.benchmarks.slo_run import ATTAINED, Score, mean_share
from penstock.benchmarks.slo_stages import (
    ALL,
    KEPT,
    OURS,
    OVERLOAD,
    PRIORITY,
    PRIORS,
    SLO,
    STOCK,
    Scale,
    Scored,
    rule_families,
)
from penstock.simulation.measures import TpotRule

RULE_NAMES: dict[TpotRule, str] = {"deadline": "cumulative", "mean": "mean", "gap": "largest gap"}


def rows(scale: Scale, scored: Scored) -> list[dict[str, Cell]]:
    """Capacities in requests a second with 95 % intervals, and how ours compares with the best stock one."""
    found: list[dict[str, Cell]] = []
    for app in scale.apps:
        for rule in scale.rules:
            stock = scored.curve(app, STOCK, rule)
            for family in rule_families(rule, scale.families):
                curve = scored.curve(app, family, rule)
                capacity, low, high = capacity_interval(curve, rule)
                ratio = ratio_interval(curve, stock, rule)
                found.append(
                    {
                        "application": app,
                        "TPOT rule": RULE_NAMES[rule],
                        "setting": scored.best[app, family, rule].name,
                        "capacity": capacity,
                        "low": low,
                        "high": high,
                        "to stock": ratio.value,
                        "to stock, low": ratio.low,
                        "to stock, high": ratio.high,
                    }
                )
    return found


def overload_rows(scored: Scored) -> list[dict[str, Cell]]:
    """Shares at 1.5 times the capacity of the best stock setting, and of the best setting of all: of
    requests, of tokens, of each tier.
    """
    found: list[dict[str, Cell]] = []
    for (app, exceeded, family), curve in scored.overload.items():
        ((rate, scores),) = curve.items()
        requests, tokens = sum(s.requests for s in scores), sum(s.tokens for s in scores)
        tiers = {
            name: (sum(s.tiers[name][1] for s in scores), sum(s.tiers[name][0] for s in scores))
            for name in scores[0].tiers
        }
        found.append(
            {
                "application": app,
                "overload of": exceeded,
                "setting": family,
                "rate": rate,
                **{
                    f"{RULE_NAMES[rule]}": sum(s.attained[rule] for s in scores) / requests
                    for rule in RULE_NAMES
                },
                "by token": sum(s.attained_tokens["deadline"] for s in scores) / tokens,
                "by tier": ", ".join(f"{name} {met / max(1, of):.2f}" for name, (met, of) in tiers.items()),
            }
        )
    return found


def claims(scale: Scale, scored: Scored) -> list[Claim]:
    """The promises of issue and documentation."""
    found = []
    for rule in scale.rules:
        ratios = against(scale, scored, rule, STOCK)
        if rule == "deadline":
            mean = _mean(ratios)
            found.append(
                Claim.of("capacity to the best stock setting, geometric mean", mean.value, ">=", 1.2)
            )
            found.append(Claim.of("the same, lower end of 95 %", mean.low, ">=", 1.2))
            others = against(scale, scored, rule, PRIORITY)
            name = "capacity to stock priority, geometric mean"
            found.append(Claim.of(name, _mean(others).value, ">=", 1.2))
        worst = min((ratio.value for ratio in ratios), default=math.nan)
        found.append(Claim.of(f"capacity to stock, {RULE_NAMES[rule]}: lowest", worst, ">=", 0.98))
    for exceeded, who in ((ALL, "of all"), (STOCK, "of the best stock setting")):
        gains = [gain(scored, app, exceeded) for app in scale.apps if (app, exceeded, SLO) in scored.overload]
        name = f"attained requests at {OVERLOAD:g}x overload {who}, to stock, geometric mean"
        found.append(Claim.of(name, math.prod(gains) ** (1 / len(gains)) if gains else math.nan, ">=", 1.3))
    for prior in PRIORS:
        shares = [
            mean_share(scores, "deadline")
            for (_, one), curve in scored.priors.items()
            if one == prior
            for scores in curve.values()
        ]
        name = f"attained at {KEPT:g} of the capacity with a prior {prior:g} times the truth: lowest"
        found.append(Claim.of(name, min(shares, default=math.nan), ">=", ATTAINED))
    return found


def against(scale: Scale, scored: Scored, rule: TpotRule, family: str) -> list[Interval]:
    """Ratios of ours to a family by application: infinite where the family sustains no rate, 0 where ours
    does not, 1 where neither does."""
    return [
        ratio_interval(scored.curve(app, OURS[rule], rule), scored.curve(app, family, rule), rule)
        for app in scale.apps
    ]


def gain(scored: Scored, app: str, exceeded: str) -> float:
    """Attained requests under overload, ours to the best stock setting's. Where stock alone is overloaded it
    cannot exceed one over stock's share.
    """
    ours, theirs = (_attained(scored.overload[app, exceeded, family]) for family in (SLO, STOCK))
    return ours / max(1, theirs)


def _attained(curve: dict[float, list[Score]]) -> int:
    return sum(score.attained["deadline"] for scores in curve.values() for score in scores)


def _mean(ratios: Sequence[Interval]) -> Interval:
    """Geometric; one that is infinite counts for nothing, one of 0 is the end of it."""
    finite = [ratio for ratio in ratios if ratio.value < math.inf]
    if not finite:
        return Interval(*[math.inf if ratios else math.nan] * 3)
    return geometric_mean(finite) if all(ratio.value for ratio in finite) else Interval(0.0, 0.0, 0.0)
