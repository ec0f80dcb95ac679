"""The bench of overhead: real schedulers under one load, steps told apart by what they admit."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("vllm")

from penstock.benchmarks import scheduler_overhead as overhead
from penstock.benchmarks.scheduler_engine import Load, arrivals

SMALL = Load(
    running=4, waiting=20, clients=3, prompt_blocks=4, shared_blocks=2, output_tokens=(3, 9), pool_blocks=128
)


@pytest.fixture(scope="module")
def times():
    return overhead.compare(SMALL, 40)


def test_every_side_makes_the_same_number_of_steps_and_serves_its_load(times):
    assert times.keys() == set(overhead.SIDES)
    for found in times.values():
        assert sum(map(len, found.by_admissions.values())) == 40
        assert set(found.by_admissions) >= {0, 1}
        assert found.arrivals
    assert gc.isenabled()


def test_the_bare_adapter_steps_as_stock_does(times):
    def kinds(side):
        return {admitted: len(spent) for admitted, spent in times[side].by_admissions.items()}

    assert kinds(overhead.ADAPTER) == kinds(overhead.STOCK)


def test_a_row_says_what_is_added_to_stock_and_a_claim_takes_the_worst(times):
    rows = [overhead.row_of(side, clients, times) for clients in (1, 9) for side in overhead.SIDES]
    assert all(row["decode: extra ms"] == 0 for row in rows if row["scheduler"] == overhead.STOCK)
    rows[2]["decode: extra ms"] = 99.0
    worst = {claim.name: claim for claim in overhead.claims_of(rows)}
    assert worst["dlpm: most ms added to a step that admits nobody"].value == 99.0
    assert not worst["dlpm: most ms added to a step that admits nobody"].holds
    assert len(worst) == 2 * len(overhead.POLICIES)


def test_a_load_is_the_same_for_everybody_and_clients_share_what_they_should():
    one, other = arrivals(SMALL), arrivals(SMALL)
    sample = [next(one) for _ in range(12)]
    assert [r.block_hashes for r in sample] == [next(other).block_hashes for _ in range(12)]
    by_client = {}
    for request in sample:
        by_client.setdefault(request.sampling_params.extra_args["client_id"], []).append(request.block_hashes)
    for hashes in by_client.values():
        assert len({tuple(h[:2]) for h in hashes}) == 1
        assert len({h[2] for h in hashes}) == len(hashes)
