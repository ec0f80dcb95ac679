"""The stages of the SLO bench: tune on windows of their own, score the best, overload, mislead the prior.

Every family gets the same effort: each of its settings is searched on the tuning windows, and the best one
for an application and a rule is scored on windows that it was not tuned on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from penstock.benchmarks.slo_capacity import capacity
from penstock.benchmarks.slo_run import Curve, Setting, Task
from penstock.schedulers.slo.config import Lending
from penstock.simulation.measures import TpotRule
from penstock.simulation.step_time import StepTime

STOCK, PRIORITY = "stock", "stock priority"
SLO, SLO_MEAN, SLO_GAP = "slo", "slo, pace mean", "slo, pace gap"
OURS: Mapping[TpotRule, str] = {"deadline": SLO, "mean": SLO_MEAN, "gap": SLO_GAP}
"""Who stands for the SLO policy under a rule: each deployment sets the pace that its users count."""
OVERLOAD = 1.5
ALL = "all"
"""An overload of every scheduler, not of stock alone."""
PRIORS = (0.5, 2.0)
KEPT = 0.9
"""Share of the capacity that a wrong prior must leave: the rate at which it is tried."""
PROFILE = "a100-7b"
FIRST_TUNING_SEED, FIRST_SCORING_SEED = 1, 500_001

Families = Mapping[str, tuple[Setting, ...]]
RunAll = Callable[[Sequence[Task]], Sequence[Curve]]
RunEach = Callable[[Sequence[Task]], Iterable[Curve]]
"""Runs tasks side by side, and yields their curves in the order of the tasks."""


def our_families(choices: int, other_lending: Lending, **engine: Any) -> Families:
    """The SLO policy at each pace, with up to four choices of knobs; ``engine`` is the same for all. By the
    mean both ways to lend are among them: the engine's own, and ``other_lending``.
    """
    knobs: Sequence[Mapping[str, float | str]] = (
        {},
        {"rule": "sustained"},
        {"longest_step_s": 0.4},
        {"long_prompt_weight": 0.0},
    )
    lent: Sequence[Mapping[str, float | str]] = (
        *knobs[:2],
        {"lending": other_lending},
        {"lending": other_lending, "rule": "sustained"},
    )
    return {
        family: tuple(slo_setting(family, {**knob, "pace": pace}, engine) for knob in found[:choices])
        for family, pace, found in (
            (SLO, "cumulative", knobs),
            (SLO_MEAN, "mean", lent),
            (SLO_GAP, "gap", knobs),
        )
    }


def slo_setting(name: str, knobs: Mapping[str, float | str], engine: Mapping[str, Any]) -> Setting:
    """The SLO policy with some knobs; they are in its name."""
    shown = ", ".join(f"{key} {value}" for key, value in knobs.items() if key != "pace")
    return Setting(
        name=f"{name}, {shown}" if shown else name,
        kind="slo",
        slo={"profile": PROFILE, **knobs},
        engine=dict(engine),
    )


@dataclass(slots=True, kw_only=True)
class Scale:
    """How much is run."""

    apps: tuple[str, ...]
    requests: int
    tuning: int
    scoring: int
    rules: tuple[TpotRule, ...]
    families: Families
    refinements: int = 2


@dataclass(slots=True)
class Scored:
    """What the stages found; curves are over the scoring windows."""

    best: dict[tuple[str, str, TpotRule], Setting] = field(default_factory=dict)
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    overload: dict[tuple[str, str, str], Curve] = field(default_factory=dict)
    """By application, whose capacity is exceeded (``STOCK`` or ``ALL``) and family."""
    priors: dict[tuple[str, float], Curve] = field(default_factory=dict)

    def curve(self, app: str, family: str, rule: TpotRule) -> Curve:
        """Of the setting that was best on the tuning windows."""
        return self.curves[app, self.best[app, family, rule].name]


def rule_families(rule: TpotRule, all_families: Iterable[str]) -> list[str]:
    """Who competes under a rule: all baselines, and the policy at that rule's pace."""
    return [name for name in all_families if name not in OURS.values() or name == OURS[rule]]


def run_stages(scale: Scale, step_time: StepTime, traces: Path | None, run: RunAll) -> Scored:
    """All four."""
    base = Task(
        app="",
        setting=scale.families[SLO][0],
        seeds=(),
        requests=scale.requests,
        step_time=step_time,
        refinements=scale.refinements,
        traces=traces,
    )
    scored = Scored()
    tune(scale, base, run, scored)
    score(scale, base, run, scored)
    strain(scale, base, run, scored)
    return scored


def tune(scale: Scale, base: Task, run: RunAll, scored: Scored) -> None:
    """Find the best setting of each family for each application and rule."""
    seeds = tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + scale.tuning))
    asked: dict[tuple[str, str], list[TpotRule]] = {}
    settings: dict[str, Setting] = {}
    for app in scale.apps:
        for rule in scale.rules:
            for family in rule_families(rule, scale.families):
                if len(scale.families[family]) == 1:
                    scored.best[app, family, rule] = scale.families[family][0]
                    continue
                for setting in scale.families[family]:
                    settings[setting.name] = setting
                    asked.setdefault((app, setting.name), []).append(rule)
    tasks = [
        msgspec.structs.replace(base, app=app, setting=settings[name], seeds=seeds, rules=tuple(rules))
        for (app, name), rules in asked.items()
    ]
    curves = dict(zip(asked, run(tasks), strict=True))
    windows = range(scale.tuning)
    for app in scale.apps:
        for rule in scale.rules:
            for family in rule_families(rule, scale.families):
                if (app, family, rule) not in scored.best:
                    found = {
                        one.name: capacity(curves[app, one.name], rule, windows)
                        for one in scale.families[family]
                    }
                    scored.best[app, family, rule] = settings[max(found, key=found.__getitem__)]


def score(scale: Scale, base: Task, run: RunAll, scored: Scored) -> None:
    """Search the capacities of the best settings on the scoring windows."""
    asked: dict[tuple[str, str], tuple[Setting, list[TpotRule]]] = {}
    for (app, _, rule), setting in scored.best.items():
        asked.setdefault((app, setting.name), (setting, []))[1].append(rule)
    seeds = scoring_seeds(scale)
    tasks = [
        msgspec.structs.replace(base, app=app, setting=setting, seeds=seeds, rules=tuple(rules))
        for (app, _), (setting, rules) in asked.items()
    ]
    scored.curves.update(zip(asked, run(tasks), strict=True))


def strain(scale: Scale, base: Task, run: RunAll, scored: Scored) -> None:
    """Overload of the best stock setting, and of all of them; a wrong prior just below our capacity."""
    seeds = scoring_seeds(scale)
    overload, priors = [], []
    for app in scale.apps:
        sustained = {
            family: capacity(scored.curve(app, family, "deadline"), "deadline", range(scale.scoring))
            for family in rule_families("deadline", scale.families)
        }
        for exceeded, highest in ((STOCK, sustained[STOCK]), (ALL, max(sustained.values()))):
            rate = round(OVERLOAD * highest, 4)
            for family in (STOCK, PRIORITY, SLO) if rate else ():
                setting = scored.best[app, family, "deadline"]
                task = msgspec.structs.replace(base, app=app, setting=setting, seeds=seeds, rates=(rate,))
                overload.append(((app, exceeded, family), task))
        kept = sustained[SLO] * KEPT
        for prior in PRIORS if kept else ():
            setting = msgspec.structs.replace(scored.best[app, SLO, "deadline"], prior=prior)
            task = msgspec.structs.replace(base, app=app, setting=setting, seeds=seeds, rates=(kept,))
            priors.append(((app, prior), task))
    curves = run([task for _, task in (*overload, *priors)])
    scored.overload.update(zip((key for key, _ in overload), curves, strict=False))
    scored.priors.update(zip((key for key, _ in priors), curves[len(overload) :], strict=True))


def scoring_seeds(scale: Scale) -> tuple[int, ...]:
    """Windows that nothing was tuned on."""
    return tuple(range(FIRST_SCORING_SEED, FIRST_SCORING_SEED + scale.scoring))
