"""The needle's answers and exact masses with the pages of ``tactic``, and with Quest at the same budget.

In this process, in torch, one context for all ways (``decoding.py``); the engine has no Quest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.flowkv_part import Finding, Tell, percentile
from penstock.benchmarks.needle.answers import contexts
from penstock.benchmarks.needle.checkpoint import load
from penstock.benchmarks.needle.decoding import DENSE, Attention, Context, QuestPages, Readings, TacticPages
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
ROOM = 64
"""Tokens of a question and its answer, at most."""


class Case(msgspec.Struct):
    """What was found for one task, length and mass."""

    task: Task
    tokens: int
    mass: float
    dense: list[float]
    tactic: list[float]
    quest: list[float]
    read: Readings
    quest_read: Readings

    def attained(self) -> float:
        """Share of query heads and steps with the mass, of those that did not read everything; 1 of none."""
        masses = self.read.masses
        return sum(had >= self.mass - 1e-5 for had in masses) / len(masses) if masses else 1.0

    def row(self) -> dict[str, Cell]:
        """For tables."""
        layers = {f"layer {layer}": self.read.share(layer) for layer in sorted(self.read.shares)}
        return {
            "task": self.task,
            "tokens": self.tokens,
            "P": self.mass,
            **Pairs(self.dense, self.tactic).cells(),
            "quest": sum(self.quest) / len(self.quest),
            "read": self.read.share(),
            "quest read": self.quest_read.share(),
            **layers,
            "attained": self.attained(),
            "mass P10": _low(self.read.masses),
            "quest P10": _low(self.quest_read.masses),
        }


def measure(options: NeedleOptions, tell: Tell) -> Finding:
    """Every task, length and mass."""
    calibrations = {mass: Calibration(_config(mass).core()) for mass in MASSES}
    model = load(options.folder)
    cases = []
    for length in options.lengths:
        for task in TASKS:
            tell(f"{task} at {length:,} tokens")
            mine = [Case(task, length, mass, [], [], [], Readings(), Readings()) for mass in MASSES]
            for prompts in contexts(task, length, options.prompts, options.seed):
                context = Context(model, prompts[0].tokens[: shared_tokens(prompts)], ROOM)
                dense = _scores(context, prompts, DENSE)
                for case in mine:
                    case.dense += dense
                    _answer(case, context, prompts, calibrations[case.mass])
            cases += mine
    return Finding(
        rows=[case.row() for case in cases],
        claims=_claims(cases),
        draw=lambda axes: _draw(axes, cases),
    )


def _config(mass: float) -> ServingConfig:
    return msgspec.structs.replace(SERVING, mass=mass)


def _answer(case: Case, context: Context, prompts: Sequence[Prompt], calibration: Calibration) -> None:
    tactic = TacticPages(_config(case.mass), calibration)
    case.tactic += _scores(context, prompts, tactic)
    quest = QuestPages(_config(case.mass).core(), tactic.readings.share())
    case.quest += _scores(context, prompts, quest)
    case.read.add(tactic.readings)
    case.quest_read.add(quest.readings)


def _scores(context: Context, prompts: Sequence[Prompt], attention: Attention) -> list[float]:
    return [prompt.score(context.answer(prompt, attention)) for prompt in prompts]


def _low(masses: Sequence[float]) -> float | None:
    return percentile(masses, 0.1) if masses else None


def _claims(cases: Sequence[Case]) -> list[Claim]:
    promised = [case for case in cases if case.mass == MASS]
    claims = []
    for task in TASKS:
        pairs = together([Pairs(case.dense, case.tactic) for case in promised if case.task == task])
        claims.append(Claim.of(f"{task}, P = {MASS}: share of answers lost", pairs.lost, "<=", MOST_LOST))
    for mass in MASSES:
        worst = min(case.attained() for case in cases if case.mass == mass)
        claims.append(Claim.of(f"P = {mass}: share attained, worst task and length", worst, ">=", ATTAINED))
    return claims


def _draw(axes: Axes, cases: Sequence[Case]) -> None:
    """Answers by budget: what each way finds with what it reads on average."""
    for number, task in enumerate(TASKS):
        mine = [case for case in cases if case.task == task]
        for name, marker in (("tactic", "o"), ("quest", "x")):
            reads = [(case.read if name == "tactic" else case.quest_read).share() for case in mine]
            scores = [sum(found) / len(found) for found in (getattr(case, name) for case in mine)]
            axes.scatter(reads, scores, marker=marker, color=f"C{number}", label=f"{task}, {name}")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("share of the tokens read, mean of layers, KV heads and steps")
    axes.set_ylabel("share of the references found")
    axes.legend(fontsize="x-small", ncols=2)
