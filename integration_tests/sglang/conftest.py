"""Stock SGLang on the reference CPU platform, one server at a time, and transformers to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from sglang_server import Serve, sglang_server

from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import serving
from penstock.benchmarks.tiny_model import TinyLlama, ensure_model

pytest.importorskip("sglang.srt", reason="needs SGLang: make env-sglang")


@pytest.fixture(scope="session")
def serve(model: str, logs: Path) -> Serve:
    """``serve(*arguments)`` is a running ``sglang serve`` of the tiny model in float32."""

    @contextlib.contextmanager
    def serve(*arguments: str, name: str = "sglang", **environment: str) -> Iterator[Server]:
        server = sglang_server(model, logs, name, arguments, environment)
        with serving([server]):
            yield server

    return serve


Greedy = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="session")
def greedy(model: str) -> Greedy:
    """``greedy(prompt, n)`` is what transformers continues ``prompt`` with, in float32."""
    return greedy_of(model)


@pytest.fixture(scope="session")
def other_weights() -> tuple[str, Greedy]:
    """A model of the tiny one's shape that says something else, and what transformers says with it."""
    folder = str(ensure_model(TinyLlama(seed=1)))
    return folder, greedy_of(folder)


def greedy_of(model: str) -> Greedy:
    """``greedy`` of the model in a folder."""
    from penstock_refcpu import declare_torchvision_operators

    declare_torchvision_operators()
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        output = network.generate(ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return output[0, len(prompt) :].tolist()

    return greedy
