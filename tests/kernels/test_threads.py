"""Jobs side by side: who runs them, on which cores, and what becomes of an error."""

from __future__ import annotations

import os
import threading
from functools import partial

import pytest

from penstock.kernels.threads import cores_of_all_threads, run_all


def test_jobs_run_at_once_and_one_on_the_thread_that_asks():
    together, who = threading.Barrier(3), set()

    def job():
        # None of them goes on before all are there.
        together.wait(30)
        who.add(threading.get_ident())

    run_all([job] * 3, threads=3)
    assert len(who) == 3
    assert threading.get_ident() in who


def test_more_jobs_than_threads_run_once_each():
    done, who = [], set()

    def job(number):
        done.append(number)
        who.add(threading.get_ident())

    run_all((partial(job, number) for number in range(100)), threads=2)
    assert sorted(done) == list(range(100))
    assert len(who) <= 2
    run_all([], threads=2)


def test_one_thread_runs_jobs_in_their_order_on_the_thread_that_asks():
    who, done = set(), []

    def job(number):
        done.append(number)
        who.add(threading.get_ident())

    run_all((partial(job, number) for number in range(4)), threads=1)
    assert (done, who) == ([0, 1, 2, 3], {threading.get_ident()})


def test_an_error_of_any_job_arrives_once_no_other_runs():
    begun, ended = threading.Event(), threading.Event()

    def fail():
        assert begun.wait(30)
        raise FloatingPointError("of one")

    def slow():
        begun.set()
        # The other one has failed by now, or does while this one runs.
        ended.wait(0.05)
        ended.set()

    with pytest.raises(FloatingPointError, match="of one"):
        run_all([fail, slow], threads=2)
    assert ended.is_set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_caller_that_is_bound_to_a_core_does_not_bind_its_helpers():
    every = os.sched_getaffinity(0)
    ready, leave = threading.Event(), threading.Event()

    def free():
        ready.set()
        leave.wait(30)

    other = threading.Thread(target=free)
    other.start()
    assert ready.wait(30)
    try:
        os.sched_setaffinity(0, {min(every)})
        assert cores_of_all_threads() >= every
    finally:
        os.sched_setaffinity(0, every)
        leave.set()
        other.join()
