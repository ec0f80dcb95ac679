"""The bench's pools tell what SGLang's allocators did, the same requests through both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from penstock.benchmarks import sglang_prefixes
from penstock.benchmarks.flowkv_part import Options
from penstock.benchmarks.servers import console_script
from penstock.benchmarks.sglang_pages import APART, FLOWKV, MOONCAKE, NIXL, SIDES, claims_of, ways
from penstock.benchmarks.sglang_pools import PAGE, Diverged, Pool, Sent, hand_overs
from penstock.benchmarks.sglang_prefixes import STOCK, Hits, Run
from penstock.simulation.traces import replay

PREFILL, DECODE = 2_000, 1_400


def test_both_allocators_serve_the_same_requests_from_pages_of_their_own():
    sent, pair = hand_overs(replay(None, 3), 20, 10, prefill_pages=PREFILL, decode_pages=DECODE)
    assert len(sent) == 10
    assert pair.prefill.differences == pair.decode.differences == 0
    for one in sent:
        sizes = [[(len(s), len(t)) for s, t in chunks] for chunks in (one.stock, one.flowkv)]
        assert sizes[0] == sizes[1]
        for chunks in (one.stock, one.flowkv):
            for pool, side in ((PREFILL, 0), (DECODE, 1)):
                pages = [page for chunk in chunks for page in chunk[side]]
                assert len(set(pages)) == len(pages)
                assert set(pages) <= set(range(1, pool + 1))


def test_a_difference_between_the_allocators_is_told(monkeypatch):
    pool = Pool(4)
    monkeypatch.setattr(pool._all[1], "alloc_extend", lambda *args: None)
    with pytest.raises(Diverged):
        pool.extend(([], []), 0, PAGE)
    assert pool.differences == 1


def test_ways_count_what_they_say():
    chunks = [([1, 2, 3, 7], [5, 6, 9, 10]), ([8], [11])]
    by_name = {way.name: way.of(Sent(chunks, chunks)) for way in ways()}
    assert by_name[NIXL] == 5 * SIDES
    assert by_name[MOONCAKE] == by_name[APART] == 4 * SIDES
    assert by_name[FLOWKV] == 4


def test_claims_fail_where_they_should():
    counts = {NIXL: [190], MOONCAKE: [19], FLOWKV: [10], APART: [10]}
    assert [claim.holds for claim in claims_of(counts, 1)] == [False] * 4
    assert [claim.holds for claim in claims_of({**counts, FLOWKV: [9], APART: [9]}, 0)] == [True] * 4


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
