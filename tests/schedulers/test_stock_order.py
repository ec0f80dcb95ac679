"""While no request names a client, every order serves as stock does: a deque."""

from __future__ import annotations

import random
from collections import deque

import pytest

from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.fcfs import ArrivalOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import UNNAMED, Job

LOOKED_UP: list[str] = []


def hits(request_id):
    LOOKED_UP.append(request_id)
    return hash(request_id) % 4096


ORDERS = {
    "dlpm": lambda: DeficitOrder(clock=lambda: 0.0, hit_tokens=hits, quantum_tokens=10),
    "lpm": lambda: PrefixOrder(clock=lambda: 0.0, hit_tokens=hits),
    "vtc": lambda: CounterOrder(clock=lambda: 0.0),
    "fcfs": ArrivalOrder,
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("seed", range(8))
def test_unnamed_requests_are_served_like_a_deque(name, seed):
    rng = random.Random(seed)
    order, stock, running = ORDERS[name](), deque(), []
    LOOKED_UP.clear()
    for number in range(1500):
        action = rng.random()
        if action < 0.4:
            job = Job(f"r{number}", UNNAMED, 512, rng.random(), tuple(range(rng.randrange(9))))
            order.add(job)
            stock.append(job)
        elif action < 0.65 and stock:
            assert order.peek() == stock[0]
            assert order.pop() == stock[0]
            running.append(stock.popleft())
        elif action < 0.75 and running:
            job = running.pop(rng.randrange(len(running)))
            order.put_back(job, preempted=rng.random() < 0.5)
            stock.appendleft(job)
        elif action < 0.8 and stock:
            job = rng.choice(stock)
            assert order.remove(job.request_id) == job
            stock.remove(job)
        elif action < 0.9:
            order.charge_extend(UNNAMED, rng.randrange(1, 900))
            order.charge_output(UNNAMED, 1)
        else:
            order.begin_step()
        assert len(order) == len(stock)
    assert list(order) == list(stock)
    assert LOOKED_UP == []
    order.check_integrity()


@pytest.mark.parametrize("name", ORDERS)
def test_skipped_requests_go_back_in_the_order_they_had(name):
    order = ORDERS[name]()
    jobs = [Job(f"r{number}", UNNAMED, 512, float(number)) for number in range(6)]
    for job in jobs:
        order.add(job)
    skipped = [order.pop() for _ in range(4)]
    for job in reversed(skipped):
        order.put_back(job, preempted=False)
    assert [order.pop() for _ in jobs] == jobs


@pytest.mark.parametrize("name", ORDERS)
def test_charges_add_up_to_service(name):
    rng = random.Random(3)
    order = ORDERS[name]()
    had = {client: [0, 0] for client in (UNNAMED, "ada", "bob")}
    for number in range(300):
        client = rng.choice(list(had))
        order.add(Job(f"r{number}", client, 512, float(number)))
        extend, output = rng.randrange(1, 512), rng.randrange(1, 4)
        order.charge_extend(client, extend)
        order.charge_output(client, output)
        had[client][0] += extend
        had[client][1] += output
    shown = {c.client: c for c in order.clients()}
    for client, (extend, output) in had.items():
        assert (shown[client].extend_tokens, shown[client].output_tokens) == (extend, output)
        assert shown[client].service == extend + 2 * output
    assert sum(c.waiting for c in shown.values()) == len(order) == 300


def test_stock_s_order_keeps_a_bounded_record_that_balances():
    order = ArrivalOrder(max_clients=3)
    for number in range(50):
        order.charge_extend(f"c{number}", number)
        order.check_integrity()
    shown = {c.client: c.extend_tokens for c in order.clients()}
    assert sum(shown.values()) == sum(range(50))
    assert {"c49", "c48", "c47"} <= shown.keys()
    assert len(shown) == 4
