"""The lease table against a small model: whatever is said in whatever order, each lease ends exactly once."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from seeded import seeded
from two_engines import Clock

from penstock.connectors.lease import Commit, LeaseEnd, LeaseTable
from penstock.connectors.runs import Run, blocks_of

BLOCKS = 40
PICKUP, DURATION, LONGEST = 45.0, 30.0, 100.0
names = st.integers(0, 2)
"""One of the three latest leases: old ones have ended, and a rule that meets none tests nothing."""


class Model:
    """One lease as the documentation describes it."""

    def __init__(self, now: float, blocks: list[int], epochs: list[int], ranks: int) -> None:
        self.blocks, self.epochs, self.ranks = blocks, epochs, ranks
        self.deadline, self.last = min(now + PICKUP, now + LONGEST), now + LONGEST
        self.committed: set[int] = set()
        self.hashed: dict[int, bytes] = {}
        self.end: LeaseEnd | None = None


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.epochs = np.zeros(BLOCKS, dtype=np.uint32)
        self.table = LeaseTable(
            pickup_s=PICKUP,
            duration_s=DURATION,
            longest_s=LONGEST,
            clock=self.clock,
            epochs=self.epochs,
            expect_digests=True,
        )
        self.ids: dict[int, str] = {}
        self.models: dict[int, Model] = {}
        self.due: Counter[tuple[str, LeaseEnd]] = Counter()
        self.stale = 0

    def latest(self, pick: int) -> int:
        return len(self.models) - 1 - pick

    def lease_of(self, name: int) -> str:
        return self.ids.get(name, "f" * 32)

    def held(self, name: int) -> Model | None:
        model = self.models.get(name)
        return model if model and model.end is None else None

    def finish(self, name: int, end: LeaseEnd) -> None:
        self.models[name].end = end
        self.due[f"r{name}", end] += 1

    @rule(
        start=st.integers(0, BLOCKS - 6),
        length=st.integers(1, 5),
        ranks=st.integers(1, 3),
        hashed=st.booleans(),
    )
    def grant(self, start, length, ranks, hashed):
        name = len(self.models)
        runs = [Run(start, length), Run(0, 1)]
        blocks = list(blocks_of(runs))
        self.ids[name] = self.table.grant(f"r{name}", runs, ranks)
        self.models[name] = Model(self.clock(), blocks, list(self.epochs[blocks]), ranks)
        for rank in range(ranks if hashed else 0):
            self.add_digests(0, rank)

    @rule(pick=names, rank=st.integers(0, 2))
    def add_digests(self, pick, rank):
        name = self.latest(pick)
        digests = np.array([1000 + name, rank], dtype=np.uint64)
        self.table.add_digests(f"r{name}", rank, digests)
        if model := self.held(name):
            model.hashed[rank] = digests.tobytes()

    @rule(pick=names, rank=st.integers(0, 3))
    def commit(self, pick, rank):
        name = self.latest(pick)
        outcome, digests = self.table.commit(self.lease_of(name), rank)
        model = self.held(name)
        reused = model and any(self.epochs[b] != e for b, e in zip(model.blocks, model.epochs, strict=True))
        repeated = model and rank in model.committed
        if model is None or rank >= model.ranks or self.clock() >= model.deadline or reused or repeated:
            self.stale += 1
            assert (outcome, digests) == (Commit.STALE, None)
        elif rank not in model.hashed:
            assert (outcome, digests) == (Commit.DIGESTS_PENDING, None)
        else:
            assert outcome is Commit.ACCEPTED
            assert digests.tobytes() == model.hashed[rank]
            model.committed.add(rank)
            if len(model.committed) == model.ranks:
                self.finish(name, LeaseEnd.COMMITTED)

    @rule(picks=st.lists(names, max_size=5))
    def renew(self, picks):
        wanted = [self.latest(pick) for pick in picks]
        lost = []
        for name in wanted:
            model = self.held(name)
            if model is None or self.clock() >= model.deadline:
                lost.append(self.lease_of(name))
            else:
                model.deadline = min(model.last, self.clock() + DURATION)
        assert self.table.renew([self.lease_of(name) for name in wanted]) == lost

    @rule(picks=st.lists(names, max_size=3))
    def release(self, picks):
        names = [self.latest(pick) for pick in picks]
        ended = {name for name in names if self.held(name)}
        assert self.table.release([self.lease_of(name) for name in names]) == len(ended)
        for name in ended:
            self.finish(name, LeaseEnd.RELEASED)

    @rule(block=st.integers(0, BLOCKS - 1))
    def reuse_block(self, block):
        self.epochs[block] += 1

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def collect(self):
        for name in [n for n, m in self.models.items() if m.end is None and self.clock() >= m.deadline]:
            self.finish(name, LeaseEnd.EXPIRED)
        assert Counter((e.request_id, e.end) for e in self.table.collect()) == self.due
        self.due.clear()

    @rule()
    def count_stale(self):
        assert self.table.take_stale_refused() == self.stale
        self.stale = 0

    @invariant()
    def holds_what_the_model_holds(self):
        self.table.check_integrity()
        assert len(self.table) == sum(model.end is None for model in self.models.values())

    def teardown(self):
        self.clock.advance(LONGEST)
        self.collect()
        assert len(self.table) == 0


LeaseMachine.TestCase.settings = settings(seeded, max_examples=60, stateful_step_count=40)
TestLeaseTable = LeaseMachine.TestCase


def table(clock, **options) -> LeaseTable:
    times = {"pickup_s": PICKUP, "duration_s": DURATION, "longest_s": LONGEST}
    return LeaseTable(clock=clock, **{**times, **options})


def test_a_lease_ends_with_the_last_of_its_ranks_and_no_rank_counts_twice():
    leases = table(Clock())
    lease = leases.grant("r", [Run(0, 4)], 3)
    said = [leases.commit(lease, rank)[0] for rank in (1, 1, 0, 1, 3)]
    assert said == [Commit.ACCEPTED, Commit.STALE, Commit.ACCEPTED, Commit.STALE, Commit.STALE]
    assert leases.collect() == []
    assert leases.commit(lease, 2)[0] is Commit.ACCEPTED
    assert [ended.end for ended in leases.collect()] == [LeaseEnd.COMMITTED]
    assert leases.commit(lease, 2)[0] is Commit.STALE
    assert leases.take_stale_refused() == 4


def test_a_release_may_name_a_lease_twice():
    leases = table(Clock())
    lease = leases.grant("r", [Run(0, 4)], 1)
    assert leases.release([lease, "f" * 32, lease]) == 1
    assert len(leases.collect()) == 1


def test_renewals_never_extend_a_lease_beyond_its_bound():
    clock = Clock()
    leases = table(clock)
    lease = leases.grant("r", [Run(0, 4)], 1)
    for _ in range(9):
        clock.advance(11.0)
        assert leases.renew([lease]) == []
    clock.advance(1.0)
    assert leases.renew([lease]) == [lease]
    assert [ended.end for ended in leases.collect()] == [LeaseEnd.EXPIRED]


def test_a_bound_below_the_duration_holds_from_the_start():
    clock = Clock()
    leases = table(clock, longest_s=10.0)
    lease = leases.grant("r", [Run(0, 4)], 1)
    clock.advance(10.0)
    assert leases.commit(lease, 0)[0] is Commit.STALE


def test_one_request_has_one_lease():
    leases = table(Clock())
    leases.grant("r", [Run(0, 4)], 1)
    with pytest.raises(ValueError, match="'r' holds a lease already"):
        leases.grant("r", [Run(8, 4)], 1)
    leases.check_integrity()


def test_leases_cannot_be_guessed_from_one_another():
    leases = table(Clock())
    ids = [leases.grant(f"r{i}", [Run(i, 1)], 1) for i in range(200)]
    assert len({lease[:8] for lease in ids}) == 200


def test_threads_that_commit_release_and_sweep_at_once_end_each_lease_once():
    """The control thread answers while the scheduler grants and sweeps."""
    leases = table(Clock())
    count, rounds = 400, threading.Barrier(4)
    ids = [leases.grant(f"r{i}", [Run(i, 2)], 1) for i in range(count)]
    ended: list[str] = []

    def race(act):
        rounds.wait()
        for lease in ids:
            act(lease)

    threads = [
        threading.Thread(target=race, args=(act,))
        for act in (
            lambda lease: leases.commit(lease, 0),
            lambda lease: leases.release([lease]),
            lambda lease: leases.renew([lease]),
        )
    ]
    for thread in threads:
        thread.start()
    rounds.wait()
    while len(ended) < count:
        ended += [e.request_id for e in leases.collect()]
    for thread in threads:
        thread.join()
    assert leases.collect() == []
    assert sorted(ended) == sorted(f"r{i}" for i in range(count))
    leases.check_integrity()


def test_the_first_renewal_ends_the_time_for_pickup_and_begins_the_lease():
    clock = Clock()
    leases = table(clock)
    asked, forgotten = (leases.grant(name, [Run(0, 4)], 1) for name in ("asked", "forgotten"))
    clock.advance(PICKUP - DURATION - 1)
    assert leases.renew([asked]) == []
    clock.advance(DURATION)
    assert leases.renew([forgotten]) == []
    assert [(ended.request_id, ended.renewals) for ended in leases.collect()] == [("asked", 1)]
    clock.advance(DURATION)
    assert [(ended.request_id, ended.renewals) for ended in leases.collect()] == [("forgotten", 1)]
