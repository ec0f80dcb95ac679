"""Random operations on DLPM, LPM and VTC, pick for pick against models that scan lists.

Times, weights and rates are dyadic, so that sums are exact in whatever order they are made.
"""

from __future__ import annotations

import math
import random

import pytest
from scanned_models import ALL, CounterModel, DeficitModel, Model

from penstock.schedulers.accounts import OTHERS
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import UNNAMED, Job


class Traffic:
    """One seed's random operations, made on an order and on its model alike."""

    CLIENTS = (UNNAMED, "ada", "bob", "cyd", "dee", "eve", "fay")

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.hit: dict[str, int] = {}
        self.now = 0.0
        self.running: list[Job] = []
        self.charged: dict[str, int] = {}
        self.accepted: set[str] = set()
        self.ended: list[str] = []
        self.service: dict[str, list[int]] = {}
        self.share = {client: self.random.choice((0.5, 1.0, 1.0, 4.0)) for client in self.CLIENTS}

    def clock(self):
        return self.now

    def hits(self, request_id):
        return self.hit[request_id]

    def run(self, order, model, operations=400):
        for number in range(operations):
            step = self.random.choices(
                (self.arrive, self.serve, self.charge, self.begin, self.put_back, self.leave, self.turn),
                (36, 24, 24, 10, 8, 4, 6),
            )[0]
            step(order, model, number)
            assert len(order) == len(model.waiting)
            if number % 8 == 0:
                order.check_integrity()
                self.check_accounts(order, model)
        waiting = [w.job.request_id for w in model.waiting]
        assert sorted(job.request_id for job in order) == sorted(waiting)
        running = [job.request_id for job in self.running]
        assert sorted([*waiting, *running, *self.ended]) == sorted(self.accepted)

    def arrive(self, order, model, number):
        client = self.random.choice(self.CLIENTS)
        weight = self.share[client] if self.random.random() < 0.9 else self.random.choice((0.5, 2.0))
        job = Job(f"r{number}", client, 4096, self.now, weight=weight)
        self.hit[job.request_id] = self.random.choice((0, 0, 128, 256, 1024, 2048))
        self.accepted.add(job.request_id)
        order.add(job)
        model.add(job)

    def serve(self, order, model, number):
        if not model.waiting:
            with pytest.raises(IndexError):
                order.peek()
            return
        if self.random.random() < 0.3:
            assert order.peek() == model.peek()
            if self.random.random() < 0.5:
                return
        job = order.pop()
        assert job == model.pop()
        self.running.append(job)

    def charge(self, order, model, number):
        if not self.running:
            return
        client = self.random.choice(self.running).client
        had = self.service.setdefault(client, [0, 0])
        if self.random.random() < 0.5:
            extend = self.random.randrange(1, 4000)
            if self.random.random() < 0.2 and self.charged.get(client):
                extend = -self.random.randrange(1, self.charged[client] + 1)
            self.charged[client] = self.charged.get(client, 0) + extend
            order.charge_extend(client, extend)
            model.charge(client, extend)
            had[0] += extend
        else:
            output = self.random.randrange(1, 64)
            order.charge_output(client, output)
            model.charge(client, 2 * output)
            had[1] += output

    def begin(self, order, model, number):
        self.charged.clear()
        order.begin_step()
        model.begin_step()

    def put_back(self, order, model, number):
        if self.running:
            job = self.running.pop(self.random.randrange(len(self.running)))
            preempted = self.random.random() < 0.5
            order.put_back(job, preempted=preempted)
            model.put_back(job, preempted=preempted)

    def leave(self, order, model, number):
        waiting = [w.job.request_id for w in model.waiting]
        if waiting and self.random.random() < 0.5:
            gone = self.random.choice(waiting)
            assert order.remove(gone).request_id == gone
            model.remove(gone)
            self.ended.append(gone)
        elif self.running:
            self.ended.append(self.running.pop(0).request_id)

    def turn(self, order, model, number):
        """Time passes, and the cache changes."""
        self.now += self.random.randrange(0, 64) / 8
        for request_id in self.random.sample(sorted(self.hit), k=len(self.hit) // 3):
            self.hit[request_id] = self.random.choice((0, 128, 512, 1024, 4096))

    def check_accounts(self, order, model):
        clients = {c.client: c for c in order.clients()}
        assert {name: c.standing for name, c in clients.items()} == self.standings(model)
        assert {name: c.waiting for name, c in clients.items()} == {n: len(model.of(n)) for n in clients}
        assert sum(c.extend_tokens for c in clients.values()) == sum(e for e, _ in self.service.values())
        assert sum(c.output_tokens for c in clients.values()) == sum(o for _, o in self.service.values())
        assert all(c.service == c.extend_tokens + 2 * c.output_tokens for c in clients.values())

    @staticmethod
    def standings(model):
        return dict.fromkeys(model.level, 0.0) if type(model) is Model else model.level


class ForeseenTraffic(Traffic):
    """The same, where running requests reserve output. Ended ones generated what is expected, so that the
    model need not learn it."""

    EXPECTED = 40

    def __init__(self, seed):
        super().__init__(seed)
        self.reserved: dict[str, int] = {}
        self.over: set[str] = set()

    def serve(self, order, model, number):
        before = len(self.running)
        super().serve(order, model, number)
        for job in self.running[before:]:
            generated = self.random.choice((0, 0, 0, 16, 64))
            tokens = order.reserve_output(job.client, generated, self.random.choice((8, 1000)))
            if model.account(job.client) != OTHERS:
                assert 0 <= tokens <= max(0, self.EXPECTED - generated)
            self.reserved[job.request_id] = tokens
            model.expect(job.client, 2 * tokens)

    def charge(self, order, model, number):
        if not self.running or self.random.random() < 0.5:
            super().charge(order, model, number)
            return
        job = self.random.choice(self.running)
        output = self.random.randrange(1, 64)
        foreseen = min(output, self.reserved[job.request_id])
        self.reserved[job.request_id] -= foreseen
        order.charge_output(job.client, output, foreseen)
        model.charge(job.client, 2 * output, 2 * foreseen)
        self.service.setdefault(job.client, [0, 0])[1] += output

    def put_back(self, order, model, number):
        self.stop(order, model, super().put_back, number)

    def leave(self, order, model, number):
        self.stop(order, model, super().leave, number)

    def stop(self, order, model, operation, number):
        """``operation``, before which every request that it may take off the engine lets go of its output."""
        for job in self.running:
            tokens = self.reserved.pop(job.request_id)
            order.release_output(job.client, tokens)
            model.expect(job.client, -2 * tokens)
            self.reserved[job.request_id] = 0
        ended = len(self.ended)
        operation(order, model, number)
        for _ in self.ended[ended:]:
            order.observe_output("ada", self.EXPECTED)


CONDITIONS = [
    {"ageing": 0.0},
    {"ageing": 32.0},
    {"ageing": 32.0, "unnamed_by_arrival": False},
    {"ageing": 0.5, "max_clients": 3},
]


def order_options(condition, traffic, **more):
    options = {name: value for name, value in condition.items() if name != "ageing"}
    ageing = condition["ageing"]
    return {
        "clock": traffic.clock,
        "hit_tokens": traffic.hits,
        "ageing_tokens_per_s": ageing,
        "refreshes_per_step": 4 * ALL,
        "idle_s": math.inf,
        **options,
        **more,
    }


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
@pytest.mark.parametrize("quantum", [64.0, 2048.0])
def test_dlpm_serves_what_the_paper_s_algorithm_serves(condition, quantum):
    for seed in range(12):
        traffic = Traffic(seed)
        newcomers = 1 if seed % 3 == 0 else 64
        listed = ("ada", "bob") if seed % 2 else ()
        more = {"quantum_tokens": quantum, "newcomers_per_refill": newcomers, "listed": listed}
        order = DeficitOrder(**order_options(condition, traffic, **more))
        model = DeficitModel(traffic.hits, quantum=quantum, newcomers=newcomers, listed=listed, **condition)
        traffic.run(order, model)


@pytest.mark.parametrize("condition", CONDITIONS[:2], ids=str)
@pytest.mark.parametrize("quantum", [64.0, 2048.0])
def test_dlpm_charges_expected_output_ahead_and_puts_it_right(condition, quantum):
    for seed in range(12):
        traffic = ForeseenTraffic(seed)
        more = {
            "quantum_tokens": quantum,
            "first_output_tokens": traffic.EXPECTED,
            "newcomers_per_refill": 64,
        }
        order = DeficitOrder(**order_options(condition, traffic, **more))
        model = DeficitModel(traffic.hits, quantum=quantum, newcomers=64, **condition)
        traffic.run(order, model)


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_lpm_serves_the_longest_aged_prefix(condition):
    for seed in range(12):
        traffic = Traffic(seed)
        order = PrefixOrder(**order_options(condition, traffic))
        traffic.run(order, Model(traffic.hits, **condition))


@pytest.mark.parametrize("max_clients", [3, ALL])
def test_vtc_serves_the_client_of_the_least_counter(max_clients):
    for seed in range(20):
        traffic = Traffic(seed)
        newcomers = 1 if seed % 3 == 0 else 64
        listed = ("ada", "bob") if seed % 2 else ()
        bounds = {"max_clients": max_clients, "listed": listed}
        more = {"quantum_tokens": 64.0, "newcomers_per_refill": newcomers}
        order = CounterOrder(clock=traffic.clock, idle_s=math.inf, **more, **bounds)
        model = CounterModel(traffic.hits, quantum=64.0, newcomers=newcomers, **bounds)
        traffic.run(order, model)
