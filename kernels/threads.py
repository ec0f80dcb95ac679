"""Jobs side by side: for compiled code, which holds no lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

TASKS = "/proc/self/task"


def run_all(jobs: Iterable[Callable[[], None]], threads: int) -> None:
    """Run all on at most so many threads, this one among them, and return when none runs any more.

    Raises:
        Exception: what a job raised, one of them if several did. Jobs that nobody had begun may be left out.
    """
    left = deque(jobs)
    others = [_pool(threads - 1).submit(_drain, left) for _ in range(min(threads, len(left)) - 1)]
    try:
        _drain(left)
    finally:
        # They write to memory of the caller's.
        wait(others)
    for other in others:
        other.result()


def _drain(left: deque[Callable[[], None]]) -> None:
    while True:
        try:
            job = left.popleft()
        except IndexError:
            return
        job()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    cores = cores_of_all_threads()
    return ThreadPoolExecutor(
        threads, thread_name_prefix="penstock-kernels", initializer=_spread, initargs=(cores,)
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
