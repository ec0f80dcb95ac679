"""The needle's answers and exact masses with the pages of ``tactic``, and with peers that read as much.

A share of the mass says how much ``tactic`` reads. Quest and ``tactic`` with a ``budget`` read as much, in
pages of the engine's blocks and of 16 tokens, as in Quest's paper: smaller pages find more with less.
In this process, in torch, one context for all ways (``decoding.py``); the engine has no Quest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.flowkv_part import Finding, Tell, percentile
from penstock.benchmarks.needle.answers import contexts
from penstock.benchmarks.needle.checkpoint import load
from penstock.benchmarks.needle.decoding import (
    BLOCK_TOKENS,
    DENSE,
    Attention,
    Context,
    QuestPages,
    Readings,
    TacticPages,
)
from penstock.benchmarks.needle.pairs import Pairs, together
from penstock.benchmarks.needle.part import MASS, MOST_LOST, SERVING, NeedleOptions
from penstock.benchmarks.needle.task import TASKS, Prompt, Task, shared_tokens
from penstock.benchmarks.report import Cell, Claim
from penstock.kernels.sparse.calibration import Calibration
from penstock.kernels.sparse.serving import ServingConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASSES = (MASS, 0.6, 0.3)
"""Lower ones than what is promised: where answers begin to be lost."""
ATTAINED = 0.95
PAPER_TOKENS = 16
"""Of Quest's pages in its paper."""
ROOM = 64
"""Tokens of a question and its answer, at most."""


class Way(msgspec.Struct):
    """What one way of attention answered, and what it read for that."""

    scores: list[float] = msgspec.field(default_factory=list)
    readings: Readings = msgspec.field(default_factory=Readings)

    def score(self) -> float:
        """Mean over prompts."""
        return sum(self.scores) / len(self.scores)

    def mass(self) -> float | None:
        """P10 of the attained masses; None where everything was read."""
        return percentile(self.readings.masses, 0.1) if self.readings.masses else None


class Case(msgspec.Struct):
    """What was found for one task, length and mass."""

    task: Task
    tokens: int
    mass: float
    dense: list[float] = msgspec.field(default_factory=list)
    tactic: Way = msgspec.field(default_factory=Way)
    peers: dict[str, Way] = {}
    """By their names in tables."""

    def attained(self) -> float:
        """Share of query heads and steps with the mass, of those that did not read everything; 1 of none."""
        masses = self.tactic.readings.masses
        return sum(had >= self.mass - 1e-5 for had in masses) / len(masses) if masses else 1.0

    def row(self) -> dict[str, Cell]:
        """For tables."""
        read = self.tactic.readings
        return {
            "task": self.task,
            "tokens": self.tokens,
            "P": self.mass,
            **Pairs(self.dense, self.tactic.scores).cells(),
            **{name: way.score() for name, way in self.peers.items()},
            "read": read.share(),
            **{f"layer {layer}": read.share(layer) for layer in sorted(read.shares)},
            "attained": self.attained(),
            "mass P10": self.tactic.mass(),
            "quest P10": self.peers["quest"].mass(),
        }


def measure(options: NeedleOptions, tell: Tell) -> Finding:
    """Every task, length and mass."""
    calibrations = {mass: Calibration(_config(mass).core()) for mass in MASSES}
    model = load(options.folder)
    cases = []
    for length in options.lengths:
        for task in TASKS:
            tell(f"{task} at {length:,} tokens")
            mine = [Case(task, length, mass) for mass in MASSES]
            for prompts in contexts(task, length, options.prompts, options.seed):
                context = Context(model, prompts[0].tokens[: shared_tokens(prompts)], ROOM)
                dense = _scores(context, prompts, DENSE)
                for case in mine:
                    case.dense += dense
                    answer(case, context, prompts, calibrations[case.mass])
            cases += mine
    return Finding(
        rows=[case.row() for case in cases],
        claims=_claims(cases),
        draw=lambda axes: _draw(axes, cases),
    )


def _config(mass: float) -> ServingConfig:
    return msgspec.structs.replace(SERVING, mass=mass)


def answer(case: Case, context: Context, prompts: Sequence[Prompt], calibration: Calibration) -> None:
    """Add what all ways answer to ``prompts``, and read for that, to ``case``."""
    config = _config(case.mass)
    tactic = TacticPages(config, calibration)
    _take(case.tactic, context, prompts, tactic)
    for name, peer in _peers(config, tactic.readings.share(), calibration).items():
        _take(case.peers.setdefault(name, Way()), context, prompts, peer)


def _peers(
    config: ServingConfig, budget: float, calibration: Calibration
) -> dict[str, TacticPages | QuestPages]:
    """Those that read so large a share of every KV head's tokens."""
    # What they attain must not teach the margin by which ``tactic`` is judged.
    fixed = msgspec.structs.replace(config, budget=budget, calibration_share=0)
    core = config.core()
    return {
        "budget": TacticPages(fixed, calibration),
        "quest": QuestPages(core, budget, BLOCK_TOKENS),
        f"budget, {PAPER_TOKENS}": TacticPages(fixed, calibration, PAPER_TOKENS),
        f"quest, {PAPER_TOKENS}": QuestPages(core, budget, PAPER_TOKENS),
    }


def _take(way: Way, context: Context, prompts: Sequence[Prompt], attention: TacticPages | QuestPages) -> None:
    way.scores += _scores(context, prompts, attention)
    way.readings.add(attention.readings)


def _scores(context: Context, prompts: Sequence[Prompt], attention: Attention) -> list[float]:
    return [prompt.score(context.answer(prompt, attention)) for prompt in prompts]


def _claims(cases: Sequence[Case]) -> list[Claim]:
    promised = [case for case in cases if case.mass == MASS]
    claims = []
    for task in TASKS:
        pairs = together([Pairs(case.dense, case.tactic.scores) for case in promised if case.task == task])
        claims.append(Claim.of(f"{task}, P = {MASS}: share of answers lost", pairs.lost, "<=", MOST_LOST))
    for mass in MASSES:
        worst = min(case.attained() for case in cases if case.mass == mass)
        claims.append(Claim.of(f"P = {mass}: share attained, worst task and length", worst, ">=", ATTAINED))
    return claims


def _draw(axes: Axes, cases: Sequence[Case]) -> None:
    """Answers by budget: what each way finds with what it reads on average."""
    for number, task in enumerate(TASKS):
        mine = [case for case in cases if case.task == task]
        ways = {"tactic": [case.tactic for case in mine]}
        ways |= {name: [case.peers[name] for case in mine] for name in ("budget", "quest")}
        for (name, found), marker in zip(ways.items(), "o+x", strict=True):
            reads = [way.readings.share() for way in found]
            scores = [way.score() for way in found]
            axes.scatter(reads, scores, marker=marker, color=f"C{number}", label=f"{task}, {name}")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("share of the tokens read, mean of layers, KV heads and steps")
    axes.set_ylabel("share of the references found")
    axes.legend(fontsize="x-small", ncols=2)
