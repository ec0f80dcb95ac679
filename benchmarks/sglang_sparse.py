"""``penstock bench sglang-sparse``: what a decode of one layer costs on SGLang's CPU path, dense and sparse.

One layer in the shape of Llama 3.1 8B over SGLang's own pool: ``torch_native``, our backend, and our backend
with every page chosen, which tells what its kernel brings without leaving anything out. The context stands
several times in the pool and every step takes the next copy, so that no step finds its keys in a processor's
cache. Time is CPU time of one thread, choice of pages and its measurements included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click
import msgspec
import torch
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Claim, Environment, Report
from penstock.benchmarks.sparse_keys import LEVELS, Layer, made_up
from penstock.kernels.sparse.serving import ServingConfig
from penstock.plugins.sglang.installation import installed_version

COLD_BYTES = 256 * 2**20
"""Copies of a context fill at least this much."""
LEARNING = STEPS = 16
"""Steps before the clock starts, in which margins settle, and timed ones."""
HEADS, SIZE = 8, 128
SLOWEST = 1.03
"""Time to that of dense attention that no case may exceed."""
SPARSE = ServingConfig(dense_layers=0, log_steps=0)
EVERY_PAGE = msgspec.structs.replace(SPARSE, budget=1.0, most_share=1.0, calibration_share=0.0)


@click.command("sglang-sparse")
@click.option("--quick", is_flag=True, help="One length and one level.")
@click.option("--page-tokens", type=click.IntRange(4), default=16, show_default=True, help="Of a page.")
@click.option("--keys", "only", type=click.Choice(list(LEVELS)), help="Of this level alone.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, page_tokens: int, only: str | None, json_file: Path | None, seed: int) -> None:
    """Time sparse decode against SGLang's torch backend on one CPU thread.

    Runs in an environment with SGLang (make env-sglang). A claim that does not hold is shown as such; the
    exit status is 0 all the same, since this measures.
    """
    if installed_version() is None:
        raise click.ClickException("SGLang is not installed here: make env-sglang, or pip install sglang")
    console = wide(Console())
    lengths = (8192,) if quick else (8192, 16384, 32768)
    levels = (only,) if only else ("peaky",) if quick else tuple(LEVELS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        with Narrator(console).step("sglang-sparse") as tell:
            for level in levels:
                for tokens in lengths:
                    tell(f"{level}, {tokens:,} tokens")
                    count = LEARNING + STEPS
                    layer = made_up(level, seed=seed, tokens=tokens + count, steps=count, heads=HEADS)
                    rows.append(run_case(level, layer, page_tokens))
    finally:
        torch.set_num_threads(threads)
    report = Report(
        bench="sglang-sparse",
        environment=Environment.detect(seed),
        rows=tuple(rows),
        claims=tuple(claims(rows)),
    )
    report.show(console)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def run_case(level: str, layer: Layer, page_tokens: int) -> dict[str, Any]:
    """Let the sparse backend learn, then time the three in turn on the same queries."""
    stands = Stands(layer, page_tokens)
    for number in range(LEARNING):
        stands.step(stands.sparse, number)
    spent = {name: list[float]() for name in ("stock", "every", "sparse")}
    before = stands.sparse.worker.stats.snapshot()
    for number in range(LEARNING, LEARNING + STEPS):
        for name, times in spent.items():
            times.append(stands.step(getattr(stands, name), number))
    after = stands.sparse.worker.stats.snapshot()
    read, of = (now - was for now, was in zip(after.layer_pages[0], before.layer_pages[0], strict=True))
    dense, every, sparse = (1e3 * median(times) for times in spent.values())
    return {
        "keys": level,
        "tokens": layer.prompt,
        "torch_native ms": dense,
        "every page ms": every,
        "sparse ms": sparse,
        "speed": dense / sparse,
        "speed to every page": every / sparse,
        "mean to dense": sum(spent["sparse"]) / sum(spent["stock"]),
        "pages read": read / of if of else 1.0,
        "mass P10": after.mass_p10,
    }


@dataclass(frozen=True, slots=True)
class _Runner:
    """What backends read of SGLang's model runner."""

    req_to_token_pool: Any
    token_to_kv_pool: Any
    token_to_kv_pool_allocator: Any
    model: torch.nn.Module
    page_size: int
    device: str = "cpu"
    use_mla_backend: bool = False


class Stands:
    """A context several times in one pool of SGLang's, and the backends that read it."""

    def __init__(self, layer: Layer, page_tokens: int) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        from penstock.plugins.sglang import sparse_layers
        from penstock.plugins.sglang.sparse_backend import TacticBackend

        self._layer = layer
        tokens, group = layer.keys.shape[1], layer.queries.shape[2]
        pages = -(-tokens // page_tokens)
        self._copies = max(2, -(-COLD_BYTES // (pages * page_tokens * HEADS * SIZE * 4)))
        size = self._copies * pages * page_tokens
        pool = MHATokenToKVPool(
            size, page_tokens, torch.bfloat16, HEADS, SIZE, 1, "cpu", enable_memory_saver=False
        )
        allocator = PagedTokenToKVPoolAllocator(size, page_tokens, torch.bfloat16, "cpu", pool, False)
        order = torch.randperm(self._copies * pages, generator=torch.Generator().manual_seed(0)) + 1
        slots = (order[:, None] * page_tokens + torch.arange(page_tokens)).view(self._copies, -1)
        for buffer, rows in ((pool.k_buffer[0], layer.keys), (pool.v_buffer[0], layer.values)):
            buffer[slots[:, :tokens]] = rows.transpose(0, 1).bfloat16()[None]
        self._attention = RadixAttention(HEADS * group, SIZE, SIZE**-0.5, HEADS, 0)
        runner = _Runner(
            SimpleNamespace(req_to_token=slots.int()),
            pool,
            allocator,
            torch.nn.ModuleList([self._attention]),
            page_tokens,
        )
        self.stock = TorchNativeAttnBackend(runner)
        # A server's settings say who computes prompts; here nobody does.
        with mock.patch.object(sparse_layers, "attention_backends", return_value=("torch_native", "tactic")):
            self.sparse, self.every = (TacticBackend(runner, config) for config in (SPARSE, EVERY_PAGE))
        self._slots, self._turn = slots, 0
        for backend in (self.sparse, self.every):
            for copy in range(self._copies):
                backend.layers[0].decode.summarise(slots[copy, : layer.prompt : page_tokens] // page_tokens)

    def step(self, backend: Any, number: int) -> float:
        """CPU seconds of one decode of one layer on the next copy; what a pass computes once for all layers
        apart."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self._turn = (self._turn + 1) % self._copies
        tokens = self._layer.prompt + 1 + number
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            encoder_lens=None,
            req_pool_indices=torch.tensor([self._turn]),
            seq_lens=torch.tensor([tokens]),
            out_cache_loc=self._slots[self._turn, tokens - 1 : tokens],
        )
        backend.init_forward_metadata(batch)
        # The layer multiplies by the softmax scale, which these have in them.
        query = (self._layer.queries[number].reshape(1, -1) * SIZE**0.5).bfloat16()
        key, value = (rows[:, tokens - 1].bfloat16()[None] for rows in (self._layer.keys, self._layer.values))
        began = time.thread_time()
        backend.forward_decode(query, key, value, self._attention, batch)
        return time.thread_time() - began


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """What is promised of the time."""
    worst = max(row["mean to dense"] for row in rows)
    yield Claim.of("time to torch_native's, the worst case", worst, "<=", SLOWEST)
