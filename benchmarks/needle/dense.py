"""What transformers' Llama finds with dense attention in float32."""

from __future__ import annotations

from penstock.benchmarks.flowkv_part import Finding, Tell
from penstock.benchmarks.needle.answers import TransformersScore, scores
from penstock.benchmarks.needle.checkpoint import shipped
from penstock.benchmarks.needle.part import NeedleOptions
from penstock.benchmarks.needle.task import TASKS
from penstock.benchmarks.report import Cell, Claim

LEAST = 0.95
Rows = list[dict[str, Cell]]


def measure(options: NeedleOptions, tell: Tell) -> Finding:
    """Every task and length."""
    score = TransformersScore(options.folder or shipped())
    rows: Rows = []
    for length in options.lengths:
        for task in TASKS:
            tell(f"{task} at {length:,} tokens")
            found = scores(task, length, options.prompts, options.seed, score)
            rows.append(
                {"task": task, "tokens": length, "prompts": len(found), "dense": sum(found) / len(found)}
            )
    return Finding(rows=rows, claims=claims(rows))


def claims(rows: Rows) -> list[Claim]:
    """What is promised of every task, at the length where it goes worst."""
    worst: dict[str, float] = {}
    for row in rows:
        task, share = row["task"], row["dense"]
        assert isinstance(task, str)
        assert isinstance(share, float)
        worst[task] = min(share, worst.get(task, 1.0))
    return [Claim.of(f"{task}, dense, worst length", share, ">=", LEAST) for task, share in worst.items()]
