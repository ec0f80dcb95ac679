"""Jobs side by side: who runs them, on which cores, and what becomes of an error."""

from __future__ import annotations

import os
import threading

import pytest

from penstock.kernels.shared_prefix.threads import cores_of_all_threads, run_all


def test_all_jobs_run_at_once_and_the_first_on_the_thread_that_asks():
    together, who = threading.Barrier(3), {}

    def job(number):
        # None of them goes on before all are there.
        together.wait(30)
        who[number] = threading.get_ident()

    run_all([lambda number=number: job(number) for number in range(3)])
    assert who[0] == threading.get_ident()
    assert len(set(who.values())) == 3


def test_an_error_of_any_job_arrives():
    def fail():
        raise FloatingPointError("of the second")

    with pytest.raises(FloatingPointError, match="of the second"):
        run_all([lambda: None, fail])


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
