"""The bench's pools tell what SGLang's allocators did, the same requests through both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from penstock.benchmarks import sglang_prefixes
from penstock.benchmarks.flowkv_part import Options
from penstock.benchmarks.servers import console_script
from penstock.benchmarks.sglang_pages import APART, MOONCAKE, NIXL, SIDES, claims_of, ways
from penstock.benchmarks.sglang_pools import (
    FLOWKV,
    NO_SPARE,
    NO_SPARE_PAIRED,
    PAGE,
    STOCK,
    Served,
    extend,
    make_allocator,
    pages_of,
    serve,
)
from penstock.benchmarks.sglang_prefixes import Hits, Run
from penstock.connectors.runs import runs_of
from penstock.simulation.traces import replay

PREFILL, DECODE = 2_000, 1_400


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Served]]:
    """A small pair, worn by the same requests under each allocator."""
    return {
        name: [serve(name, replay(None, 3), 12, 8, prefill_pages=PREFILL, decode_pages=DECODE)]
        for name in {way.allocator for way in ways()}
    }


def test_every_pair_serves_the_same_requests_from_pages_of_its_own(runs: dict[str, list[Served]]):
    stock = runs[STOCK][0]
    assert len(stock.hand_overs) == 8
    assert stock.cached_tokens > 0
    for (served,) in runs.values():
        assert served.granted == stock.granted
        assert served.prompt_tokens == stock.prompt_tokens
        for chunks, stock_s in zip(served.hand_overs, stock.hand_overs, strict=True):
            for pool, side in ((PREFILL, 0), (DECODE, 1)):
                pages = [page for chunk in chunks for page in chunk[side]]
                assert len(set(pages)) == len(pages) == sum(len(chunk[side]) for chunk in stock_s)
                assert set(pages) <= set(range(1, pool + 1))


def test_pairing_breaks_prefill_s_runs_where_decode_s_break():
    def breaks(name: str) -> set[int]:
        allocator = make_allocator(name, 20)
        whole = extend(allocator, torch.tensor([], dtype=torch.int64), 20 * PAGE)
        assert whole is not None
        by_page = sorted(whole.tolist())
        # Holes of six and of ten pages, and decode has runs of six and of ten.
        for first, stop in ((1, 7), (10, 20)):
            allocator.free(torch.tensor(by_page[first * PAGE : stop * PAGE]))
        if name == NO_SPARE_PAIRED:
            allocator.pair_with(runs_of([*range(6), *range(10, 20)]))
        found = extend(allocator, torch.tensor([], dtype=torch.int64), 16 * PAGE)
        assert found is not None
        pages = pages_of(found)
        return {at for at in range(1, 16) if pages[at] != pages[at - 1] + 1}

    assert breaks(NO_SPARE_PAIRED) == {6}
    assert breaks(NO_SPARE) == {10}


def test_ways_count_what_they_say():
    chunks = [([1, 2, 3, 7], [5, 6, 9, 10]), ([8], [11])]
    by_name = {way.name: way.count(chunks) for way in ways()}
    assert by_name[NIXL] == 5 * SIDES
    assert by_name[MOONCAKE] == by_name[APART] == 4 * SIDES
    assert by_name[FLOWKV] == 4


def test_claims_fail_where_they_should():
    """Pages that stand alone, so that grouping changes nothing, and FlowKV moves as many as are given."""

    def served(pieces: int, cached: int, *granted: bool) -> list[Served]:
        pages = list(range(0, 2 * pieces, 2))
        return [Served([[(pages, pages)]], 1000, cached, [], list(granted))]

    def claims(stock: list[Served], ours: list[Served]) -> list[bool]:
        runs = {way.allocator: stock if way.allocator == STOCK else ours for way in ways()}
        return [claim.holds for claim in claims_of(DECODE, runs)]

    assert claims(served(10, 500, True, False), served(5, 490, True, True)) == [True] * 5
    assert claims(served(10, 500, True), served(6, 489, False)) == [True, True, False, False, False]
    assert claims(served(1, 500), served(4, 500)) == [False, True, False, True, True]


def test_the_radix_cache_gives_as_much_on_flowkv_s_allocator_as_on_stock_s(tmp_path: Path):
    file = tmp_path / "found.json"
    command = [console_script("penstock"), "bench", "sglang-flowkv", "--quick", "--parts", "prefixes"]
    subprocess.run([*command, "--json", str(file)], check=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [claim["holds"] for claim in found["claims"]] == [True, True]
    assert {row["allocator"] for row in found["rows"]} == {STOCK, sglang_prefixes.FLOWKV}
    assert all(row["from the cache"] > 0 for row in found["rows"])


def test_a_cache_that_gives_less_or_is_never_full_fails_the_claims():
    def run(allocator: str, cached: int, evicted: int) -> tuple[Run, Hits]:
        hits = Hits(
            prompt_tokens=1000, cached_tokens=cached, hit_rate=0.0, evicted_tokens=evicted, decisions=""
        )
        return Run("chat", allocator, 0, Options()), hits

    for ours, evicted, holds in (
        (500, 100, [True, True]),
        (489, 100, [False, True]),
        (500, 99, [True, False]),
    ):
        results = [run(STOCK, 500, 100), run(sglang_prefixes.FLOWKV, ours, evicted)]
        assert [claim.holds for claim in sglang_prefixes.claims_of(results)] == holds
