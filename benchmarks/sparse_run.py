"""Every selector on the same queries: what it reads, what mass that has, how far its output is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace

from penstock.benchmarks.sparse_keys import Layer
from penstock.kernels.sparse.attention import attained, attend, logits
from penstock.kernels.sparse.calibration import Calibration, needed_margin
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.hybrid import Hybrid
from penstock.kernels.sparse.oracle import Oracle
from penstock.kernels.sparse.page_means import PageMeans
from penstock.kernels.sparse.pruner import Pruner
from penstock.kernels.sparse.quest import Quest
from penstock.kernels.sparse.selection import Selection, Selector
from penstock.kernels.sparse.tactic import Tactic

MASSES = (0.8, 0.9)
PAGE_TOKENS = 16
ASKED = (0.6, 0.8, 0.87, 0.92, 0.96, 0.99, 0.998)
BUDGETS = (0.01, 0.03, 0.06, 0.12, 0.25, 0.4, 0.6)
CURVE = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Contender:
    """A selector, the amounts it is tried with, and whether a margin is learned for it."""

    selector: Selector[Any]
    amounts: tuple[float, ...]
    calibrated: bool = False
    oracle: str = "oracle"
    """The oracle of the same granularity."""


def contenders(config: SparseConfig) -> list[Contender]:
    """All that are compared. The pruner may propose half of the tokens, so that no budget is out of its
    reach."""
    two_bits = replace(config, key_bits=2)
    pages = f"pages of {PAGE_TOKENS}"
    return [
        Contender(Oracle(config), CURVE),
        Contender(Oracle(config, f"oracle, {pages}", PAGE_TOKENS), MASSES),
        Contender(Oracle(replace(config, group_rule="union"), "oracle, union"), MASSES),
        Contender(Oracle(replace(config, group_rule="mean"), "oracle, mean"), MASSES),
        Contender(Hybrid(config), ASKED, calibrated=True),
        Contender(Hybrid(replace(config, estimate_rest=False), "hybrid, no rest"), CURVE),
        Contender(Hybrid(two_bits, "hybrid, 2 bits"), ASKED, calibrated=True),
        Contender(
            Hybrid(config, f"hybrid, {pages}", PAGE_TOKENS), ASKED, calibrated=True, oracle=f"oracle, {pages}"
        ),
        Contender(
            PageMeans(config, PAGE_TOKENS, f"means, {pages}"),
            ASKED,
            calibrated=True,
            oracle=f"oracle, {pages}",
        ),
        Contender(Tactic(config), (0.1, 0.2, 0.35, *CURVE)),
        Contender(Pruner(config, proposed_share=0.5), (0.3, *CURVE, 0.98, 0.995)),
        Contender(Quest(config), BUDGETS),
    ]


@dataclass(slots=True)
class Sample:
    """One selector with one amount, or calibrated for one mass, over all steps."""

    tokens: list[float] = field(default_factory=list)
    """Share of the tokens read, a KV head."""
    masses: list[float] = field(default_factory=list)
    """Exact mass attained, a query head and step."""
    errors: list[float] = field(default_factory=list)
    """Distance of the output from the dense one, to the dense one's length."""
    scored: list[float] = field(default_factory=list)
    """Share of the tokens scored one by one."""

    def quantile(self, share: float) -> float:
        """The mass below which ``share`` of the query heads and steps lie."""
        ordered = sorted(self.masses)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    def kept(self, mass: float) -> float:
        """Share of query heads and steps with at least ``mass``, but for what float32 rounds."""
        return sum(had >= mass - 1e-5 for had in self.masses) / len(self.masses)


Key = tuple[str, float, bool]
"""Selector, amount, and whether the amount is a mass that a calibrated margin was added to."""


@dataclass(slots=True)
class Case:
    """What was found on one kind of keys. Calibration runs on other layers than those that are scored."""

    name: str
    config: SparseConfig
    samples: dict[Key, Sample] = field(default_factory=dict)
    margins: dict[tuple[str, float], Calibration] = field(default_factory=dict)
    index_share: dict[str, float] = field(default_factory=dict)
    """Memory of the index, to that of keys and values in 16 bits."""

    def calibration(self, name: str, mass: float) -> Calibration:
        """That of a selector for a mass."""
        return self.margins.setdefault((name, mass), Calibration(replace(self.config, mass=mass)))


def run_case(
    name: str,
    config: SparseConfig,
    calibrating: Sequence[Layer],
    scored: Sequence[Layer],
    tell: Callable[[str], None],
) -> Case:
    """Calibrate on some layers, then measure every contender on others, the margins learning on."""
    case = Case(name, config)
    entries = contenders(config)
    for number, layer in enumerate([*calibrating, *scored]):
        tell(f"{name}, layer {number + 1} of {len(calibrating) + len(scored)}")
        measuring = number >= len(calibrating)
        active = entries if measuring else [entry for entry in entries if entry.calibrated]
        indices = _indices(case, active, layer)
        for step in layer.steps():
            _step(case, active, indices, step, measuring=measuring)
    return case


def _indices(case: Case, entries: Sequence[Contender], layer: Layer) -> list[Any]:
    """An index for each contender; equal ones are made once."""
    keys, values = layer.keys[:, : layer.prompt], layer.values[:, : layer.prompt]
    made: dict[object, Any] = {}
    found = []
    for entry in entries:
        selector: Any = entry.selector
        kind = (type(selector), selector.config.key_bits, isinstance(selector, PageMeans))
        if kind not in made:
            made[kind] = selector.index(keys, values)
        found.append(made[kind])
        if isinstance(selector, Hybrid):
            case.index_share[selector.name] = made[kind].nbytes / (4 * keys.numel())
    return found


Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _step(
    case: Case, entries: Sequence[Contender], indices: Sequence[Any], step: Step, *, measuring: bool
) -> None:
    query, keys, values = step
    exact = logits(query, keys)
    dense = attend(query, keys, values).output
    for entry, index in zip(entries, indices, strict=True):
        selector = entry.selector
        curve = []
        for amount in entry.amounts:
            selection = selector.select(index, query, keys, amount)
            masses = attained(exact, selection.tokens)
            curve.append(masses.flatten().tolist())
            if measuring:
                _note(case, (selector.name, amount, False), selection, masses, step, dense)
        for mass in MASSES if entry.calibrated else ():
            calibration = case.calibration(selector.name, mass)
            selection = selector.select(index, query, keys, calibration.ask(0))
            masses = attained(exact, selection.tokens)
            heads = range(masses.numel())
            if measuring:
                _note(case, (selector.name, mass, True), selection, masses, step, dense)
            for head in calibration.sampled(len(heads)) if measuring else heads:
                needed = needed_margin(entry.amounts, [masses[head] for masses in curve], mass)
                calibration.measured(0, masses.flatten()[head].item(), needed)


def _note(
    case: Case, key: Key, selection: Selection, masses: torch.Tensor, step: Step, dense: torch.Tensor
) -> None:
    query, keys, values = step
    sample = case.samples.setdefault(key, Sample())
    output = selection.attention(query, keys, values).output
    sample.tokens += selection.tokens.float().mean(1).tolist()
    sample.masses += masses.flatten().tolist()
    sample.errors += ((output - dense).norm(dim=-1) / dense.norm(dim=-1)).flatten().tolist()
    sample.scored += (selection.scored / keys.shape[1]).tolist()
