"""Layers of the trained needle for ``penstock bench sparse``: its keys, and the queries it answers with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.benchmarks.needle.model import Attended, NeedleModel, capture
from penstock.benchmarks.needle.task import Task, make_prompt
from penstock.benchmarks.sparse_keys import Layer


def needle_layers(
    model: NeedleModel, tasks: Sequence[Task], length: int, seeds: Sequence[int]
) -> list[list[Layer]]:
    """What each layer of ``model`` sees while it answers, a ``Layer`` for every task and seed.

    Contexts have ``length`` tokens, question included. Steps are those that say a token of the right answer.
    """
    prompts = [_answered(model, task, length, seed) for seed in seeds for task in tasks]
    return [list(layers) for layers in zip(*prompts, strict=True)]


def _answered(model: NeedleModel, task: Task, length: int, seed: int) -> list[Layer]:
    prompt = make_prompt(task, length, seed)
    tokens = torch.tensor(prompt.tokens + prompt.answer[:-1])
    return [
        _layer(f"needle-{number}", found, len(prompt.answer), model.shape.kv_heads)
        for number, found in enumerate(capture(model, tokens))
    ]


def _layer(name: str, found: Attended, steps: int, kv_heads: int) -> Layer:
    last = found.queries[:, -steps:].transpose(0, 1)
    queries = last.unflatten(1, (kv_heads, -1)) * last.shape[-1] ** -0.5
    return Layer(name, queries.contiguous(), found.keys, found.values)
