"""The order of arrival with bare counters: the reference for what an adapter does to an order."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator

from penstock.schedulers.waiting import ClientService, Job


class ArrivalOrder:
    """Serves in order of arrival, whoever asks, and notes every call that changes anything.

    ``expected`` is the output that it reserves for a request; ``observed`` what each ended one generated.
    """

    def __init__(self, expected: int = 0) -> None:
        self.expected = expected
        self.reserved: Counter[str] = Counter()
        self.observed: dict[str, list[int]] = defaultdict(list)
        self.jobs: deque[Job] = deque()
        self.extend: Counter[str] = Counter()
        self.output: Counter[str] = Counter()
        self.put_back_preempted: list[str] = []
        self.put_back_skipped: list[str] = []
        self.calls: list[tuple[str, str, int]] = []

    def add(self, job: Job) -> None:
        assert job.request_id not in self
        self.jobs.append(job)

    def put_back(self, job: Job, *, preempted: bool) -> None:
        assert job.request_id not in self
        (self.put_back_preempted if preempted else self.put_back_skipped).append(job.request_id)
        self.jobs.appendleft(job)

    def remove(self, request_id: str) -> Job:
        for job in self.jobs:
            if job.request_id == request_id:
                self.jobs.remove(job)
                return job
        raise KeyError(request_id)

    def peek(self) -> Job:
        return self.jobs[0]

    def pop(self) -> Job:
        job = self.jobs.popleft()
        self.calls.append(("pop", job.client, 0))
        return job

    def begin_step(self) -> None:
        pass

    def foresee(self) -> None:
        pass

    def charge_extend(self, client: str, tokens: int) -> None:
        self.extend[client] += tokens
        self.calls.append(("extend", client, tokens))

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        self.output[client] += tokens
        self.reserved[client] -= expected

    def reserve_output(self, client: str, generated: int, at_most: int) -> int:
        tokens = max(0, min(self.expected - generated, at_most))
        self.reserved[client] += tokens
        return tokens

    def release_output(self, client: str, tokens: int) -> None:
        self.reserved[client] -= tokens

    def observe_output(self, client: str, tokens: int) -> None:
        self.observed[client].append(tokens)

    def clients(self) -> Iterable[ClientService]:
        waiting = Counter(job.client for job in self.jobs)
        for client in self.extend.keys() | self.output.keys() | waiting.keys():
            extend, output = self.extend[client], self.output[client]
            yield ClientService(client, extend, output, extend + 2.0 * output, 0.0, waiting[client])

    def __len__(self) -> int:
        return len(self.jobs)

    def __contains__(self, request_id: object) -> bool:
        return any(job.request_id == request_id for job in self.jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)
