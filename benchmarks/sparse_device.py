"""``penstock bench sparse --device cuda``: decode attention of one layer on a GPU, sparse and dense in the
same run.

The shape is that of Llama 3.1 8B. Each request has the same made-up context in blocks of its own, in random
order. Dense peers are FlashInfer's paged decode where it is installed, torch's attention over contiguous
keys, and this package's own kernel over lists of all pages. Calls are captured in a CUDA graph, one call a
graph, and timed by events; plans of the host are made before and not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from penstock.benchmarks.report import Claim
from penstock.benchmarks.sparse_keys import Layer, made_up
from penstock.kernels.sparse.calibration import with_margin
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.choose import ReadLists
from penstock.kernels.triton.decode import decode_parts, merge_parts
from penstock.kernels.triton.step import SparseStep, StepShape
from penstock.kernels.triton.summaries import Summaries, summarise_blocks

LENGTHS, BATCHES = (32_768, 131_072), (1, 4, 16)
LEVEL = "mid"
REPEATS = 20
WORKSPACE_BYTES = 256 * 2**20
Rows = list[dict[str, Any]]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of requests of equal length."""

    batch: int
    tokens: int
    mass: float = 0.9
    block_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16


def measure(mass: float, seed: int, tell: Callable[[str], None], *, quick: bool) -> tuple[Rows, list[Claim]]:
    """Rows and claims of all cases on the current CUDA device."""
    device = torch.device("cuda")
    copying = copy_speed(device)
    rows: Rows = []
    for tokens in LENGTHS[:1] if quick else LENGTHS:
        layer = made_up(LEVEL, seed=seed, tokens=tokens, steps=1, heads=8)
        for batch in BATCHES[:1] if quick else BATCHES:
            tell(f"{batch} x {tokens} tokens")
            rows.append(Stand(Case(batch, tokens, mass), layer, device).row(copying))
    return rows, list(claims(rows))


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """What is promised of time, mass and bandwidth."""
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        best = max(row["speed"] for row in rows if row["tokens"] == tokens)
        goal = 5.0 if tokens >= LENGTHS[-1] else 1.0
        yield Claim.of(f"speed over the fastest dense peer at {tokens} tokens, best batch", best, ">=", goal)
    yield Claim.of("share of query heads that attain P", min(row["attained"] for row in rows), ">=", 0.95)
    least = min(row["of copy speed"] for row in rows)
    yield Claim.of("bytes a second of the attention alone, to those of a copy, worst case", least, ">=", 0.7)


class Stand:
    """Requests of one case in a paged cache, and the ways to attend over them."""

    def __init__(self, case: Case, layer: Layer, device: torch.device) -> None:
        self.case, self.device = case, device
        _, self.heads, self.group, self.size = layer.queries.shape
        self.pages = -(-case.tokens // case.block_tokens)
        self.cache, self.table = self._filled(layer)
        self.scale = self.size**-0.5
        # The kernels multiply by the softmax scale, which these queries have in them.
        query = (layer.queries[-1] / self.scale).flatten(0, 1).to(device, case.dtype)
        self.query = query.expand(case.batch, -1, -1).contiguous()
        self.lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=device)
        self.counts = self.lengths // case.block_tokens
        config = ServingConfig(mass=case.mass, least_tokens=0)
        asked = with_margin(case.mass, config.margin + config.spare_margin)
        self.wanted = torch.tensor([asked], device=device)
        shape = StepShape(case.batch, self.heads, self.group, self.size, self.pages)
        self.index = Summaries.empty(self.cache, max(1, case.block_tokens // config.summary_tokens))
        self.rounds = config.summary_rounds
        self.step = SparseStep(
            config, shape, self.cache, tail_pages=config.recent_tokens // case.block_tokens + 2,
            processors=_processors(device),
        )  # fmt: skip
        self.out = torch.empty_like(self.query)

    def _filled(self, layer: Layer) -> tuple[PagedCache, torch.Tensor]:
        size, tokens = self.case.block_tokens, self.case.tokens
        count = self.case.batch * self.pages
        memory = torch.zeros(
            count, self.heads, size, 2 * self.size, dtype=self.case.dtype, device=self.device
        )
        cache = PagedCache(*(part.transpose(1, 2) for part in memory.chunk(2, -1)))
        table = torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(self.case.batch, -1)
        place = torch.arange(tokens)
        for row in table:
            where = row[place // size].to(self.device), (place % size).to(self.device)
            for part, source in ((cache.keys, layer.keys), (cache.values, layer.values)):
                rows = source[:, :tokens].transpose(0, 1)
                part[where] = rows.to(self.device, self.case.dtype)
        return cache, table.int().to(self.device)

    def row(self, copying: float) -> dict[str, Any]:
        """Times in milliseconds, the mass, and what the attention alone reads a second beside a copy."""
        blocks = self.table.flatten()
        build = timed(lambda: summarise_blocks(self.cache, blocks, self.index, self.rounds), self.device)
        self.sparse()
        masses = self.masses()
        read = self.read_bytes()
        peers = {name: timed(call, self.device) for name, call in self.dense().items()}
        sparse, alone = timed(self.sparse, self.device), timed(self.attend, self.device)
        pages = self.step.reads.taken.float().mean().item()
        return {
            "batch": self.case.batch,
            "tokens": self.case.tokens,
            **{f"{name} ms": 1e3 * took for name, took in peers.items()},
            "sparse ms": 1e3 * sparse,
            "speed": min(peers.values()) / sparse,
            "pages read": pages,
            "attained": (masses >= self.case.mass).float().mean().item(),
            "attention alone ms": 1e3 * alone,
            "of copy speed": read / alone / copying,
            "index ms": 1e3 * build,
        }

    def sparse(self) -> torch.Tensor:
        """One sparse step."""
        return self.step.run(
            self.query, self.cache, self.index, self.table, self.lengths, self.counts, self.wanted, self.out
        )

    def attend(self, reads: ReadLists | None = None) -> torch.Tensor:
        """The attention over ``reads``, by default what the last step chose, without choice and estimate."""
        step, parts = self.step, self.step.parts.first(self.step.splits)
        decode_parts(
            self.query, self.cache, reads or step.reads, self.scale, parts,
            unit_tokens=self.case.block_tokens, splits=step.splits,
        )  # fmt: skip
        merge_parts(parts, self.heads, self.out, step.lse)
        return self.out

    def masses(self) -> torch.Tensor:
        """Exact masses of what the last step read, for each query head: float32 [B, H, G]."""
        found = []
        taken = self.step.reads.taken.view(self.case.batch, self.heads, -1).bool()
        for request, row in enumerate(self.table.long()):
            keys = self.cache.keys[row].flatten(0, 1)[: self.case.tokens].float()
            query = self.query[request].float().unflatten(0, (self.heads, -1)) * self.scale
            shares = torch.einsum("hgd,nhd->hgn", query, keys).softmax(-1)
            read = taken[request].repeat_interleave(self.case.block_tokens, 1)[:, : self.case.tokens]
            found.append((shares * read[:, None]).sum(-1))
        return torch.stack(found)

    def read_bytes(self) -> int:
        """Keys and values that the last step read, in bytes."""
        tokens = int(self.step.reads.lengths.sum())
        return tokens * 2 * self.size * self.cache.keys.element_size()

    def dense(self) -> dict[str, Call]:
        """Dense peers by name."""
        batch, tokens = self.case.batch, self.case.tokens
        order = self.table.long()
        keys, values = (
            part[order].flatten(1, 2)[:, :tokens].transpose(1, 2).contiguous()
            for part in (self.cache.keys, self.cache.values)
        )
        query = self.query[:, :, None]
        everything = ReadLists.empty(batch * self.heads, self.group, self.pages, self.device)
        everything.entries.copy_(self.table.repeat_interleave(self.heads, 0))
        everything.lengths.fill_(tokens)
        peers: dict[str, Call] = {
            "torch": lambda: torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, enable_gqa=True
            ),
            "all pages": lambda: self.attend(everything),
        }
        if (flashinfer := self._flashinfer()) is not None:
            peers["flashinfer"] = flashinfer
        return peers

    def _flashinfer(self) -> Call | None:
        try:
            import flashinfer
        except ImportError:
            return None
        batch = self.case.batch
        # It reads [blocks, N, H, D] that lie together, which a slice of vLLM's memory does not.
        cache = self.cache.keys.contiguous(), self.cache.values.contiguous()
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * self.pages
        last = torch.full_like(self.lengths, self.case.tokens - (self.pages - 1) * self.case.block_tokens)
        wrapper.plan(
            bounds, self.table.flatten(), last, self.heads * self.group, self.heads, self.size,
            self.case.block_tokens, q_data_type=self.case.dtype, kv_data_type=self.case.dtype,
        )  # fmt: skip
        return lambda: wrapper.run(self.query, cache)


def timed(call: Call, device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of ``call``: replays of a CUDA graph between events, or wall time on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    took = []
    for _ in range(repeats + 2):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        took.append(first.elapsed_time(last) / 1e3)
    return median(took[2:])


def copy_speed(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes: what this device's memory gives at best."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timed(lambda: target.copy_(source), device)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
