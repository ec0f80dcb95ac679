"""``penstock bench speculation``: the cost of draft lengths, what they bring, and what suffixes find.

Costs are processor times of the code that vLLM's scheduler runs. What lengths bring is a model's answer, on a
virtual clock, against the same engine without drafts and with vLLM's schedule by batch size; under latency
targets vLLM's own scheduler is stepped. Proposals are replayed over texts beside vLLM's own n-gram proposer.
Nothing here runs a language model.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Claim, Environment, Report, write_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

APPS = ("mixed tiers", "tool use")
WINDOWS, WINDOW_REQUESTS = 3, 100
Rows = list[dict[str, Any]]


@click.command("speculation")
@click.option("--quick", is_flag=True, help="In small, under a minute on two cores.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("speculation.svg"),
    show_default=True,
    help="Attainment by arrival rate.",
)
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, json_file: Path | None, plot_file: Path, seed: int) -> None:
    """Measure draft lengths and drafts, beside vLLM's own, in the same run.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    console = wide(Console())
    if find_spec("vllm") is None:
        console.print("vLLM is not installed; its proposer is the peer", style="red")
        sys.exit(1)
    rows = _measure(quick, seed, Narrator(console))
    found = claims(rows)
    environment = Environment.detect(seed)
    for case in dict.fromkeys(row["case"] for row in rows):
        part = tuple({k: v for k, v in row.items() if k != "case"} for row in rows if row["case"] == case)
        last = found if case == rows[-1]["case"] else ()
        Report(bench="speculation", environment=environment, rows=part, claims=tuple(last)).show(
            console, title=case
        )
    mixed = [row for row in rows if row["case"] == "mixed" and row["drafter"] == "n-grams"]
    console.print(f"wrote {write_plot(plot_file, lambda axes: _draw(axes, mixed))}")
    if json_file is not None:
        Report(
            bench="speculation", environment=environment, rows=tuple(rows), claims=tuple(found)
        ).write_json(json_file)
        console.print(f"wrote {json_file}")


def _measure(quick: bool, seed: int, narrator: Narrator) -> Rows:
    from penstock.benchmarks import slo_speculation, speculation_cases, speculation_cost

    with narrator.step("speculation cost"):
        rows = speculation_cost.time_allocation(300 if quick else 3000, seed)
    with narrator.step("speculation proposals"):
        rows += speculation_cost.measure_proposals(8 if quick else 60, seed)
    with narrator.step("speculation batch sizes"):
        rows += speculation_cases.batch_rows(100 if quick else 600, seed)
    with narrator.step("speculation mixed paces"):
        seeds = range(seed, seed + (1 if quick else 5))
        for drafter in speculation_cases.MIXED:
            rows += speculation_cases.mixed_rows(drafter, 20 if quick else 60, seeds)
    if not quick:
        with narrator.step("speculation under latency targets"), slo_speculation.workers() as run:
            rows += slo_speculation.speculation_rows(APPS, WINDOWS, WINDOW_REQUESTS, run)
    return rows


def claims(rows: Rows) -> list[Claim]:
    """What is promised of draft lengths and of the suffix drafter."""
    from penstock.benchmarks.slo_speculation import speculation_claims
    from penstock.benchmarks.speculation_cases import capacity

    (busiest,) = [row for row in rows if row["case"] == "allocation" and row["running"] == 256]
    batches = [row["ours_to_off"] for row in rows if row["case"] == "batch"]
    mixed = [row for row in rows if row["case"] == "mixed"]
    targets = [row for row in rows if row["case"] == "latency targets"]
    found = {
        (name, way): capacity([row for row in mixed if row["drafter"] == name], way)
        for name in dict.fromkeys(row["drafter"] for row in mixed)
        for way in ("schedule", "ours", "known rates", "known tokens")
    }
    texts = {(row["text"], row["drafter"]): row for row in rows if row["case"] == "proposals"}
    beside = [
        texts[text, "suffix"]["tokens_a_step"] / texts[text, "vllm ngram"]["tokens_a_step"]
        for text in ("quoting", "alike", "looping", "random")
    ]
    return [
        Claim.of(
            "estimates and lengths, 256 running, share of 10 ms", busiest["us_to_choose"] / 1e4, "<=", 0.01
        ),
        Claim.of("all of draft control, 256 running, share of 10 ms", busiest["share_of_10ms"], "<=", 0.03),
        Claim.of("speed to off, worst of all batch sizes and acceptances", min(batches), ">=", 0.98),
        *(
            Claim.of(
                f"{name}: capacity at 90 % attained, {way}, to the best schedule by batch",
                found[name, way] / max(1e-9, found[name, "schedule"]),
                ">=",
                target,
            )
            for name in dict.fromkeys(name for name, _ in found)
            for way, target in (("ours", 1.2), ("known rates", 1.0), ("known tokens", 1.0))
        ),
        Claim.of("suffix drafter to vLLM's n-grams, tokens a step, worst text", min(beside), ">=", 0.98),
        Claim.of("the same, best text", max(beside), ">=", 1.5),
        *(speculation_claims(targets) if targets else ()),
    ]


def _draw(axes: Axes, mixed: Rows) -> None:
    for way in dict.fromkeys(row["lengths"] for row in mixed):
        points = [row for row in mixed if row["lengths"] == way]
        axes.plot(
            [row["arrivals_per_s"] for row in points],
            [row["attainment"] for row in points],
            marker="o",
            label=way,
        )
    axes.axhline(0.9, color="grey", linewidth=0.8)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("share within its time per token")
    axes.legend()
