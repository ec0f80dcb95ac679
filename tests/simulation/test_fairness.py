"""The fairness meter against hand-worked steps and a slow reference."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from scripted_engine import ask

from penstock.simulation.engine import Step, StepRow
from penstock.simulation.fairness import FairnessMeter
from penstock.simulation.records import Row, Served
from penstock.simulation.step_time import Load


def step(extends, waiting, *, outputs=None, cached=None, seconds=1.0):
    """One step in which client ``c`` computes ``extends[c]`` tokens and generates ``outputs[c]``."""
    rows, tokens = [], {}
    for client, extend in extends.items():
        one = Served(ask(f"r-{client}", prompt=max(extend, 1), output=10, client=client), extend)
        rows.append(StepRow(one, Row(f"r-{client}", 0, extend), extend, (cached or {}).get(client, 0)))
        tokens[f"r-{client}"] = (outputs or {}).get(client, 0)
    return Step(0.0, seconds, Load(0, 0, 0, 0), rows, tokens, waiting)


BOTH = {"a": 1, "b": 1}


def test_service_is_extend_tokens_and_twice_the_output():
    meter = FairnessMeter(["a", "b"])
    meter.stepped(step({"a": 100, "b": 10}, {}, outputs={"b": 7}))
    assert meter.service.tolist() == [100, 24]


def test_only_steps_that_all_clients_wait_through_count_for_jain():
    meter = FairnessMeter(["a", "b"])
    meter.stepped(step({"a": 999}, BOTH))
    meter.stepped(step({"a": 100, "b": 300}, BOTH, cached={"a": 200}, seconds=2.0))
    meter.stepped(step({"a": 999}, {"a": 1, "b": 0}))
    assert meter.backlogged_s == 2.0
    assert meter.jain_extend() == pytest.approx(0.8)
    assert meter.jain_input() == pytest.approx(1.0)


def test_a_weight_is_the_share_that_is_due():
    meter = FairnessMeter(["a", "b"], [1.0, 3.0])
    for _ in range(2):
        meter.stepped(step({"a": 100, "b": 300}, BOTH))
    assert meter.jain_service() == pytest.approx(1.0)
    assert meter.largest_gap == 0.0


def test_the_largest_batch_is_what_one_steps_requests_cost_in_all():
    meter = FairnessMeter(["a", "b"])
    meter.stepped(step({"a": 100, "b": 50}, BOTH))
    meter.stepped(step({"a": 1}, BOTH))
    assert meter.largest_batch == 150 + 2 * 20


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_the_largest_difference_over_any_common_backlog(seed):
    rng = random.Random(seed)
    clients = ["a", "b", "c"]
    meter = FairnessMeter(clients)
    history, waits = [dict.fromkeys(clients, 0)], [dict.fromkeys(clients, False)]
    for _ in range(60):
        extends = {client: rng.randrange(100) for client in clients}
        waiting = {client: int(rng.random() < 0.8) for client in clients}
        meter.stepped(step(extends, waiting))
        history.append({client: history[-1][client] + extends[client] for client in clients})
        waits.append({client: bool(waiting[client]) for client in clients})
    largest = 0
    for f, g in combinations(clients, 2):
        for begin in range(len(history)):
            for end in range(begin, len(history)):
                if not (waits[end][f] and waits[end][g] and waits[begin][f] and waits[begin][g]):
                    break
                of = {c: history[end][c] - history[begin][c] for c in (f, g)}
                largest = max(largest, abs(of[f] - of[g]))
    assert meter.largest_gap == largest
