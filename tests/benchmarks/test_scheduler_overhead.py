"""The bench of overhead: real schedulers under one load, steps told apart by what they admit."""

from __future__ import annotations

import gc
from itertools import islice

import pytest

pytest.importorskip("vllm")

from msgspec import structs
from vllm.v1.request import Request

from penstock.benchmarks import scheduler_engine
from penstock.benchmarks import scheduler_overhead as overhead
from penstock.benchmarks.scheduler_engine import Load, arrivals

SMALL = Load(
    running=4, waiting=20, clients=3, prompt_blocks=4, shared_blocks=2, output_tokens=(3, 9), pool_blocks=128
)
WITH_TARGETS = Load(
    running=4,
    waiting=20,
    clients=3,
    prompt_blocks=4,
    shared_blocks=2,
    output_tokens=(3, 9),
    pool_blocks=128,
    targets_ms=overhead.TARGETS_MS,
)


@pytest.fixture(scope="module")
def times():
    return overhead.compare(SMALL, 40, "dlpm")


def test_every_side_makes_the_same_number_of_steps_and_serves_its_load(times):
    assert times.keys() == {"dlpm", overhead.TOLD, overhead.STOCK}
    for found in times.values():
        assert len(found.steps) == 40
        assert all(found.of(kind) for kind in overhead.KINDS)
    assert times["dlpm"].arrivals_us
    assert times[overhead.STOCK].arrivals_us
    assert gc.isenabled()


def test_stock_that_is_told_the_order_admits_the_same_requests_in_the_same_steps(times):
    def admissions(side):
        return [step.admitted for step in times[side].steps]

    assert admissions(overhead.TOLD) == admissions("dlpm")
    assert times[overhead.TOLD].cached_tokens == times["dlpm"].cached_tokens


def test_the_bare_adapter_steps_as_stock_does():
    times = overhead.compare(SMALL, 20, "fcfs")
    assert [step.admitted for step in times["fcfs"].steps] == [
        step.admitted for step in times[overhead.STOCK].steps
    ]


def test_targets_are_planned_for():
    assert overhead.compare(WITH_TARGETS, 20, "slo").keys() == {"slo", overhead.STOCK}
    with overhead.quiet():
        engine = overhead.stepped("slo", WITH_TARGETS)
        overhead.make_steps(engine, overhead.Times(), 40)
    counters = engine.scheduler.planner.counters
    assert counters.plans > 0 == counters.passive


def test_a_row_says_what_is_added_and_a_claim_takes_the_worst(times):
    rows = [overhead.row_of("dlpm", clients, times) for clients in (1, 9)]
    steps, stock = (
        [one.cpu_ms for one in times[side].steps if not one.admitted] for side in ("dlpm", overhead.STOCK)
    )
    assert rows[0]["decode: steps"] == len(steps)
    assert min(steps) <= rows[0]["decode: ms"] + 0.001
    assert rows[0]["decode: stock ms"] <= max(stock) + 0.001
    both = [[one.cpu_ms for one in times[side].steps] for side in ("dlpm", overhead.STOCK)]
    means = [sum(side) / len(side) for side in both]
    assert rows[0]["mean beyond stock ms"] == pytest.approx(means[0] - means[1], abs=0.001)
    parts = rows[0]["mean own ms"] + rows[0]["mean order alone ms"]
    assert parts == pytest.approx(rows[0]["mean beyond stock ms"], abs=0.002)
    rows[1]["decode: own ms"] = 99.0
    worst = {claim.name: claim for claim in overhead.claims_of(rows)}
    own_work = worst["dlpm: most ms added to the critical path of a step that admits nobody, its own work"]
    assert own_work.value == 99.0
    assert not own_work.holds
    assert len(worst) == 6


def test_an_aged_load_is_the_same_and_made_in_another_order(monkeypatch):
    made = []

    def request(name, *args, **kwargs):
        made.append(name)
        return Request(name, *args, **kwargs)

    monkeypatch.setattr(scheduler_engine, "Request", request)
    names, orders = {}, {}
    for aged in (False, True):
        stream = arrivals(structs.replace(SMALL, aged=aged))
        names[aged] = [(r.request_id, r.max_tokens, r.block_hashes) for r in islice(stream, 30)]
        orders[aged] = made.copy()
        made.clear()
    assert names[False] == names[True]
    assert orders[False] == [name for name, *_ in names[False]]
    first = SMALL.running + SMALL.waiting
    assert sorted(orders[True][:first]) == sorted(orders[False][:first])
    assert orders[True][:first] != orders[False][:first]
    assert orders[True][first:] == orders[False][first:]


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
