"""The applications of the SLO bench: lengths, latency targets and windows of requests.

Targets are those of SLOs-Serve (arXiv 2504.08784): a first token within a multiple of the time that the
prompt takes on an idle engine, and a time for each further token. Lengths are seeded log-normal
distributions, or drawn from Azure's public traces of 2023 (chat, coder) if a folder with them is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from penstock.simulation.arrivals import gamma_arrivals, read_azure
from penstock.simulation.records import Ask, Piece
from penstock.simulation.step_time import Load, StepTime

Lengths = tuple[int, int]
"""Tokens of a prompt and of its answer."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Median and sigma of the logarithm, cut to a range."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return max(self.least, min(self.most, round(rng.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True, slots=True)
class Tier:
    """Targets: ``slowdown`` times the idle engine's time for the first token, ``tpot_s`` for each other."""

    name: str
    slowdown: float
    tpot_s: float
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One application. ``rate`` is about what an engine sustains, in requests a second: where a search
    begins. ``trace`` is the Azure file whose lengths replace the generated ones.
    """

    name: str
    prompt: LogNormal
    output: LogNormal
    tiers: tuple[Tier, ...]
    rate: float
    trace: str = ""
    window: int = 1
    """A window has so many times the requests: long answers take long to fill the running batch."""
    cv: float = 1.0

    def lengths(self, rng: random.Random, count: int, traces: Path | None) -> list[Lengths]:
        """Of ``count`` requests."""
        found = traces / self.trace if traces is not None and self.trace else None
        if found is not None:
            return rng.choices(trace_lengths(found), k=count)
        return [(self.prompt.draw(rng), self.output.draw(rng)) for _ in range(count)]


LOOSE, TIGHT = Tier("loose", 5.0, 0.1, 0.5), Tier("tight", 3.0, 0.05, 0.5)
CHAT_PROMPT, CHAT_OUTPUT = LogNormal(1020, 0.98, 16, 8000), LogNormal(140, 0.86, 2, 1000)

APPS: Mapping[str, App] = {
    app.name: app
    for app in (
        App(
            name="chat",
            prompt=CHAT_PROMPT,
            output=CHAT_OUTPUT,
            tiers=(Tier("chat", 5.0, 0.1),),
            rate=4.5,
            trace="azure_2023_conv.csv.gz",
        ),
        App(
            name="coder",
            prompt=LogNormal(1470, 1.36, 16, 8000),
            output=LogNormal(14, 0.85, 2, 300),
            tiers=(Tier("coder", 5.0, 0.1),),
            rate=3.0,
            trace="azure_2023_code.csv.gz",
        ),
        App(
            name="arXiv summary",
            prompt=LogNormal(6000, 0.45, 1000, 16000),
            output=LogNormal(190, 0.4, 20, 600),
            tiers=(Tier("summary", 3.0, 0.1),),
            rate=0.8,
        ),
        App(
            name="tool use",
            prompt=LogNormal(1700, 0.5, 200, 6000),
            output=LogNormal(90, 0.7, 8, 500),
            tiers=(Tier("tool", 3.0, 0.05),),
            rate=2.0,
        ),
        App(
            name="reasoning",
            prompt=LogNormal(250, 0.8, 30, 2000),
            output=LogNormal(1200, 0.6, 200, 4000),
            tiers=(Tier("thinking", 3.0, 0.05),),
            rate=2.5,
            window=2,
        ),
        App(name="mixed tiers", prompt=CHAT_PROMPT, output=CHAT_OUTPUT, tiers=(LOOSE, TIGHT), rate=3.0),
    )
}


@cache
def trace_lengths(file: Path) -> tuple[Lengths, ...]:
    """Lengths of an Azure trace, without requests that answer or ask nothing."""
    rows = read_azure(file)
    return tuple(
        (row.input_tokens, row.output_tokens) for row in rows if row.input_tokens and row.output_tokens
    )


def window(
    app: App, seed: int, rate: float, count: int, step_time: StepTime, traces: Path | None = None
) -> list[Ask]:
    """``count`` requests at ``rate`` a second. Windows of one seed differ between rates in nothing but the
    spacing of arrivals; priorities are those of the tiers, the tightest first.
    """
    rng = random.Random(f"{app.name} {seed}")
    lengths = app.lengths(rng, count, traces)
    arrivals = gamma_arrivals(1.0, count, rng, cv=app.cv)
    tiers = rng.choices(app.tiers, [tier.share for tier in app.tiers], k=count)
    ranks = {tier: rank for rank, tier in enumerate(sorted(app.tiers, key=lambda tier: tier.tpot_s))}
    asks = []
    for number, ((prompt, output), arrival, tier) in enumerate(zip(lengths, arrivals, tiers, strict=True)):
        alone_s = step_time(Load(prompt, 0, 1, 0))
        asks.append(
            Ask(
                request_id=f"r{number}",
                arrival_s=arrival / rate,
                prompt=(Piece(number + 1, prompt),),
                output_tokens=output,
                priority=ranks[tier],
                ttft_slo_ms=1e3 * tier.slowdown * alone_s,
                tpot_slo_ms=1e3 * tier.tpot_s,
                tier=tier.name,
                most_output_tokens=max(app.output.most, output),
            )
        )
    return asks
