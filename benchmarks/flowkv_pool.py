"""The churned pools of ``pool_churn`` as a part of the FlowKV bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.benchmarks.flowkv_part import Finding, Options, Tell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from penstock.benchmarks.report import Cell

SEEDS = 3


def measure(options: Options, tell: Tell) -> Finding:
    """All cases and policies; ``SEEDS`` seeds from the given one on, one if quick, unless told how many."""
    from penstock.benchmarks import pool_churn

    tell("vLLM's block manager under every policy")
    count = options.seeds or (1 if options.quick else SEEDS)
    seeds = range(options.seed, options.seed + count)
    rows, claims = pool_churn.run(quick=options.quick, trace=options.trace, seeds=tuple(seeds))
    return Finding(rows=rows, claims=claims, draw=lambda axes: draw(axes, rows))


def draw(axes: Axes, rows: list[dict[str, Cell]]) -> None:
    """Median runs a request and case, one bar a policy."""
    shown = [row for row in rows if isinstance(row.get("runs_median"), int | float)]
    cases = list(dict.fromkeys(str(row["case"]) for row in shown))
    policies = list(dict.fromkeys(str(row["policy"]) for row in shown))
    width = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        mine = [row for row in shown if row["policy"] == policy]
        places = [cases.index(str(row["case"])) + number * width - 0.4 + width / 2 for row in mine]
        axes.bar(places, [float(row["runs_median"] or 0) for row in mine], width, label=policy)
    axes.set_xticks(range(len(cases)), cases)
    axes.set(ylabel="runs a request, median", yscale="log")
    axes.legend()
