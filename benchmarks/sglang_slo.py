"""``penstock bench sglang-slo``: requests that meet latency targets, in SGLang's own scheduler on a virtual
clock. Applications, measures and claims are those of ``penstock bench slo``.
"""

from __future__ import annotations

from typing import Any

import click

from penstock.benchmarks import slo_sglang
from penstock.benchmarks.slo_bench import Bench, Given, options, run

BENCH = Bench(
    name="sglang-slo",
    module="sglang",
    missing="this bench steps SGLang's own scheduler: install penstock[sglang]",
    families=slo_sglang.families,
    workers=slo_sglang.workers,
    quick_apps=("chat",),
    quick_requests=40,
)


@click.command("sglang-slo")
@options("sglang-slo")
def bench(**given: Any) -> None:
    """Measure the SLO policy beside SGLang's own policies, each at its best chunk size, with prompts before
    decodes and mixed with them.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    run(BENCH, Given(**given))
