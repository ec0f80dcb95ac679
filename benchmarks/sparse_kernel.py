"""``penstock bench sparse-kernel``: what sparse decode costs on vLLM's CPU kernel, and what mass it attains.

One layer in the shape of Llama 3.1 8B runs dense and sparse in turn, selection and metadata included, at
lengths below the activation length too. The context stands several times in the cache and every step takes
the next copy, so that no step finds its keys in a processor's cache; blocks of a copy are in random order, as
in a pool that has been used. Time is CPU time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Claim, Environment, Report
from penstock.benchmarks.sparse_build import GOALS, build_claims, build_row
from penstock.benchmarks.sparse_keys import LEVELS, Layer, made_up
from penstock.benchmarks.tiny_model import ensure_model
from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.page_choice import exact_log_masses, page_shares
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.kernels.sparse.serving import ServingConfig

COLD_BYTES = 256 * 2**20
"""Copies of a context fill at least this much, so that none is in a cache when its turn comes."""
LEARNING = 24
"""Steps before the clock starts: margins settle and summaries are taken."""
BUDGET = 1 / 8
"""Of the pages, in the rows that say what selection costs whatever it finds."""
PROMPT_TOKENS = 4096
SLOWEST = 1.03
"""Time to that of dense attention that no case may exceed."""


@dataclass(frozen=True, slots=True)
class Case:
    """One context."""

    level: str
    tokens: int
    mass: float
    block_tokens: int
    steps: int
    seed: int
    budget: float | None = None
    """Share of the pages that each head reads; None for as many as have the mass."""
    drafts: int = 0
    """Query rows besides the first: those of the steps before."""
    prompt_rows: int = 0
    """Rows of a prompt of ``PROMPT_TOKENS`` in the same step."""
    estimate: bool = True
    """Whether pages that are not read are estimated."""


@click.command("sparse-kernel")
@click.option("--quick", is_flag=True, help="Two lengths and one level, under a minute.")
@click.option("--block-tokens", type=click.IntRange(32), default=32, show_default=True, help="Of a page.")
@click.option("--keys", "only", type=click.Choice(list(LEVELS)), help="Of this level alone.")
@click.option("--mass", default=0.9, show_default=True, help="P.")
@click.option(
    "--drafts", type=click.IntRange(0, 16), default=0, help="Query rows a request besides the first."
)
@click.option(
    "--prompt-rows",
    type=click.IntRange(0, PROMPT_TOKENS),
    default=0,
    help=f"Rows of a prompt, at the end of {PROMPT_TOKENS} tokens, in the same step.",
)
@click.option("--estimate/--no-estimate", default=True, help="Estimate pages that are not read.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option("--seed", default=0, show_default=True)
def bench(
    quick: bool,
    block_tokens: int,
    only: str | None,
    mass: float,
    drafts: int,
    prompt_rows: int,
    estimate: bool,
    json_file: Path | None,
    seed: int,
) -> None:
    """Time sparse decode against stock's on one CPU thread, with the mass that it attains.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    console = wide(Console())
    lengths = (4096, 16384) if quick else (4096, 8192, 16384, 32768)
    levels = (only,) if only else ("peaky",) if quick else tuple(LEVELS)
    from penstock.plugins.vllm.sparse_attention import enable

    enable()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        with Narrator(console).step("sparse-kernel") as tell:
            for level in levels:
                for tokens in lengths:
                    layer = made_up(
                        level, seed=seed, tokens=tokens + 2 * LEARNING, steps=2 * LEARNING, heads=8
                    )
                    tell(f"{level}, {tokens} tokens")
                    for budget in (None, BUDGET):
                        about = (level, tokens, mass, block_tokens, LEARNING, seed, budget)
                        case = Case(*about, drafts, prompt_rows, estimate)
                        rows.append(run_case(case, layer))
            builds = []
            for tokens in (8192,) if quick else GOALS:
                tell(f"index of {tokens} tokens")
                builds.append(build_row(tokens, block_tokens, seed))
    finally:
        torch.set_num_threads(threads)
    report = Report(
        bench="sparse-kernel",
        environment=Environment.detect(seed),
        rows=(*rows, *builds),
        claims=(*claims(rows), *build_claims(builds)),
    )
    report.show(console)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def run_case(case: Case, layer: Layer) -> dict[str, Any]:
    """Learn, then time steps in pairs, dense and sparse on the same copy."""
    stands = Stands(case, layer)
    first = layer.prompt + 1
    for number in range(LEARNING):
        stands.step(stands.sparse, number, first + number)
    stands.record()
    dense: list[float] = []
    sparse: list[float] = []
    shares: list[float] = []
    masses: list[float] = []
    errors: list[float] = []
    for number in range(LEARNING, LEARNING + case.steps):
        dense.append(stands.step(stands.dense, number, first + number))
        exact = stands.output
        # The next copy: dense attention has just warmed this one.
        sparse.append(stands.step(stands.sparse, number, first + number))
        errors.append(float(((stands.output - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()))
        pages = stands.recorder.pages_read
        shares.append(1.0 if pages is None else float(pages.float().mean()))
        masses += stands.attained(number, first + number)
    masses.sort()
    return {
        "keys": case.level,
        "budget": case.budget,
        "P": case.mass if case.budget is None else None,
        "tokens": case.tokens,
        **({"rows": 1 + case.drafts} if case.drafts else {}),
        **({"prompt rows": case.prompt_rows} if case.prompt_rows else {}),
        "dense ms": 1e3 * median(dense),
        "sparse ms": 1e3 * median(sparse),
        "choice ms": 1e3 * median(stands.recorder.seconds[-case.steps :]),
        "speed": median(dense) / median(sparse),
        "mean to dense": sum(sparse) / sum(dense),
        "pages read": sum(shares) / len(shares),
        "attained": sum(mass >= case.mass for mass in masses) / len(masses),
        "mass P10": masses[len(masses) // 10],
        "output error": sum(errors) / len(errors),
    }


class Stands:
    """A context several times in one cache, and the two layers that read it."""

    def __init__(self, case: Case, layer: Layer) -> None:
        self._layer = layer
        heads, tokens, size = layer.keys.shape
        pages = -(-tokens // case.block_tokens)
        each = pages * case.block_tokens * heads * size * 4
        self.copies = max(2, -(-COLD_BYTES // each))
        shape = Shape(
            heads=heads * layer.queries.shape[2],
            kv_heads=heads,
            head_size=size,
            block_tokens=case.block_tokens,
            blocks=self.copies * pages,
        )
        model = str(ensure_model())
        self.dense = AttentionRig(model, shape, "CPU_ATTN")
        self.sparse = AttentionRig(
            model,
            shape,
            "CUSTOM",
            {
                "mass": case.mass,
                "least_tokens": 1,
                "log_steps": 0,
                "budget": case.budget,
                "estimate_rest": case.estimate,
            },
            drafts=case.drafts,
        )
        self._case = case
        self._prompt = torch.randn(case.prompt_rows, *self.dense.query_shape).bfloat16()
        self.sparse.cache = self.dense.cache
        order = torch.randperm(shape.blocks, generator=torch.Generator().manual_seed(case.seed))
        self._tables = order.view(self.copies, pages).tolist()
        self._turn = 0
        keys, values = (rows.transpose(0, 1).bfloat16().contiguous() for rows in (layer.keys, layer.values))
        for table in self._tables:
            self.dense.write(keys, values, table)

    def step(self, rig: AttentionRig, number: int, tokens: int) -> float:
        """CPU seconds of one decode step of one layer on the next copy; stock's own metadata apart, which an
        engine builds once for all layers."""
        self._turn = (self._turn + 1) % self.copies
        case, table = self._case, self._tables[self._turn]
        rows = 1 + case.drafts
        if case.prompt_rows:
            # The prompt is the beginning of the context, as far as it goes: its keys need not make sense.
            prompt = min(PROMPT_TOKENS, tokens)
            metadata = rig.metadata([table, table], [tokens, prompt], [rows, case.prompt_rows])
        else:
            metadata = rig.metadata([table], [tokens], [rows])
        query = torch.cat([*map(self._query, self._steps(number)), self._prompt])
        began = time.thread_time()
        found = rig.attend(query, metadata)
        took = time.thread_time() - began
        self.output = found[:rows].float()
        """Of the last step, without the rows of a prompt: [rows, Hq, D]."""
        return took

    def record(self) -> None:
        """Note from here on what the sparse layer reads; every copy is summarised before, as timed apart."""
        full = self._layer.prompt // self.sparse.shape.block_tokens
        for table in self._tables:
            self.sparse.impl.decode.summarise(torch.tensor(table[:full]))
        self.recorder = Recorder(self.sparse.impl.decode)
        self.sparse.impl.decode = self.recorder

    def attained(self, number: int, tokens: int) -> list[float]:
        """The mass that the pages of the last step have for each query head, by exact scores; with drafts,
        for those of every row, in the context of the first."""
        drafts, pages = self._case.drafts, self.recorder.pages_read
        # [rows, H, G, D] as [H, rows * G, D].
        query = self._layer.queries[self._steps(number)].transpose(0, 1).flatten(1, 2)
        tokens -= drafts
        if pages is None:
            return [1.0] * query[..., 0].numel()
        size = self.sparse.shape.block_tokens
        short = pages.shape[1] * size - tokens
        keys = torch.nn.functional.pad(self._layer.keys[:, :tokens], (0, 0, 0, short))
        paged = keys.unflatten(1, (pages.shape[1], size))
        exact = page_shares(exact_log_masses(query, paged, size - short))
        found: list[float] = (exact * pages[:, None]).sum(-1).flatten().tolist()
        return found

    def _steps(self, number: int) -> list[int]:
        """Whose queries are the rows of step ``number``."""
        return [max(0, before) for before in range(number - self._case.drafts, number + 1)]

    def _query(self, number: int) -> torch.Tensor:
        query = self._layer.queries[number]
        # The layer multiplies by the softmax scale, which these have in them.
        return (query.flatten(0, 1)[None] * query.shape[-1] ** 0.5).bfloat16()


class Recorder:
    """Chooses as ``decode`` does, and keeps the last choice."""

    def __init__(self, decode: PagedDecode) -> None:
        self._decode = decode
        self.pages_read: torch.Tensor | None = None
        self.seconds: list[float] = []

    def read(self, query: torch.Tensor, blocks: torch.Tensor, tokens: int, block_tokens: int) -> Read:
        """``PagedDecode.read``."""
        began = time.thread_time()
        choice = self._decode.choose(query, blocks, tokens, block_tokens)
        self.seconds.append(time.thread_time() - began)
        self.pages_read = None if choice is None else choice.pages
        return self._decode.reading(choice, blocks, tokens - (len(blocks) - 1) * block_tokens)


def claims(rows: Sequence[dict[str, Any]]) -> Iterator[Claim]:
    """What is promised of the mass and of the time."""
    floating = [row for row in rows if row["budget"] is None]
    active = [row for row in floating if row["tokens"] >= ServingConfig().least_tokens]
    worst = max(row["mean to dense"] for row in active)
    yield Claim.of(
        "time to dense attention's, the worst case that is sparse by default", worst, "<=", SLOWEST
    )
    least = min(row["attained"] for row in floating)
    yield Claim.of("share of query heads and steps that attain P, the worst case", least, ">=", 0.95)
    for tokens, goal in ((16384, 3.0), (32768, 5.0)):
        here = [row for row in rows if row["tokens"] == tokens]
        fixed = [row["speed"] for row in here if row["budget"] is not None]
        if fixed:
            name = f"speed at {tokens} tokens and {BUDGET:g} of the pages, the worst case"
            yield Claim.of(name, min(fixed), ">=", goal)
        if tokens == 32768 and here:
            share = max(row["choice ms"] / row["dense ms"] for row in here)
            yield Claim.of(f"choice of pages at {tokens} tokens to dense attention", share, "<=", 0.08)
