"""Tokens a second of stock ``vllm serve`` for samples of one prompt, sharing it and not.

Both servers run one model of random weights on one thread each. A prompt stands in both prefix caches; then
as many requests as there are samples decode after it at once, and the servers take turns (``decode_pairs``).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from penstock.benchmarks.decode_pairs import Between, Decoded, cache_context, decode_in_turns
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import SPECIAL_TOKENS, TinyLlama, ensure_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 8
LENGTHS = (2048, 8192)
DECODED = 24
"""Tokens of a sample."""
BLOCK_TOKENS = 128
VOCABULARY = 1000
SLOWEST = 0.97
"""Least ratio of speeds."""


class Case(msgspec.Struct, frozen=True):
    """What one length gave, in pairs."""

    tokens: int
    stock: list[Decoded]
    ours: list[Decoded]
    saved: float
    """Share of block reads, as the server exports it."""

    def ratio(self, of: str) -> Between:
        """Speed to stock's: ``of`` is ``tokens_s`` or ``cpu_ms``."""
        pairs = [(getattr(a, of), getattr(b, of)) for a, b in zip(self.stock, self.ours, strict=True)]
        return Between.of([b / a if of == "tokens_s" else a / b for a, b in pairs])

    def cells(self) -> dict[str, Cell]:
        """A row of the report."""
        row: dict[str, Cell] = {"samples": SAMPLES, "prompt": self.tokens, "saved": self.saved}
        for name, of in (("tok/s", "tokens_s"), ("CPU ms", "cpu_ms")):
            for way in ("stock", "ours"):
                row[f"{name} {way}"] = Between.of([getattr(one, of) for one in getattr(self, way)]).median
            ratio = self.ratio(of)
            row |= {f"{name} times": ratio.median, f"{name} from": ratio.low, f"{name} to": ratio.high}
        return row


def measure(options: Options, tell: Tell) -> Finding:
    """Every length, on one pair of servers."""
    cases = list(_cases(options, tell))
    return Finding(
        rows=[case.cells() for case in cases], claims=claims(cases), draw=lambda axes: draw(axes, cases)
    )


def _cases(options: Options, tell: Tell) -> Iterator[Case]:
    spec = TinyLlama(layers=3, heads=16, kv_heads=8, head_size=128, max_positions=16_384, spread=0.02)
    room = max(LENGTHS) + DECODED + 2 * BLOCK_TOKENS
    plain = Engine(
        model=str(ensure_model(spec)),
        name="stock",
        block_size=BLOCK_TOKENS,
        max_model_len=room,
        kv_blocks=room // BLOCK_TOKENS + 4 * SAMPLES,
        arguments=("--dtype", "bfloat16"),
    )
    flag = "--shared-prefix-attention=cascade"
    sharing = msgspec.structs.replace(plain, name="ours", arguments=(*plain.arguments, flag))
    drawn = random.Random(options.seed)
    context = [len(SPECIAL_TOKENS) + drawn.randrange(VOCABULARY) for _ in range(max(LENGTHS))]
    with tempfile.TemporaryDirectory(prefix="penstock-shared-") as logs:
        servers = [engine_server(engine, Path(logs)) for engine in (plain, sharing)]
        with serving(servers, progress=lambda name, age: tell(f"waiting for {name}, {age:.0f} s")):
            begin = 0
            for tokens in LENGTHS:
                tell(f"{tokens:,} tokens: prefill")
                grow = partial(cache_context, model=plain.model, context=context[:tokens], begin=begin)
                with ThreadPoolExecutor(2) as pool:
                    list(pool.map(grow, servers))
                begin = tokens
                before = samples(servers[1].url)
                found: list[list[Decoded]] = [[], []]
                pairs = 4 if options.quick else 8
                for number in range(-1, pairs):
                    tell(f"{tokens:,} tokens: pair {number + 1} of {pairs}")
                    prompt = [*context[:tokens], len(SPECIAL_TOKENS) + drawn.randrange(VOCABULARY)]
                    order = [0, 1] if number % 2 else [1, 0]
                    turns = decode_in_turns(
                        [servers[which] for which in order], plain.model, prompt, DECODED, SAMPLES
                    )
                    for which, one in zip(order, turns, strict=True):
                        if number >= 0:
                            found[which].append(one)
                yield Case(tokens, found[0], found[1], _saved(before, samples(servers[1].url)))


def _saved(before: dict[str, float], after: dict[str, float]) -> float:
    """Share of block reads that were saved between two looks."""
    blocks, read = (
        after.get(name, 0.0) - before.get(name, 0.0)
        for name in ("penstock_shared_prefix_blocks", "penstock_shared_prefix_blocks_read")
    )
    return 1 - read / blocks if blocks else 0.0


def claims(cases: Sequence[Case]) -> list[Claim]:
    """No slower anywhere, by the clock and by CPU time."""
    return [
        Claim.of(f"{case.tokens:,} tokens, {SAMPLES} samples: {name}", case.ratio(of).median, ">=", SLOWEST)
        for case in cases
        for name, of in (("tokens a second to stock's", "tokens_s"), ("stock's CPU time to ours", "cpu_ms"))
    ]


def draw(axes: Axes, cases: Sequence[Case]) -> None:
    """Ratios by length, with their intervals."""
    for name, of, style in (("tokens a second", "tokens_s", "o-"), ("CPU time", "cpu_ms", "x--")):
        ratios = [case.ratio(of) for case in cases]
        middle = [ratio.median for ratio in ratios]
        around = (
            [ratio.median - ratio.low for ratio in ratios],
            [ratio.high - ratio.median for ratio in ratios],
        )
        axes.errorbar([case.tokens for case in cases], middle, around, fmt=style, capsize=3, label=name)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(f"{SAMPLES} samples, times as fast as stock")
    axes.legend(fontsize="small")
