"""The SLO bench: windows, capacities and their intervals, and what is tuned on what."""

from __future__ import annotations

import math
import random

import pytest

from penstock.benchmarks.slo_apps import APPS, window
from penstock.benchmarks.slo_capacity import capacity, capacity_interval, geometric_mean, ratio_interval
from penstock.benchmarks.slo_claims import claims, overload_rows, rows
from penstock.benchmarks.slo_run import Score, Task
from penstock.benchmarks.slo_stages import SLO, STOCK, Scale, run_stages
from penstock.benchmarks.slo_vllm import families
from penstock.simulation.step_time import Load, load_step_time

STEP_TIME = load_step_time("opt-6.7b-a100")


def score(share: float, requests: int = 100) -> Score:
    met = round(share * requests)
    every = dict.fromkeys(("deadline", "mean", "gap"), met)
    return Score(
        requests=requests,
        tokens=10 * requests,
        attained=every,
        attained_tokens=dict.fromkeys(every, 10 * met),
        tiers={"chat": (requests, met)},
        seconds=1.0,
    )


def test_windows_of_one_seed_differ_between_rates_in_their_spacing_alone():
    slow, fast = (window(APPS["mixed tiers"], 3, rate, 50, STEP_TIME) for rate in (1.0, 2.0))
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival_s == pytest.approx(2 * other.arrival_s)
        assert (one.prompt, one.output_tokens, one.tier) == (other.prompt, other.output_tokens, other.tier)
    assert {ask.tier for ask in slow} == {"loose", "tight"}
    assert [ask.arrival_s for ask in window(APPS["mixed tiers"], 4, 1.0, 50, STEP_TIME)] != [
        ask.arrival_s for ask in slow
    ]


def test_targets_are_multiples_of_the_idle_engine_s_time_and_the_tightest_tier_comes_first():
    for ask in window(APPS["mixed tiers"], 3, 1.0, 50, STEP_TIME):
        slowdown, tpot_ms, priority = {"tight": (3, 50, 0), "loose": (5, 100, 1)}[ask.tier]
        assert ask.ttft_slo_ms == pytest.approx(1e3 * slowdown * STEP_TIME(Load(ask.prompt_tokens, 0, 1, 0)))
        assert (ask.tpot_slo_ms, ask.priority) == (pytest.approx(tpot_ms), priority)


def test_a_capacity_lies_where_the_share_falls_through_ninety_percent():
    curve = {1.0: [score(1.0)], 2.0: [score(0.95)], 4.0: [score(0.85)]}
    assert capacity(curve, "deadline", [0]) == pytest.approx(math.sqrt(8))
    assert capacity({1.0: [score(0.5)]}, "deadline", [0]) == 0
    assert capacity({1.0: [score(0.95)]}, "deadline", [0]) == 1.0


def test_an_interval_holds_the_value_and_windows_that_agree_leave_none():
    rng = random.Random(1)
    rates = (1.0, 1.5, 2.0, 3.0)
    bends = [rng.uniform(0.9, 1.3) for _ in range(8)]
    curve = {rate: [score(max(0.0, 1.1 - 0.1 * rate * bend)) for bend in bends] for rate in rates}
    value, low, high = capacity_interval(curve, "deadline")
    assert low < value < high
    same = {rate: [score(1.1 - 0.1 * rate)] * 8 for rate in rates}
    assert len(set(capacity_interval(same, "deadline"))) == 1
    assert ratio_interval(curve, curve, "deadline") == (1.0, 1.0, 1.0)


def test_a_geometric_mean_is_closer_than_each_of_its_parts():
    value, low, high = geometric_mean([(2.0, 1.5, 2.5), (0.5, 0.4, 0.6)])
    assert value == pytest.approx(1.0)
    assert 0.75 < low < 1 < high < 1.3


def test_what_is_scored_was_tuned_on_other_windows_and_the_best_of_each_family_wins():
    seen: list[Task] = []

    def run(tasks):
        seen.extend(tasks)
        return [curve_of(task) for task in tasks]

    def curve_of(task: Task) -> dict[float, list[Score]]:
        sustained = {"slo": 3.0, "stock": 1.0 + task.setting.budget / 8192}.get(task.setting.kind, 1.5)
        rates = task.rates or (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
        return {r: [score(0.95 if r <= sustained else 0.7)] * len(task.seeds) for r in rates}

    scale = Scale(
        apps=("chat",),
        requests=100,
        tuning=2,
        scoring=3,
        rules=("deadline", "mean"),
        families=families(quick=True),
    )
    scored = run_stages(scale, STEP_TIME, None, run)
    assert scored.best["chat", STOCK, "deadline"].budget == 8192
    tuned = {seed for task in seen if len(task.seeds) == 2 for seed in task.seeds}
    assert not tuned & {seed for task in seen if len(task.seeds) == 3 for seed in task.seeds}
    found = {claim.name: claim for claim in claims(scale, scored)}
    ratio = found["capacity to the best stock setting, geometric mean"]
    assert ratio.holds
    assert ratio.value == pytest.approx(1.47, abs=0.1)
    assert {row["setting"] for row in rows(scale, scored)} >= {"stock 8192", SLO}
    overloads = overload_rows(scored)
    assert {row["setting"] for row in overloads} == {"stock", "stock priority", "slo"}
    rates = {row["overload of"]: row["rate"] for row in overloads}
    capacities = {
        row["setting"]: row["capacity"] for row in rows(scale, scored) if row["TPOT rule"] == "cumulative"
    }
    assert rates["stock"] == pytest.approx(1.5 * capacities["stock 8192"], abs=1e-3)
    assert rates["all"] == pytest.approx(1.5 * capacities["slo"], abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "stock", "mean", "lowest"), [(2.0, 0.0, math.inf, math.inf), (0.0, 2.0, 0.0, 0.0)]
)
def test_a_family_that_sustains_no_rate_is_not_left_out(ours, stock, mean, lowest):
    def run(tasks):
        return [curve_of(task) for task in tasks]

    def curve_of(task: Task) -> dict[float, list[Score]]:
        sustained = ours if task.setting.kind == "slo" else stock
        rates = task.rates or (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
        return {r: [score(0.95 if r <= sustained else 0.7)] * len(task.seeds) for r in rates}

    scale = Scale(
        apps=("chat",), requests=100, tuning=2, scoring=3, rules=("deadline",), families=families(quick=True)
    )
    found = {claim.name: claim for claim in claims(scale, run_stages(scale, STEP_TIME, None, run))}
    assert found["capacity to the best stock setting, geometric mean"].value == mean
    assert found["capacity to stock, cumulative: lowest"].value == lowest
    assert found["capacity to stock, cumulative: lowest"].holds == (ours > stock)
