"""Random operations on DLPM, LPM and VTC, pick for pick against models that scan lists.

Times, weights and rates are dyadic, so that sums are exact in whatever order they are made.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from penstock.schedulers.accounts import OTHERS
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import UNNAMED, Job

ALL = 10_000
"""Refreshes a step that reach every waiting request."""


@dataclass
class Scanned:
    job: Job
    sequence: int
    preempted: bool = False
    hit: int = 0
    looked: int = -1


class Model:
    """LPM by scanning. Subclasses say which of the waiting accounts goes first."""

    by_prefix = True

    def __init__(self, hits, ageing=0.0, unnamed_by_arrival=True, max_clients=ALL, newcomers=ALL, listed=()):
        self.hits, self.ageing, self.unnamed_by_arrival = hits, ageing, unnamed_by_arrival
        self.max_clients, self.most_newcomers = max_clients, newcomers
        self.waiting: list[Scanned] = []
        self.level = dict.fromkeys((UNNAMED, OTHERS, *listed), 0.0)
        self.weight = dict.fromkeys(self.level, 1.0)
        self.listed = len(listed)
        self.step = self.arrivals = self.returns = 0
        self.newcomers: list[bool] = []
        self.popped, self.chosen = {}, None

    def account(self, client):
        return client if client in self.level else OTHERS

    def of(self, account):
        return [w for w in self.waiting if self.account(w.job.client) == account]

    def accounts(self):
        return {self.account(w.job.client) for w in self.waiting}

    def orders_by_prefix(self, account):
        return self.by_prefix and not (account == UNNAMED and self.unnamed_by_arrival)

    def score(self, w):
        return w.hit - self.ageing * w.job.arrival_s

    def head(self, account):
        def place(w):
            if not self.orders_by_prefix(account):
                return (w.sequence,)
            if w.preempted:
                return (0, w.sequence)
            return (1, -self.score(w), w.job.arrival_s, w.sequence)

        return min(self.of(account), key=place)

    def lane(self, account):
        return 0

    def joins(self, account):
        pass

    def refill(self):
        pass

    def first_level(self):
        return 0.0

    def admits(self, known):
        if self.newcomers.count(known) >= self.most_newcomers:
            return False
        self.newcomers.append(known)
        return True

    def enter(self, job, w, is_new):
        name = job.client
        has_room = len(self.level) - 2 - self.listed < self.max_clients
        if name not in self.level and has_room:
            known = any(w.job.client == name for w in self.waiting)
            if self.admits(known):
                self.level[name], self.weight[name] = self.first_level(), 1.0
        account = self.account(name)
        if account != OTHERS:
            self.reweigh(account, job.weight)
        if is_new and not self.of(account):
            self.joins(account)
        self.waiting.append(w)
        self.chosen = None

    def reweigh(self, account, weight):
        self.weight[account] = weight

    def add(self, job):
        self.arrivals += 1
        self.enter(job, Scanned(job, self.arrivals), True)

    def put_back(self, job, *, preempted):
        self.returns -= 1
        hit, looked = self.popped.get(job.request_id, (0, -1))
        self.enter(job, Scanned(job, self.returns, preempted, hit, looked), False)

    def remove(self, request_id):
        (w,) = [w for w in self.waiting if w.job.request_id == request_id]
        self.waiting.remove(w)
        self.chosen = None
        return w

    def hits_matter(self):
        accounts = self.accounts()
        return (
            self.by_prefix
            and len(self.waiting) > 1
            and any(len(accounts) > 1 or self.orders_by_prefix(a) for a in accounts)
        )

    def look_up(self, w):
        w.hit, w.looked = self.hits(w.job.request_id), self.step

    def begin_step(self):
        self.step += 1
        self.chosen, self.popped = None, {}
        if self.hits_matter():
            for account in self.accounts():
                looked = self.of(account) if self.orders_by_prefix(account) else [self.head(account)]
                for w in looked:
                    self.look_up(w)

    def first(self):
        def rank(account):
            w = self.head(account)
            return (self.lane(account), -self.score(w), w.job.arrival_s, w.sequence)

        return self.head(min(self.accounts(), key=rank))

    def peek(self):
        if self.chosen is None:
            self.refill()
            for _ in range(8):
                w = self.first()
                if not self.hits_matter() or w.looked == self.step:
                    break
                self.look_up(w)
            self.chosen = self.first()
        return self.chosen.job

    def pop(self):
        w = self.remove(self.peek().request_id)
        self.popped[w.job.request_id] = (w.hit, w.looked)
        return w.job

    def charge(self, client, service):
        pass


class DeficitModel(Model):
    """Algorithm 1 of arXiv 2501.14312, literally."""

    def __init__(self, *arguments, quantum, **keywords):
        super().__init__(*arguments, **keywords)
        self.quantum = quantum

    def refill(self):
        while all(self.level[account] <= 0 for account in self.accounts()):
            for client, deficit in self.level.items():
                if deficit <= 0:
                    self.level[client] += self.quantum * self.weight[client]
            self.newcomers = []

    def lane(self, account):
        return 0 if self.level[account] > 0 else 1

    def reweigh(self, account, weight):
        super().reweigh(account, weight)
        self.level[account] = min(self.level[account], self.quantum * weight)

    def charge(self, client, service):
        account = self.account(client)
        self.level[account] -= service
        while self.level[account] > self.quantum * self.weight[account]:
            self.level[account] -= self.quantum * self.weight[account]


class CounterModel(Model):
    """Virtual counters with the lift, literally."""

    by_prefix = False
    left_last = None

    def __init__(self, *arguments, quantum, **keywords):
        super().__init__(*arguments, **keywords)
        self.quantum = self.round_ends = quantum

    def admits(self, known):
        return not self.waiting or super().admits(known)

    def refill(self):
        if self.least() >= self.round_ends:
            self.round_ends = self.least() + self.quantum
            self.newcomers = []

    def least(self):
        if self.waiting:
            return min(self.level[account] for account in self.accounts())
        return 0.0 if self.left_last is None else self.level[self.left_last]

    def first_level(self):
        return max(0.0, self.least())

    def joins(self, account):
        self.level[account] = max(self.level[account], self.least())

    def lane(self, account):
        return self.level[account]

    def remove(self, request_id):
        w = super().remove(request_id)
        account = self.account(w.job.client)
        if not self.of(account):
            self.left_last = account
        return w

    def charge(self, client, service):
        account = self.account(client)
        self.level[account] += service / self.weight[account]


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
