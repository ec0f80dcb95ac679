"""The backlog against a list."""

from __future__ import annotations

import random

import pytest

from penstock.schedulers.slo.backlog import Backlog
from penstock.schedulers.slo.requests import Waiting
from penstock.schedulers.slo.targets import Targets
from penstock.schedulers.waiting import Job, WaitingOrder


def test_thousands_of_operations_lose_and_double_no_request():
    rng = random.Random(0)
    backlog: WaitingOrder = Backlog()
    arrivals, urgent, best = [], set(), set()
    jobs = {}
    for number in range(3000):
        action = rng.random()
        if action < 0.4 or not jobs:
            targets = Targets(rng.uniform(0.1, 5), 0.1) if rng.random() < 0.6 else None
            job = Waiting(f"r{number}", "", 10, number * 0.01, targets=targets)
            jobs[job.request_id] = job
            (urgent if targets else best).add(job.request_id)
            if rng.random() < 0.7:
                backlog.add(job)
                arrivals.append(job.request_id)
            else:
                backlog.put_back(job, preempted=True)
                arrivals.insert(0, job.request_id)
        elif action < 0.55:
            name = rng.choice(sorted(jobs))
            backlog.demote(name)
            urgent.discard(name)
            best.add(name)
        elif action < 0.7:
            backlog.put_in_front(rng.sample(sorted(jobs), min(3, len(jobs))))
        else:
            popped = backlog.peek().request_id
            assert backlog.pop().request_id == popped
            del jobs[popped]
            arrivals.remove(popped)
            urgent.discard(popped)
            best.discard(popped)
        backlog.check_integrity()
        assert [job.request_id for job in backlog] == arrivals
        by_deadline = [job.request_id for _, job in backlog.urgent(10_000)]
        assert set(by_deadline) == urgent
        assert by_deadline == sorted(by_deadline, key=lambda name: jobs[name].due_s)
        assert {job.request_id for job in backlog.best_effort(10_000)} == best
        assert len(backlog) == len(jobs)


def test_without_targets_the_order_is_that_of_arrival_and_what_is_put_back_goes_first():
    backlog = Backlog()
    for name in "abc":
        backlog.add(Job(name, "client", 10, 0.0))
    first = backlog.pop()
    backlog.put_back(first, preempted=False)
    backlog.put_back(Job("z", "client", 10, 5.0), preempted=True)
    assert [backlog.pop().request_id for _ in range(4)] == ["z", "a", "b", "c"]


def test_the_requests_of_the_plan_come_first_then_deadlines_then_best_effort():
    backlog = Backlog()
    backlog.add(Job("free", "", 10, 0.0))
    for name, ttft_s in (("slow", 9.0), ("fast", 1.0), ("planned", 5.0)):
        backlog.add(Waiting(name, "", 10, 0.0, targets=Targets(ttft_s, 0.1)))
    backlog.put_in_front(["planned", "unknown"])
    assert [backlog.pop().request_id for _ in range(4)] == ["planned", "fast", "slow", "free"]
    with pytest.raises(IndexError):
        backlog.peek()


def test_one_id_waits_once_and_an_unknown_one_cannot_leave():
    backlog = Backlog()
    backlog.add(Job("a", "", 10, 0.0))
    with pytest.raises(ValueError, match="'a' waits already"):
        backlog.add(Job("a", "", 10, 0.0))
    with pytest.raises(KeyError):
        backlog.remove("b")
