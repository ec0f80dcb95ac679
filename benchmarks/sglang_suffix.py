"""``penstock bench sglang-suffix``: passes that answers take, with suffixes and with SGLang's own n-grams.

SGLang's own corpus of n-grams is the peer, asked and told in the way that its worker does it, one request
after the other. Outputs are known, so that what a verification accepts is what is right: nothing here runs a
language model.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from penstock.benchmarks.draft_texts import KINDS, texts
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Cell, Claim, Environment, Report
from penstock.plugins.sglang.suffix_settings import BRANCHES
from penstock.plugins.sglang.suffix_texts import BatchTexts, Row
from penstock.schedulers.suffix.config import SuffixConfig

WIDTHS = (8, 12)
"""Positions of a request in a verification: the default of SUFFIX, and that of NGRAM."""


class Drafts(NamedTuple):
    """One request's positions ``[width]``, their ancestors ``[width, width]``, and whether they are verified
    at all."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    verified: bool


Propose = Callable[[str, list[int], list[int]], Drafts]
"""Drafts of a request by its name, prompt and output so far."""


@dataclass(slots=True)
class Replayed:
    """What texts took with one drafter."""

    passes: int = 0
    verified: int = 0
    tokens: int = 0
    spent_ns: int = 0

    def cells(self) -> dict[str, Cell]:
        """Of a row of the report."""
        return {
            "tokens a pass": self.tokens / self.passes,
            "verified passes": self.verified / self.passes,
            "µs a pass": self.spent_ns / self.passes / 1e3,
        }


@click.command("sglang-suffix")
@click.option("--quick", is_flag=True, help="Few texts, a few seconds.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, json_file: Path | None, seed: int) -> None:
    """Measure drafts for SGLang's verification beside SGLang's own n-grams.

    Runs in an environment with SGLang (make env-sglang), whose n-grams are compiled and need g++ and ninja. A
    claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if find_spec("sglang") is None:
        raise click.ClickException("SGLang's n-grams are the peer: make env-sglang, or pip install sglang")
    console = wide(Console())
    rows: list[dict[str, Cell]] = []
    with Narrator(console).step("sglang-suffix") as tell:
        for width in WIDTHS:
            for kind in KINDS:
                for drafter, make in DRAFTERS.items():
                    tell(f"{width} positions, {kind}, {drafter}")
                    found = replay(make(width), kind, 8 if quick else 60, seed)
                    rows.append({"width": width, "text": kind, "drafter": drafter, **found.cells()})
    report = Report(
        bench="sglang-suffix",
        environment=Environment.detect(seed),
        rows=tuple(rows),
        claims=tuple(claims(rows)),
    )
    report.show(console)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """What is promised of drafts from suffixes: no text takes more passes than with n-grams."""
    brought = {(row["width"], row["text"], row["drafter"]): float(row["tokens a pass"] or 0) for row in rows}
    return [
        Claim.of(
            f"{kind}, {width} positions: tokens a pass, suffix trees to n-grams",
            brought[width, kind, "suffix, trees"] / brought[width, kind, "SGLang's n-grams"],
            ">=",
            1.0,
        )
        for width in WIDTHS
        for kind in KINDS
    ]


def replay(propose: Propose, kind: str, number: int, seed: int) -> Replayed:
    """Verify drafts of ``number`` texts to their ends."""
    found = Replayed()
    for index, (prompt, output) in enumerate(texts(kind, number, seed)):
        done = 1
        while done < len(output):
            begin = time.thread_time_ns()
            drafts = propose(f"r{index}", prompt, output[:done])
            found.spent_ns += time.thread_time_ns() - begin
            right = accepted(drafts, output[done:]) if drafts.verified else 0
            found.passes += 1
            found.verified += drafts.verified
            done = min(done + right + 1, len(output))
        found.tokens += len(output) - 1
    return found


def accepted(drafts: Drafts, output: list[int]) -> int:
    """Draft tokens that are right, along the tree that the mask says."""
    last = int(drafts.tokens[0])
    paths = {tuple(drafts.tokens[ancestors].tolist()) for ancestors in drafts.mask}
    right = 0
    while right < len(output) and (last, *output[: right + 1]) in paths:
        right += 1
    return right


def suffix_drafts(width: int, branches: int, *, always: bool = False) -> Propose:
    """Ours, one drafter for all texts; ``always`` verified, as where graphs of verifications are captured or
    there is somebody with a likely draft in each pass."""
    batch = BatchTexts(SuffixConfig(), width, branches)

    def propose(name: str, prompt: list[int], output: list[int]) -> Drafts:
        found = batch.drafts([Row(name, prompt, output, [])])
        return Drafts(found.tokens[0], found.mask[0], always or found.worthwhile)

    return propose


def ngram_drafts(width: int) -> Propose:
    """SGLang's, with its defaults."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    sizes = ("max_trie_depth", "min_bfs_breadth", "max_bfs_breadth", "match_type", "capacity")
    defaults = {size: parser.get_default(f"speculative_ngram_{size}") for size in sizes}
    depth = defaults["max_trie_depth"]
    corpus = NgramCorpus(**defaults, draft_token_num=width)

    def propose(name: str, prompt: list[int], output: list[int]) -> Drafts:
        corpus.synchronize()
        tail = [*prompt, *output][-depth:]
        tokens, mask = corpus.batch_get([name], [tail], [len(prompt) + len(output)])
        corpus.batch_put([tail])
        return Drafts(tokens, mask.reshape(width, width).astype(np.bool_), verified=True)

    return propose


DRAFTERS: dict[str, Callable[[int], Propose]] = {
    "SGLang's n-grams": ngram_drafts,
    "suffix, trees": lambda width: suffix_drafts(width, BRANCHES, always=True),
    "suffix, trees if likely": lambda width: suffix_drafts(width, BRANCHES),
    "suffix, chains": lambda width: suffix_drafts(width, 1, always=True),
}
