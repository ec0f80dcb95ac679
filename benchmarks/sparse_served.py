"""``penstock bench sparse-served``: tokens a second of stock ``vllm serve``, dense and with sparse attention.

Both servers run one model on one thread each. A context grows in both prefix caches from length to length, so
that prefill costs once; then each pair of requests decodes after another token, and the servers take turns of
a few tokens. The model has random weights and attention as wide as it is told to be, on runs of topics as
text has them: flat, where nothing can be saved and sparse attention has to step aside, and peaky, where it
should win. All of its layers may be sparse, as all but two of a deep model are.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console

from penstock.benchmarks import parts as parted
from penstock.benchmarks.decode_pairs import Between, Decoded, cache_context, decode_in_turns
from penstock.benchmarks.flowkv_part import Finding, Options, Tell
from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.scrape import by_label, samples
from penstock.benchmarks.servers import Engine, engine_server, serving
from penstock.benchmarks.tiny_model import SPECIAL_TOKENS, TinyLlama, ensure_model
from penstock.kernels.sparse.serving import ServingConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from penstock.benchmarks.processes import Server

LEVELS = {"flat": 0.65, "peaky": 4.0}
"""Standard deviation of attention logits over unlike tokens."""
LENGTHS = (4096, 8192, 16384, 32768)
QUICK_LENGTHS = (4096, 8192)
SLOWEST = 0.97
"""Least ratio of sparse to dense speed."""
SERVING = ServingConfig(dense_layers=0)
BLOCK_TOKENS = 32
TOPICS = 96
RUN_TOKENS = 16
WARM_UP = 2
"""Requests to each server before the clock starts: summaries are taken and margins settle."""


class ServedOptions(Options, frozen=True, kw_only=True):
    """Choices of the person who runs the bench."""

    levels: tuple[str, ...] = tuple(LEVELS)
    lengths: tuple[int, ...] = LENGTHS
    pairs: int = 12
    decoded: int = 32
    """Tokens of an answer."""


class Case(msgspec.Struct, frozen=True):
    """What one level and length gave."""

    level: str
    tokens: int
    dense: list[Decoded]
    sparse: list[Decoded]
    told: dict[str, Cell]
    """What the sparse server exports about itself."""

    @property
    def speed(self) -> Between:
        """Sparse tokens a second over dense ones, of pairs."""
        return Between.of([b.tokens_s / a.tokens_s for a, b in zip(self.dense, self.sparse, strict=True)])

    @property
    def cpu(self) -> Between:
        """Dense CPU time a token over sparse one, of pairs."""
        return Between.of([a.cpu_ms / b.cpu_ms for a, b in zip(self.dense, self.sparse, strict=True)])

    def cells(self) -> dict[str, Cell]:
        """A row of the report."""
        row: dict[str, Cell] = {"keys": self.level, "tokens": self.tokens}
        for name, of in (("tok/s", "tokens_s"), ("CPU ms", "cpu_ms")):
            for way in ("dense", "sparse"):
                row[f"{name} {way}"] = Between.of([getattr(one, of) for one in getattr(self, way)]).median
        for name, ratio in (("speed", self.speed), ("CPU", self.cpu)):
            row |= {name: ratio.median, f"{name}, from": ratio.low, f"{name}, to": ratio.high}
        return row | self.told


@click.command("sparse-served")
@click.option("--quick", is_flag=True, help="4k and 8k tokens, few pairs; still starts four servers.")
@click.option("--keys", "levels", type=click.Choice(list(LEVELS)), multiple=True, help="Of these alone.")
@click.option(
    "--tokens",
    "lengths",
    type=click.IntRange(1024, 131_072),
    multiple=True,
    help=f"Of a context; may be given more than once.  [default: {', '.join(map(str, LENGTHS))}]",
)
@click.option("--pairs", type=click.IntRange(1), help="Of requests.  [default: 12, 6 with --quick]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("sparse.svg"),
    show_default=True,
    help="Plot; 'served' goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
def bench(
    quick: bool,
    levels: tuple[str, ...],
    lengths: tuple[int, ...],
    pairs: int | None,
    json_file: Path | None,
    plot_file: Path,
    seed: int,
) -> None:
    """Compare the decode speed of two real vLLM servers, dense and sparse.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    options = ServedOptions(
        quick=quick,
        seed=seed,
        levels=levels or tuple(LEVELS),
        lengths=tuple(sorted(set(lengths))) or (QUICK_LENGTHS if quick else LENGTHS),
        pairs=pairs or (6 if quick else 12),
    )
    modules = {"served": __name__}
    console = parted.wide(Console())
    parted.run("sparse", modules, options, console, json_file=json_file, plot_file=plot_file)


def measure(options: ServedOptions, tell: Tell) -> Finding:
    """Every level, a pair of servers each."""
    cases = [case for level in options.levels for case in _level(level, options, tell)]
    return Finding(
        rows=[case.cells() for case in cases],
        claims=claims(cases),
        draw=lambda axes: draw(axes, cases),
    )


def _level(level: str, options: ServedOptions, tell: Tell) -> Iterator[Case]:
    # Imported here, the needle's torch is not needed for --help.
    from penstock.benchmarks.needle.served import sparse_engine

    spec = TinyLlama(
        layers=3,
        heads=16,
        kv_heads=8,
        head_size=128,
        max_positions=2 * max(options.lengths),
        spread=0.02,
        embedding_spread=1.0,
        attention_spread=LEVELS[level],
    )
    room = max(options.lengths) + options.decoded + BLOCK_TOKENS
    plain = Engine(
        model=str(ensure_model(spec)),
        name="dense",
        block_size=BLOCK_TOKENS,
        max_model_len=room,
        kv_blocks=room // BLOCK_TOKENS + 16,
        # One context of three layers in bfloat16 takes 400 MiB at 32k tokens.
        kv_cache_gib=1 + max(options.lengths) // 65_536,
        arguments=("--dtype", "bfloat16"),
    )
    engines = (plain, msgspec.structs.replace(sparse_engine(plain, SERVING), name="sparse"))
    with tempfile.TemporaryDirectory(prefix="penstock-served-") as logs:
        dense, sparse = (engine_server(engine, Path(logs)) for engine in engines)
        with serving([dense, sparse], progress=lambda name, age: tell(f"waiting for {name}, {age:.0f} s")):
            duel = Duel(dense, sparse, plain.model, options.decoded, options.seed)
            for tokens in options.lengths:
                yield duel.case(level, tokens, options.pairs, tell)


class Duel:
    """Both servers, and the context that they share so far."""

    def __init__(self, dense: Server, sparse: Server, model: str, decoded: int, seed: int) -> None:
        self._servers = {"dense": dense, "sparse": sparse}
        self._model, self._decoded = model, decoded
        self._random = random.Random(seed)
        self._seed = seed
        self._cached = 0

    def case(self, level: str, tokens: int, pairs: int, tell: Tell) -> Case:
        """Grow the context to ``tokens``, then decode in pairs."""
        context = topic_tokens(tokens, self._seed)
        tell(f"{level}, {tokens:,} tokens: prefill")
        grow = partial(cache_context, model=self._model, context=context, begin=self._cached)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(grow, self._servers.values()))
        self._cached = tokens
        found: dict[str, list[Decoded]] = {way: [] for way in self._servers}
        before = _counted(self._servers["sparse"])
        for number in range(-WARM_UP, pairs):
            tell(f"{level}, {tokens:,} tokens: pair {number + 1} of {pairs}")
            # Another last token makes another answer; with it, the prompt has one more than whole blocks.
            prompt = [*context, _topic(self._random)]
            ways = sorted(self._servers, reverse=bool(number % 2))
            ones = decode_in_turns([self._servers[way] for way in ways], self._model, prompt, self._decoded)
            for way, one in zip(ways, ones, strict=True):
                if number >= 0:
                    found[way].append(one)
        told = told_since(before, _counted(self._servers["sparse"]))
        mass = by_label(self._servers["sparse"].url, "penstock_sparse_attained_mass", "quantile")
        told |= {"mass P10": mass.get("0.1"), "mass P50": mass.get("0.5")}
        return Case(level, tokens, found["dense"], found["sparse"], told)


def topic_tokens(tokens: int, seed: int) -> list[int]:
    """Token ids in runs of one of ``TOPICS``, which change with probability 1 / ``RUN_TOKENS`` a token; a
    longer list begins with a shorter one."""
    drawn = random.Random(f"topics {seed}")
    found = [_topic(drawn)]
    while len(found) < tokens:
        found.append(_topic(drawn) if drawn.random() < 1 / RUN_TOKENS else found[-1])
    return found


def _topic(drawn: random.Random) -> int:
    return len(SPECIAL_TOKENS) + drawn.randrange(TOPICS)


def _counted(server: Server) -> dict[str, float]:
    """Totals of the sparse server, dense selections by reason."""
    found = {
        name.removeprefix("penstock_sparse_"): value
        for name, value in samples(server.url).items()
        if name.startswith("penstock_sparse_")
    }
    reasons = by_label(server.url, "penstock_sparse_dense_selections", "reason")
    return found | {f"dense: {reason}": count for reason, count in reasons.items()}


def told_since(before: dict[str, float], after: dict[str, float]) -> dict[str, Cell]:
    """Cells of what the server counted between two looks, warm-up included."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    pages, chosen = grown("pages"), grown("selections")
    reasons = sorted(name for name in after if name.startswith("dense: ") and grown(name))
    return {
        "chosen": chosen,
        "read": grown("pages_read") / pages if pages else None,
        "each ms": 1e3 * grown("selection_seconds") / chosen if chosen else None,
        "index s": grown("index_seconds"),
        "dense": ", ".join(f"{name.removeprefix('dense: ')} {grown(name):.0f}" for name in reasons) or None,
    }


def claims(cases: Sequence[Case]) -> list[Claim]:
    """No slower anywhere, by the clock and by CPU time."""
    found = []
    for case in cases:
        at = f"{case.level} keys, {case.tokens:,} tokens"
        found.append(Claim.of(f"{at}: tokens a second to dense", case.speed.median, ">=", SLOWEST))
        found.append(Claim.of(f"{at}: dense CPU time a token to sparse", case.cpu.median, ">=", SLOWEST))
    return found


def draw(axes: Axes, cases: Sequence[Case]) -> None:
    """Ratios by length, with their intervals."""
    for number, level in enumerate(dict.fromkeys(case.level for case in cases)):
        mine = [case for case in cases if case.level == level]
        for name, ratios, style in (
            ("tokens a second", [case.speed for case in mine], "o-"),
            ("CPU time", [case.cpu for case in mine], "x--"),
        ):
            middle = [ratio.median for ratio in ratios]
            around = (
                [ratio.median - ratio.low for ratio in ratios],
                [ratio.high - ratio.median for ratio in ratios],
            )
            axes.errorbar(
                [case.tokens for case in mine],
                middle,
                around,
                fmt=style,
                color=f"C{number}",
                capsize=3,
                label=f"{level}, {name}",
            )
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("sparse, times as fast as dense")
    axes.legend(fontsize="small")
