"""Jobs side by side, on as many threads as there are jobs: for compiled code, which holds no lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

TASKS = "/proc/self/task"


def run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all, the first on this thread, and return when all are done."""
    if len(jobs) > 1:
        others = [_pool(len(jobs) - 1).submit(job) for job in jobs[1:]]
        jobs[0]()
        for other in others:
            other.result()
    elif jobs:
        jobs[0]()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    cores = cores_of_all_threads()
    return ThreadPoolExecutor(
        threads, thread_name_prefix="penstock-prefix", initializer=_spread, initargs=(cores,)
    )


def cores_of_all_threads() -> frozenset[int]:
    """The cores that any thread of this process may run on; empty where nobody says.

    An engine binds each of its threads to a core, also the one that would start ours, which would all
    inherit that core.
    """
    if not hasattr(os, "sched_getaffinity") or not os.path.isdir(TASKS):
        return frozenset()
    cores: set[int] = set()
    for task in os.listdir(TASKS):
        try:
            cores |= os.sched_getaffinity(int(task))
        except ProcessLookupError:
            # It has ended since.
            continue
    return frozenset(cores)


def _spread(cores: frozenset[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
