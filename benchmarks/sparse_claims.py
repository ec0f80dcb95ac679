"""Rows and claims of ``penstock bench sparse``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.sparse_run import MASSES, Case, Contender, Sample

Rows = list[dict[str, Cell]]
PEERS = ("quest", "tactic", "pruner")
ATTAINED = 0.95
MOST_TO_ORACLE = 1.3


def promise_rows(case: Case, entries: Sequence[Contender]) -> Rows:
    """What is attained for each mass: calibrated where a margin is learned, as asked elsewhere."""
    rows: Rows = []
    for mass in MASSES:
        for entry in entries:
            name = entry.selector.name
            sample = case.samples.get((name, mass, entry.calibrated))
            if sample is None or name == "quest":
                continue
            peer = case.samples[entry.oracle, mass, False]
            best = case.samples["oracle", mass, False]
            rows.append(
                {
                    "keys": case.name,
                    "mass": mass,
                    "selector": name,
                    "margin": case.calibration(name, mass).margin(0) if entry.calibrated else None,
                    "attained": sample.kept(mass),
                    "mass P10": sample.quantile(0.1),
                    "mass P50": sample.quantile(0.5),
                    "tokens": mean(sample.tokens),
                    "to oracle alike": mean(sample.tokens) / mean(peer.tokens),
                    "to oracle": mean(sample.tokens) / mean(best.tokens),
                    "output error": mean(sample.errors),
                    "scored": mean(sample.scored),
                    "index": case.index_share.get(name),
                }
            )
    return rows


def curve_rows(case: Case, entries: Sequence[Contender]) -> Rows:
    """Every amount of every selector: budget, mass and error."""
    return [
        {
            "keys": case.name,
            "selector": entry.selector.name,
            "amount": amount,
            "tokens": mean(sample.tokens),
            "mass mean": mean(sample.masses),
            "mass P10": sample.quantile(0.1),
            "output error": mean(sample.errors),
        }
        for entry in entries
        for amount in entry.amounts
        for sample in (case.samples[entry.selector.name, amount, False],)
    ]


def budget_rows(case: Case, entries: Sequence[Contender]) -> Rows:
    """Output errors of the peers at the average budget of the calibrated hybrid."""
    rows: Rows = []
    for mass in MASSES:
        ours = case.samples["hybrid", mass, True]
        row: dict[str, Cell] = {"keys": case.name, "mass": mass, "tokens": mean(ours.tokens)}
        row["hybrid"] = mean(ours.errors)
        for name in (*PEERS, "oracle"):
            (entry,) = (one for one in entries if one.selector.name == name)
            points = [case.samples[name, amount, False] for amount in entry.amounts]
            row[name] = error_at(points, mean(ours.tokens))
        rows.append(row)
    return rows


def error_at(points: Sequence[Sample], tokens: float) -> float:
    """The output error at an average budget of ``tokens``, straight between points on logarithmic axes.

    Beyond the smallest or the largest budget, the error of that one.
    """
    curve = sorted((math.log(mean(one.tokens)), math.log(max(mean(one.errors), 1e-9))) for one in points)
    at = math.log(tokens)
    if at <= curve[0][0]:
        return math.exp(curve[0][1])
    for (x0, y0), (x1, y1) in pairwise(curve):
        if at <= x1:
            return math.exp(y0 + (y1 - y0) * (at - x0) / max(x1 - x0, 1e-9))
    return math.exp(curve[-1][1])


def claims(promised: Rows, budgets: Rows) -> list[Claim]:
    """What is promised of the calibrated hybrid, for each kind of keys and mass."""
    found = []
    for row in promised:
        if row["selector"] == "hybrid":
            where = f"{row['keys']}, P = {row['mass']}"
            found.append(Claim.of(f"{where}: share attained", _number(row["attained"]), ">=", ATTAINED))
            found.append(
                Claim.of(f"{where}: tokens to oracle", _number(row["to oracle"]), "<=", MOST_TO_ORACLE)
            )
    for peer in PEERS:
        worst = max(_number(row["hybrid"]) / _number(row[peer]) for row in budgets)
        found.append(Claim.of(f"output error to {peer}, same budget, worst of all", worst, "<=", 1.0))
    return found


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of a non-empty sample."""
    return sum(values) / len(values)


def _number(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return cell
