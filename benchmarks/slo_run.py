"""Windows of one application under one scheduler, and the search for the rate that it sustains.

What steps a window is an engine's: ``slo_vllm.py`` and ``slo_sglang.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.benchmarks.slo_apps import APPS, App, window
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.profiles import Profile, find_profile
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.simulation.measures import TPOT_RULES, TpotRule, attains
from penstock.simulation.records import Ask, Served
from penstock.simulation.step_time import StepTime

ATTAINED = 0.9
"""Share of requests that must meet their targets at the capacity."""
STEP = 1.3
"""Factor between the rates with which a search begins."""
FURTHER_BELOW = 4
FURTHEST = 7
"""Steps up or down from the first rate at most."""
KV_TOKENS = 400_000
MAX_MODEL_LEN = 32_768


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler and its knobs. ``budget`` is the most tokens of a step, ``engine`` other settings of the
    engine; ``prior`` multiplies what the step-time prior says."""

    name: str
    kind: str
    budget: int = 8192
    engine: dict[str, Any] = {}
    slo: dict[str, Any] = {}
    prior: float = 1.0


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one window: requests, and how many attained their targets under each rule; tokens
    weighed the same way; under the first rule by tier; and how long planning took."""

    requests: int
    tokens: int
    attained: dict[str, int]
    attained_tokens: dict[str, int]
    tiers: dict[str, tuple[int, int]]
    seconds: float

    def share(self, rule: TpotRule) -> float:
        """Of the requests."""
        return self.attained[rule] / self.requests


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A search by name, so that it can be sent to another process. With ``rates`` only those are run."""

    app: str
    setting: Setting
    seeds: tuple[int, ...]
    requests: int
    step_time: StepTime
    rules: tuple[TpotRule, ...] = ("deadline",)
    rates: tuple[float, ...] = ()
    refinements: int = 2
    """Halvings of the last factor of a search."""
    traces: Path | None = None


Curve = dict[float, list[Score]]
"""Scores of all windows by rate."""


RunWindow = Callable[[Task, int, float], Score]
"""Runs one window to its end: of a task, with a seed, at a rate."""


def measure_with(run_window: RunWindow, task: Task) -> Curve:
    """Search the capacity under each rule; or run the rates that are given."""
    curve: Curve = {}

    def probe(rate: float) -> list[Score]:
        rate = round(rate, 6)
        if rate not in curve:
            curve[rate] = [run_window(task, seed, rate) for seed in task.seeds]
        return curve[rate]

    for rate in task.rates:
        probe(rate)
    if not task.rates:
        for rule in task.rules:
            search(task, rule, probe)
    return curve


def search(task: Task, rule: TpotRule, probe: Callable[[float], list[Score]]) -> None:
    """Probe rates until the capacity lies between two that are close."""

    def holds(rate: float) -> bool:
        return mean_share(probe(rate), rule) >= ATTAINED

    rate, factor = APPS[task.app].rate, STEP
    up = holds(rate)
    for _ in range(FURTHEST):
        following = rate * factor if up else rate / factor
        if holds(following) != up:
            low = rate if up else following
            break
        rate = following
    else:
        return
    # Where the mean holds some windows may not, and the interval needs a rate at which they do.
    well_below = low
    for _ in range(FURTHER_BELOW):
        if min(score.share(rule) for score in probe(well_below)) >= ATTAINED:
            break
        well_below /= factor
    for _ in range(task.refinements):
        factor **= 0.5
        low = low * factor if holds(low * factor) else low


def mean_share(scores: Sequence[Score], rule: TpotRule) -> float:
    """Share of the requests of all windows."""
    return sum(score.attained[rule] for score in scores) / sum(score.requests for score in scores)


def asks_of(task: Task, seed: int, rate: float) -> list[Ask]:
    """The requests of one window."""
    app = APPS[task.app]
    return window(app, seed, rate, app.window * task.requests, task.step_time, task.traces)


def model_of(setting: Setting) -> StepTimeModel:
    """What a planner begins with: a shipped profile, as users have it, made wrong on purpose by ``prior``."""
    profile = find_profile(msgspec.convert(setting.slo, SLOConfig).profile)
    costs = {
        name: getattr(profile, name) * setting.prior
        for name in ("base_s", "token_s", "request_s", "context_s")
    }
    scaled: Profile = msgspec.structs.replace(profile, **costs)
    return StepTimeModel(scaled)


def score_of(served: Iterable[Served], app: App) -> Score:
    """Count what attained its targets."""
    found = list(served)
    good = {rule: [attains(one, rule) for one in found] for rule in TPOT_RULES}
    tokens = [one.prompt_tokens + one.output_tokens for one in found]
    tiers = {}
    for tier in app.tiers:
        mine = [ok for one, ok in zip(found, good["deadline"], strict=True) if one.ask.tier == tier.name]
        tiers[tier.name] = (len(mine), sum(mine))
    return Score(
        requests=len(found),
        tokens=sum(tokens),
        attained={rule: sum(good[rule]) for rule in TPOT_RULES},
        attained_tokens={
            rule: sum(count for count, ok in zip(tokens, good[rule], strict=True) if ok)
            for rule in TPOT_RULES
        },
        tiers=tiers,
        seconds=max(one.token_times[-1] for one in found),
    )
