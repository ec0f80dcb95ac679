"""``penstock bench slo-replan``: what planning costs, and what simple admission rules lose to the optimum.

Problems are random: prompts, outputs and targets as in chat, deadlines spread over a few seconds, more asked
for than can be served. The optimum is the dynamic program without a bound on its work; HiGHS on the same
problem as a mixed-integer program is an independent witness. Costs are processor time, garbage collection off
(vLLM freezes its heap after the start; here HiGHS has just left one).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Claim, Environment, Report, rows_table, write_plot
from penstock.benchmarks.scheduler_overhead import quiet
from penstock.schedulers.slo.admission import Candidate, Decision, Instance, feasible, profit_of
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.rules import RULES
from penstock.schedulers.slo.supply import Counts, Supply
from penstock.schedulers.slo.targets import Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TPOTS_S = (0.03, 0.05, 0.1, 0.25)
RULE_NAMES = ("edf_greedy", "moore_hodgson", "dynamic_program")
SIZES = ((10, 2), (20, 2), (30, 1))
"""Candidates and tiers of a problem."""
MEDIAN_MS, P99_MS = 2.0, 10.0
"""What a replan may cost at 200 requests in 4 tiers."""


@click.command("slo-replan")
@click.option("--quick", is_flag=True, help="Fewer problems, under a minute on two cores.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option("--plot", type=click.Path(path_type=Path), default=Path("slo-replan.svg"), show_default=True)
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, json_file: Path | None, plot: Path, seed: int) -> None:
    """Compare the rules of SLO admission with the optimum and with HiGHS, and time their plans.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    console = wide(Console())
    with Narrator(console).step("slo-replan") as tell:
        tell("rules beside the optimum")
        regret = compare_rules(SIZES, 8 if quick else 30, seed)
        with quiet():
            tell("time of replans")
            replans = time_replans(20 if quick else 60, seed)
            tell("time of plans between")
            plans = time_plans(50 if quick else 200)
    rows = [*regret, *replans, *plans]
    report = Report(
        bench="slo-replan",
        environment=Environment.detect(seed),
        rows=tuple(rows),
        claims=tuple(claims_of(regret, replans)),
    )
    console.print(rows_table(replans), rows_table(plans))
    msgspec.structs.replace(report, rows=tuple(regret)).show(console)
    console.print(f"wrote {write_plot(plot, partial(draw, regret))}")
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def claims_of(regret: list[dict[str, Any]], replans: list[dict[str, Any]]) -> list[Claim]:
    """That the optimum is one, and that the default rule is in time."""
    default = next(row for row in replans if row["rule"] == SLOConfig().rule)
    gap = max(row["milp_largest_gap"] for row in regret)
    return [
        Claim.of("largest gap of the dynamic program to HiGHS", gap, "<=", 1e-6),
        Claim.of("a replan by the default rule, median ms", default["median_ms"], "<=", MEDIAN_MS),
        Claim.of("a replan by the default rule, P99 ms", default["p99_ms"], "<=", P99_MS),
    ]


def draw(regret: list[dict[str, Any]], axes: Axes) -> None:
    """Worth to the optimum, mean of the problems of a kind (bar) and worst (mark)."""
    for place, rule in enumerate(RULE_NAMES):
        where = [kind + 0.25 * place for kind in range(len(regret))]
        axes.bar(where, [row[f"{rule}_mean"] for row in regret], width=0.22, label=rule, color=f"C{place}")
        axes.plot(where, [row[f"{rule}_worst"] for row in regret], "_", color="0.2", markersize=12)
    labels = [f"{row['candidates']}, {row['tiers']}, {row['profits']}" for row in regret]
    axes.set_xticks([kind + 0.25 for kind in range(len(regret))], labels)
    axes.set_xlabel("candidates, tiers, profits")
    axes.set_ylabel("worth to the optimum")
    axes.set_ylim(0.4, 1.02)
    axes.legend()


class LinearSupply(Supply):
    """A rate that falls by a fixed amount with each decode: what a mixed-integer program can state."""

    def __init__(self, rate: float, costs: tuple[float, ...]) -> None:
        self._rate, self._costs = rate, costs

    @property
    def tiers(self) -> int:
        """Number of tiers."""
        return len(self._costs)

    def rate(self, counts: Counts) -> float:
        """Prompt tokens a second beside ``counts``."""
        return self._rate - sum(cost * count for cost, count in zip(self._costs, counts, strict=True))

    def sustains(self, counts: Counts) -> bool:
        """The rate must not become negative."""
        return self.rate(counts) >= 0


def make_instance(seed: int, candidates: int, tiers: int, overload: float, *, unit: bool) -> Instance:
    """``overload`` times as many prompt tokens as the engine has before the last deadline."""
    rng = random.Random(seed)
    costs = tuple(1.0 / tpot for tpot in TPOTS_S[:tiers])
    supply = LinearSupply(10_000.0, costs)
    horizon = candidates * 900 / (overload * 10_000.0)
    made = [
        Candidate(
            f"r{i}",
            rng.uniform(0, horizon),
            max(16, min(16_000, int(rng.lognormvariate(math.log(600), 0.9)))),
            rng.randint(200, 4000),
            rng.randrange(tiers),
            1.0 if unit else rng.lognormvariate(0, 0.4),
        )
        for i in range(candidates)
    ]
    return Instance(sorted(made, key=lambda c: c.deadline_s), 1500 * candidates, supply)


def compare_rules(
    sizes: tuple[tuple[int, int], ...] = SIZES, problems: int = 30, seed: int = 0
) -> list[dict[str, Any]]:
    """One row a size and kind of profit: what each rule is worth to the optimum, mean and worst."""
    rows = []
    for candidates, tiers in sizes:
        for unit in (True, False):
            instances = [make_instance(seed + s, candidates, tiers, 1.5, unit=unit) for s in range(problems)]
            best = [RULES["dynamic_program"](instance, 10**9).profit for instance in instances]
            row: dict[str, Any] = {
                "case": "regret",
                "candidates": candidates,
                "tiers": tiers,
                "profits": "equal" if unit else "mixed",
            }
            for name in RULE_NAMES:
                shares = [
                    RULES[name](instance, SLOConfig().replan_work).profit / max(1e-9, value)
                    for instance, value in zip(instances, best, strict=True)
                ]
                row[f"{name}_mean"] = round(statistics.mean(shares), 4)
                row[f"{name}_worst"] = round(min(shares), 4)
            found = [solve_milp(instance).profit for instance in instances]
            gaps = [abs(value - other) for value, other in zip(best, found, strict=True)]
            row["milp_largest_gap"] = round(max(gaps), 9)
            rows.append(row)
    return rows


def solve_milp(instance: Instance) -> Decision:
    """The optimum by HiGHS (``scipy.optimize.milp``) over a ``LinearSupply``, without mandatory candidates.

    A deadline binds only if its request is accepted; the last row keeps the rate from becoming negative.
    """
    import numpy as np
    from scipy import optimize

    supply, jobs = instance.supply, instance.candidates
    assert isinstance(supply, LinearSupply)
    number = len(jobs)
    full = supply.rate(instance.no_counts)
    costs = [full - supply.rate(_one(instance, job.tier)) for job in jobs]
    rows, bounds = [], []
    for place, job in enumerate(jobs):
        row = [0.0] * number
        for earlier in range(place + 1):
            row[earlier] = jobs[earlier].tokens + costs[earlier] * (job.deadline_s - jobs[earlier].deadline_s)
        big = max(0.0, sum(row) - full * job.deadline_s)
        row[place] += big
        rows.append(row)
        bounds.append(full * job.deadline_s + big)
    rows += [[float(job.memory_tokens) for job in jobs], costs]
    bounds += [float(instance.memory_tokens), full]
    found = optimize.milp(
        [-job.profit for job in jobs],
        constraints=optimize.LinearConstraint(np.array(rows), ub=np.array(bounds)),
        integrality=np.ones(number),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    accepted = tuple(place for place, value in enumerate(found.x) if value > 0.5)
    assert feasible(instance, accepted)
    return Decision(accepted, profit_of(instance, accepted))


def _one(instance: Instance, tier: int) -> Counts:
    return tuple(int(place == tier) for place in range(len(instance.no_counts)))


def time_replans(repeats: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """One row a rule: processor milliseconds of a replan at 200 waiting requests in 4 tiers, 128 running."""
    rows = []
    for name in RULE_NAMES:
        costs = [_replan_ms(name, seed + repeat) for repeat in range(repeats)]
        rows.append({"case": "replan", "rule": name, "waiting": 200, "tiers": 4, **_spread(costs)})
    return rows


def time_plans(repeats: int = 200) -> list[dict[str, Any]]:
    """One row a load: processor milliseconds of a step's plan between replans."""
    rows = []
    for running, waiting in ((64, 100), (256, 10_000)):
        planner = _planner("moore_hodgson", waiting, 0)
        batch = list(_running(running, 0))
        limits = Limits(step_tokens=8192, running_requests=512)
        planner.plan(0.0, batch, 200_000, limits)
        costs = [
            _processor_ms(partial(planner.plan, step * 1e-6, batch, 200_000, limits))
            for step in range(repeats)
        ]
        rows.append({"case": "plan", "running": running, "waiting": waiting, **_spread(costs)})
    return rows


def _planner(rule: str, waiting: int, seed: int) -> Planner:
    rng = random.Random(seed)
    planner = Planner(SLOConfig(rule=rule, tiers_s=TPOTS_S))  # type: ignore[arg-type]
    for i in range(waiting):
        tokens = max(16, min(16_000, int(rng.lognormvariate(math.log(600), 0.9))))
        targets = Targets(rng.uniform(1, 12), rng.choice(TPOTS_S))
        planner.arrive(Waiting(f"w{i}", "", tokens, 0.0, targets=targets))
    return planner


def _running(number: int, seed: int) -> Iterator[Running]:
    rng = random.Random(seed)
    for i in range(number):
        output = rng.randint(1, 300)
        yield Running(
            request_id=f"r{i}",
            arrival_s=-0.1 * output - 1,
            tokens=800 + output,
            computed_tokens=799 + output,
            output_tokens=output,
            targets=Targets(1.0, rng.choice(TPOTS_S[2:])),
        )


def _replan_ms(rule: str, seed: int) -> float:
    planner = _planner(rule, 200, seed)
    batch = list(_running(128, seed))
    limits = Limits(step_tokens=8192, running_requests=512)
    planner.plan(0.0, batch, 0, limits)
    return _processor_ms(lambda: planner.plan(0.15, batch, 200_000, limits))


def _processor_ms(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e6


def _spread(costs: list[float]) -> dict[str, float]:
    ordered = sorted(costs)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_ms": round(statistics.median(ordered), 3), "p99_ms": round(p99, 3)}
