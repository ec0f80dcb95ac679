"""What summaries of a prompt's blocks cost beside its prefill attention, on vLLM's CPU kernel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.report import Claim
from penstock.benchmarks.tiny_model import ensure_model

CHUNK = 256
"""Query rows of a step of prefill. Time of a step is linear in what stands before it, so that the first, the
middle and the last say what all take."""
GOALS = {8192: 0.10, 32768: 0.03}
"""Shares of prefill attention that building may take, by length."""


def build_row(tokens: int, block_tokens: int, seed: int) -> dict[str, Any]:
    """CPU seconds of one layer and thread: attention of a prompt in chunks, and its summaries."""
    shape = Shape(block_tokens=block_tokens, blocks=tokens // block_tokens)
    model = str(ensure_model())
    stock = AttentionRig(model, shape, "CPU_ATTN")
    ours = AttentionRig(model, shape, "CUSTOM", {"least_tokens": 1, "log_steps": 0})
    ours.cache = stock.cache
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, shape.kv_heads, shape.head_size, generator=random).bfloat16()
    table = torch.randperm(shape.blocks, generator=random).tolist()
    stock.write(rows, rows, table)
    queries = torch.randn(CHUNK, shape.heads, shape.head_size, generator=random).bfloat16()
    steps = [_seconds(stock, queries, table, end) for end in (CHUNK, (tokens + CHUNK) // 2, tokens)]
    prefill = sum(steps) / len(steps) * (tokens / CHUNK)
    ours.attend(queries[:1], ours.metadata([table], [tokens], [1]))
    blocks = torch.tensor(table)
    ours.impl.decode.index.forget(blocks)
    began = time.thread_time()
    ours.impl.decode.summarise(blocks)
    build = time.thread_time() - began
    return {
        "tokens": tokens,
        "prefill attention s": prefill,
        "index s": build,
        "index to prefill": build / prefill,
    }


def _seconds(rig: AttentionRig, queries: torch.Tensor, table: Sequence[int], end: int) -> float:
    metadata = rig.metadata([table], [end], [len(queries)])
    began = time.thread_time()
    rig.attend(queries, metadata)
    return time.thread_time() - began


def build_claims(rows: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """What building may take of prefill attention."""
    for row in rows:
        if row["tokens"] in GOALS:
            name = f"index to prefill attention, {row['tokens']} tokens"
            yield Claim.of(name, row["index to prefill"], "<=", GOALS[row["tokens"]])
