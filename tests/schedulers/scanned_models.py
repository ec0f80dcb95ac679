"""What the orders promise, said by scanning lists: small, slow and obviously right."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.schedulers.accounts import OTHERS
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
        self.expected, self.ahead = {}, {}

    def expect(self, client, service):
        """Running requests are to cost ``service`` more: paid at once, and given back up to a quantum."""
        account = self.account(client)
        self.expected[account] = self.expected.get(account, 0) + service
        missing = self.expected[account] - self.ahead.get(account, 0)
        room = self.quantum * self.weight[account] - self.level[account]
        paid = max(missing, -room)
        self.level[account] -= paid
        self.ahead[account] = self.ahead.get(account, 0) + paid

    def joins(self, account):
        self.ahead[account] = self.expected.get(account, 0)

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

    def charge(self, client, service, expected=0):
        account = self.account(client)
        self.expected[account] = self.expected.get(account, 0) - expected
        unused = self.ahead.get(account, 0) - self.expected[account]
        if service > 0 < unused:
            self.ahead[account] -= min(unused, service)
            service -= min(unused, service)
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
