"""DLPM with other settings, on the workloads that tell them apart.

The quantum buys throughput with fairness; ageing buys the wait of cold prompts with prefix hits. Charging
extend tokens alone shows what the price of output does to Jain's index of extend tokens, charging output only
as it comes what expecting it does to the service gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from penstock.benchmarks.dlpm_cases import QUANTUM, Policy, fair
from penstock.benchmarks.dlpm_claims import EXTEND_ALONE, KV_READ, Results, grouped, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def with_setting(name: str, **settings: float) -> Policy:
    """DLPM with one setting that is not the bench's, under a name that says so."""
    return replace(fair("dlpm", **{"quantum_tokens": QUANTUM, **settings}), name=name)


QUANTA = {
    f"dlpm, quantum {quantum // 1000}k": with_setting(
        f"dlpm, quantum {quantum // 1000}k", quantum_tokens=float(quantum)
    )
    for quantum in (1_000, 8_000, 32_000)
}
"""Beside the bench's own 2k."""
AGEING = tuple(
    with_setting(f"dlpm, ageing {tokens}", ageing_tokens_per_s=float(tokens)) for tokens in (0, 10, 50, 200)
)
"""Cached tokens that a second of waiting is worth, beside the default of 20."""
FREE_OUTPUT = with_setting(EXTEND_ALONE, output_weight=0.0)
AS_IT_COMES = with_setting("dlpm, output as it comes", first_output_tokens=0.0)
"""Algorithm 1 as printed: output is charged when it is generated, and not expected before."""

VARIANTS: Mapping[str, tuple[Policy, ...]] = {
    "long documents": tuple(QUANTA.values()),
    "judge, S1": (*QUANTA.values(), FREE_OUTPUT, AS_IT_COMES),
    "tree of thought, S1": (FREE_OUTPUT, AS_IT_COMES),
    "mooncake": (AS_IT_COMES,),
    "chat": AGEING,
    "cold prompts": AGEING,
}
QUICK_VARIANTS: Mapping[str, tuple[Policy, ...]] = {"long documents": tuple(QUANTA.values())}


def variants(case: str, *, quick: bool) -> tuple[Policy, ...]:
    """What DLPM is tried with on a case beyond the bench's own settings."""
    return (QUICK_VARIANTS if quick else VARIANTS).get(case, ())


def draw_quanta(axes: Axes, results: Results) -> None:
    """Throughput against the service gap, a line a case, a point a quantum; VTC and LPM are its ends."""
    smallest, *larger = QUANTA
    for (case, step_time), row in grouped(results).items():
        if KV_READ in step_time or not QUANTA.keys() & row.keys():
            continue
        points = [
            (
                max(outcome.gap for outcome in row[label]) / 1000,
                mean(row[label], "tokens_per_s") / 1000,
                label.rpartition(" ")[2],
            )
            for label in ("vtc", smallest, "dlpm", *larger, "lpm")
            if label in row
        ]
        axes.plot([gap for gap, _, _ in points], [rate for _, rate, _ in points], marker="o", label=case)
        for gap, rate, name in points:
            text = f"{QUANTUM / 1000:g}k" if name == "dlpm" else name
            axes.annotate(text, (gap, rate), textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.set_xlabel("largest service gap, thousand weighted tokens")
    axes.set_ylabel("thousand tokens a second")
    axes.legend(fontsize=8)
