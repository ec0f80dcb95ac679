"""One layer in the shape of Llama 3.1 8B decodes for several samples of one prompt: stock's kernel and ours.

Requests stand several times in the cache and every step takes the next copy, so that no step finds what it
reads in a processor's cache but for what it has read itself, as the second sample of a prompt finds the
prefix; blocks are in random order, as in a pool that has been used. Time is CPU time of one thread: a layer's
attention and, of what describes a step, the share of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import torch

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.tiny_model import ensure_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLD_BYTES = 192 * 2**20
"""Copies fill at least this much, so that none is in a cache when its turn comes."""
LAYERS = 32
"""That share one description of a step."""
SLOWEST = 1.03
"""Time to stock's that no case may exceed."""
FASTER = 1.16
"""Speed to stock's of many samples; FlashInfer's paper: 13.7 to 17.4 % of inter-token latency, on GPUs."""
WARM_UP = 2


class Case(msgspec.Struct, frozen=True):
    """``samples`` that share ``prefix`` tokens, each with up to ``tail`` of its own."""

    samples: int
    prefix: int
    tail: int
    steps: int
    block_tokens: int = 128

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.samples} samples of {self.prefix:,} tokens, tails of {self.tail}"


class Timed(msgspec.Struct, frozen=True):
    """Milliseconds of each step, in pairs."""

    case: Case
    stock: list[float]
    ours: list[float]
    planning: list[float]
    """Of a step, what describing it takes longer than stock's."""
    shared: bool
    """Whether it was, or stock's kernel served it."""

    @property
    def ratio(self) -> float:
        """Ours to stock's, of medians."""
        return median(self.ours) / median(self.stock)

    def cells(self) -> dict[str, Cell]:
        """A row of the report."""
        return {
            "samples": self.case.samples,
            "prefix": self.case.prefix,
            "tails": self.case.tail,
            "shared": self.shared,
            "stock ms": median(self.stock),
            "ours ms": median(self.ours),
            "speed": 1 / self.ratio,
            "planning ms": median(self.planning),
        }


def cases(quick: bool) -> list[Case]:
    """Shapes, smallest first; those at the end share too little, or nothing."""
    if quick:
        shapes = [
            (2, 2048, 64),
            (8, 2048, 256),
            (64, 2048, 64),
            (2, 8192, 256),
            (8, 8192, 256),
            (8, 256, 512),
        ]
        return [Case(*shape, steps=7) for shape in shapes]
    shapes = [
        (samples, prefix, tail)
        for prefix in (2048, 8192, 32768)
        for samples in (2, 8, 16, 64)
        for tail in (64, 512)
    ]
    little = [(2, 128, 512), (8, 128, 512), (8, 0, 512), (64, 0, 64), (2, 0, 4096)]
    return [Case(*shape, steps=7 if shape[0] * shape[1] < 500_000 else 3) for shape in (*shapes, *little)]


def measure(options: Options, tell: Tell) -> Finding:
    """Every case, on one thread."""
    from penstock.plugins.vllm.shared_prefix import enable

    enable()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timed = []
    try:
        for case in cases(options.quick):
            tell(case.label)
            timed.append(run_case(case, options.seed))
    finally:
        torch.set_num_threads(threads)
    return Finding(
        rows=[one.cells() for one in timed], claims=claims(timed), draw=lambda axes: draw(axes, timed)
    )


def run_case(case: Case, seed: int) -> Timed:
    """Time pairs of steps, stock's and ours, each on the next copy."""
    generator = torch.Generator().manual_seed(seed)
    first, own = case.prefix // case.block_tokens, -(-case.tail // case.block_tokens)
    each = first + case.samples * own
    shape = Shape(block_tokens=case.block_tokens)
    block_bytes = 4 * case.block_tokens * shape.kv_heads * shape.head_size
    copies = max(2, -(-COLD_BYTES // (each * block_bytes)))
    shape = Shape(block_tokens=case.block_tokens, blocks=copies * each)
    model = str(ensure_model())
    stock = AttentionRig(model, shape, "CPU_ATTN")
    ours = AttentionRig(model, shape, "CUSTOM", {"log_steps": 0}, section="shared_prefix_attention")
    ours.cache = stock.cache.normal_(generator=generator)
    order = torch.randperm(shape.blocks, generator=generator).view(copies, each).tolist()
    tables = [
        [[*blocks[:first], *blocks[first + k * own : first + (k + 1) * own]] for k in range(case.samples)]
        for blocks in order
    ]
    # Tails of other lengths in every sample, none longer than said.
    shorts = torch.randint(max(1, case.tail // 2), (case.samples,), generator=generator).tolist()
    tokens = [case.prefix + case.tail - short for short in shorts]
    queries = torch.randn(case.samples, *stock.query_shape, generator=generator).bfloat16()
    times: dict[str, list[float]] = {"stock": [], "ours": [], "planning": []}
    for step in range(-WARM_UP, case.steps):
        found = {}
        for number, (way, rig) in enumerate((("stock", stock), ("ours", ours))):
            copy = tables[(2 * step + number) % copies]
            found[way], found[f"{way} described"] = _step(rig, queries, copy, tokens)
        if step >= 0:
            times["stock"].append(found["stock"])
            times["ours"].append(found["ours"])
            times["planning"].append(found["ours described"] - found["stock described"])
    shared = ours.builder._worker.stats.steps > 0
    return Timed(case, times["stock"], times["ours"], times["planning"], shared)


def _step(
    rig: AttentionRig, queries: torch.Tensor, tables: Sequence[Sequence[int]], tokens: Sequence[int]
) -> tuple[float, float]:
    """CPU milliseconds of a layer, and of describing the step, which is a tensor of tables by then."""
    common = rig.common(tables, tokens, [1] * len(tables))
    began = time.thread_time()
    metadata = rig.builder.build(0, common)
    described = time.thread_time()
    rig.attend(queries, metadata)
    done = time.thread_time()
    return 1e3 * (done - described + (described - began) / LAYERS), 1e3 * (described - began)


def claims(timed: Sequence[Timed]) -> list[Claim]:
    """Never slower; faster where several share a long prefix."""
    worst = max(timed, key=lambda one: one.ratio)
    found = [Claim.of(f"time to stock's, the worst case ({worst.case.label})", worst.ratio, "<=", SLOWEST)]
    for prefix in dict.fromkeys(one.case.prefix for one in timed):
        many = [one for one in timed if one.case.prefix == prefix >= 2048 and one.case.samples >= 8]
        if many:
            name = f"speed to stock's of 8 samples and more of {prefix:,} tokens, the worst case"
            found.append(Claim.of(name, min(1 / one.ratio for one in many), ">=", FASTER))
    return found


def draw(axes: Axes, timed: Sequence[Timed]) -> None:
    """Speed by samples, a line for each prefix and tail."""
    shared = [one for one in timed if one.case.prefix >= 2048]
    for prefix, tail in dict.fromkeys((one.case.prefix, one.case.tail) for one in shared):
        mine = [one for one in shared if (one.case.prefix, one.case.tail) == (prefix, tail)]
        axes.plot(
            [one.case.samples for one in mine],
            [1 / one.ratio for one in mine],
            "o-",
            label=f"{prefix:,} tokens, tails of {tail}",
        )
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("samples that share a prefix")
    axes.set_ylabel("attention of a layer, times as fast as stock's")
    axes.legend(fontsize="small")
