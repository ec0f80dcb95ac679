"""Stock SGLang on the reference CPU platform, one server at a time, and transformers to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from sglang_server import Serve, sglang_server
from tiny_adapter import write_adapter

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


@pytest.fixture(scope="session")
def adapter(model: str, logs: Path) -> tuple[Path, Greedy]:
    """A LoRA adapter, and what transformers says with it. It is one of the output projections: of Q, K and V
    SGLang wants all three."""
    folder = write_adapter(logs / "adapter", seed=3, projection="o_proj")
    return folder, greedy_of(model, folder)


def greedy_of(model: str, adapter: Path | None = None) -> Greedy:
    """``greedy`` of the model in a folder, with an adapter of its output projections or without."""
    from penstock_refcpu import declare_torchvision_operators

    declare_torchvision_operators()
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        halves = load_file(adapter / "adapter_model.safetensors")
        for number, layer in enumerate(network.model.layers):
            name = f"base_model.model.model.layers.{number}.self_attn.o_proj"
            added = halves[f"{name}.lora_B.weight"] @ halves[f"{name}.lora_A.weight"]
            layer.self_attn.o_proj.weight.data += torch.from_numpy(added)

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        output = network.generate(ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return output[0, len(prompt) :].tolist()

    return greedy
