"""First come, first served: the stock order, with a record of what each client had."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from penstock.schedulers.accounts import OTHERS, Prices
from penstock.schedulers.waiting import AllAlike, AsItComes, ClientService, Job


class ArrivalOrder(AsItComes, AllAlike):
    """Requests in order of arrival; what is put back goes to the front. Every operation is O(1).

    Args:
        extend_weight: service of one computed prompt token.
        output_weight: service of one generated token.
        max_clients: clients of which a record is kept, those that were served last.
    """

    def __init__(
        self, *, extend_weight: float = 1.0, output_weight: float = 2.0, max_clients: int = 10_000
    ) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._prices = Prices(extend_weight, output_weight)
        self._max_clients = max_clients
        # Extend and output tokens by client, the longest not served first.
        self._served: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._others = (0, 0)
        self._waiting: dict[str, int] = {}

    def add(self, job: Job) -> None:
        if job.request_id in self._jobs:
            raise ValueError(f"request {job.request_id!r} waits already")
        self._jobs[job.request_id] = job
        self._waiting[job.client] = self._waiting.get(job.client, 0) + 1

    def put_back(self, job: Job, *, preempted: bool) -> None:
        self.add(job)
        self._jobs.move_to_end(job.request_id, last=False)

    def remove(self, request_id: str) -> Job:
        job = self._jobs.pop(request_id)
        self._waiting[job.client] -= 1
        if not self._waiting[job.client]:
            del self._waiting[job.client]
        return job

    def peek(self) -> Job:
        if not self._jobs:
            raise IndexError("no request waits")
        return next(iter(self._jobs.values()))

    def pop(self) -> Job:
        return self.remove(self.peek().request_id)

    def begin_step(self) -> None:
        """Nothing is looked up: hits do not matter here."""

    def charge_extend(self, client: str, tokens: int) -> None:
        self._record(client, tokens, 0)

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        self._record(client, 0, tokens)

    def clients(self) -> Iterator[ClientService]:
        for client in {OTHERS: None, **self._served, **self._waiting}:
            extend, output = self._others if client == OTHERS else self._served.get(client, (0, 0))
            yield ClientService(
                client=client,
                extend_tokens=extend,
                output_tokens=output,
                service=self._prices.of(extend, output),
                standing=0.0,
                waiting=self._waiting.get(client, 0),
            )

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._jobs

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def _record(self, client: str, extend: int, output: int) -> None:
        if client == OTHERS:
            self._others = (self._others[0] + extend, self._others[1] + output)
            return
        before = self._served.pop(client, (0, 0))
        self._served[client] = (before[0] + extend, before[1] + output)
        if len(self._served) > self._max_clients:
            _, forgotten = self._served.popitem(last=False)
            self._others = (self._others[0] + forgotten[0], self._others[1] + forgotten[1])

    def check_integrity(self) -> None:
        """Assert that waiting requests are counted by client. O(requests)."""
        counts: dict[str, int] = {}
        for job in self._jobs.values():
            counts[job.client] = counts.get(job.client, 0) + 1
        assert counts == self._waiting
        assert len(self._served) <= self._max_clients
