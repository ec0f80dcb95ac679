"""What hashing the moved blocks costs, as a share of the prefill that comes before.

Both sides hash: the sender after the prompt's forward pass, the receiver after the transfer. Hashing is timed
with FlowKV's own digester over memory that is many times the caches. Prefill is bounded from below by
the model's weight products alone, at the rate that torch's matmul reaches on one thread of this machine:
attention, sampling and the engine come on top, so the true share is smaller than the one shown. CPU time is
measured, which other processes do not disturb.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.flowkv_memory import map_pool
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.tiny_model import TinyLlama
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.digest import SAMPLE_EVERY, DramDigester
from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POOL_BYTES = 256 << 20
SIDES = 2
BOUND = 0.01
"""Hashing every block is the default where it costs less than this share of the time to the first token."""
GPU_FLOPS = 400e12
"""Weight products of an 8B model in bf16 on one H100: about 40 % of the data sheet. Assumed, not measured."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What counts for the bound: weights that every token passes, and its KV cache."""

    name: str
    weights: float
    hidden: int
    intermediate: int
    kv_bytes: int
    block_tokens: int


def tiny(spec: TinyLlama | None = None) -> Model:
    """The tiny model without embeddings and head, which prefill needs once a prompt."""
    spec = spec or TinyLlama()
    kv = spec.kv_heads * spec.head_size
    layer = (
        2 * spec.hidden_size**2 + 2 * spec.hidden_size * kv + 3 * spec.hidden_size * spec.intermediate_size
    )
    return Model(
        name="tiny model, float32",
        weights=spec.layers * layer,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        kv_bytes=spec.kv_bytes_per_token,
        block_tokens=32,
    )


LLAMA_8B = Model(
    name="Llama 3.1 8B, bfloat16",
    weights=6.98e9,
    hidden=4096,
    intermediate=14336,
    kv_bytes=128 << 10,
    block_tokens=16,
)


def measure(options: Options, tell: Tell) -> Finding:
    """Both models on this machine; the 8B model's prefill on a GPU by assumption."""
    rows: list[dict[str, Cell]] = []
    claims = []
    for model in (tiny(), LLAMA_8B):
        tell(f"{model.name}: hashing")
        hashing = SIDES * hash_seconds_per_token(model, repeats=3 if options.quick else 9)
        tell(f"{model.name}: matmul")
        prefill = prefill_seconds_per_token(model, tokens=64 if options.quick else 512)
        rows.append(_row(model.name, "this CPU, one thread", hashing, prefill, model.kv_bytes))
        name = f"{model.name}, this CPU: hashing every block, share of prefill"
        claims.append(Claim.of(name, hashing / prefill, "<=", BOUND))
    gpu = 2 * LLAMA_8B.weights / GPU_FLOPS
    rows.append(
        _row(LLAMA_8B.name, "GPU prefill (assumed), blocks hashed here", hashing, gpu, LLAMA_8B.kv_bytes)
    )
    rate = SIDES * LLAMA_8B.kv_bytes / (BOUND * gpu) / 1e9
    default = FlowKVConfig().digest
    notes = [
        f"default: digest={default!r}; sampled hashes one block in {SAMPLE_EVERY}, and the last one",
        f"hashing every block within {BOUND:.0%} of a GPU's prefill ({GPU_FLOPS / 1e12:.0f} TFLOP/s assumed)"
        f" takes {rate:,.0f} GB/s a side: a kernel's work in device memory, not a CPU's",
    ]
    return Finding(rows=rows, claims=claims, notes=notes, draw=lambda axes: draw(axes, rows))


def _row(model: str, where: str, hashing: float, prefill: float, kv_bytes: int) -> dict[str, Cell]:
    return {
        "model": model,
        "prefill on": where,
        "KV bytes a token": kv_bytes,
        "hash GB/s a side": SIDES * kv_bytes / hashing / 1e9,
        "hash us a token, both sides": hashing * 1e6,
        "prefill us a token, at least": prefill * 1e6,
        "share, full": hashing / prefill,
        "share, sampled": hashing / prefill / SAMPLE_EVERY,
    }


def hash_seconds_per_token(model: Model, *, repeats: int) -> float:
    """CPU seconds of one side, the best of ``repeats`` passes over the pool."""
    block = model.kv_bytes * model.block_tokens
    num_blocks = POOL_BYTES // block
    base = map_pool(POOL_BYTES, POOL_BYTES)
    geometry = CacheGeometry(base, POOL_BYTES, num_blocks, strips_of([LayerPages(1, block, block, block)]))
    digester = DramDigester(geometry)
    return _least_cpu(lambda: digester.digests(range(num_blocks)), repeats) / (
        num_blocks * model.block_tokens
    )


def prefill_seconds_per_token(model: Model, *, tokens: int) -> float:
    """CPU seconds of the weight products, from the rate of the model's largest product."""
    import torch

    dtype = torch.float32 if "float32" in model.name else torch.bfloat16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(tokens, model.hidden, dtype=dtype)
        w = torch.randn(model.hidden, model.intermediate, dtype=dtype)
        torch.mm(x, w)
        seconds = _least_cpu(lambda: torch.mm(x, w), 5)
    finally:
        torch.set_num_threads(threads)
    rate = 2 * tokens * model.hidden * model.intermediate / seconds
    return 2 * model.weights / rate


def _least_cpu(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of this thread that ``work`` took."""
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return min(times)


def draw(axes: Axes, rows: list[dict[str, Cell]]) -> None:
    """Shares beside the bound."""
    labels = [f"{row['model']}\n{row['prefill on']}" for row in rows]
    for offset, kind in ((-0.2, "share, full"), (0.2, "share, sampled")):
        shares = [float(row[kind] or 0) * 100 for row in rows]
        axes.barh([i + offset for i in range(len(rows))], shares, height=0.35, label=kind)
    axes.axvline(BOUND * 100, color="grey", linewidth=1)
    axes.set(xlabel="hashing on both sides, % of prefill at the least", xscale="log")
    axes.set_yticks(range(len(rows)), labels)
    axes.legend()
