"""The shape that every waiting order has: which request is served next, and what service costs its client.

An order knows no engine. The adapter tells it who arrives and who leaves, asks it for the next request, and
reports the tokens that were really computed; time and the state of the prefix cache are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

UNNAMED = ""
"""The client of requests that name none. They are served among themselves in order of arrival."""

Clock = Callable[[], float]
"""Seconds on a clock that never runs backwards."""

Settle = Callable[[str | None], bool]
"""Charges a client, or everybody (None), for output that was generated before the step and not charged yet;
whether there was any."""

HitTokens = Callable[[str], int]
"""Tokens of a waiting request, by its id, that the prefix cache holds now; free of side effects."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request as a waiting order sees it.

    ``tokens`` is what its prefill computes with an empty prefix cache. ``arrival_s`` is on the order's clock.
    ``prefix`` are the chained hashes of its full blocks, first block first, as the prefix cache names them:
    equal hashes at one depth mean equal prefixes up to there. ``weight`` is the share of its client.
    """

    request_id: str
    client: str
    tokens: int
    arrival_s: float
    prefix: Sequence[Hashable] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ClientService:
    """What one client has had, in weighted tokens, and where it stands.

    ``standing`` is the deficit of a deficit policy (positive: may be served) and the virtual counter of a
    counter policy; 0 for policies that know no clients.
    """

    client: str
    extend_tokens: int
    output_tokens: int
    service: float
    standing: float
    waiting: int


class AsItComes:
    """The part of a waiting order that charges output when it is generated, and reserves none."""

    def reserve_output(self, client: str, generated: int, at_most: int) -> int:
        return 0

    def release_output(self, client: str, tokens: int) -> None:
        """None was reserved."""

    def observe_output(self, client: str, tokens: int) -> None:
        """Nothing is expected, so nothing is learned."""

    def settle_by(self, settle: Settle) -> None:
        """No pick depends on what was charged."""

    def foresee(self) -> None:
        """A pick needs no preparation."""


class AllAlike:
    """The part of a waiting order that knows no clients."""

    def set_quantum(self, tokens: float) -> None:
        """There is none."""

    def reweigh(self, client: str, weight: float) -> None:
        """Shares do not matter."""


class WaitingOrder(Protocol):
    """The waiting requests, in the order of a policy. Ids are unique among those that wait."""

    def add(self, job: Job) -> None:
        """A request arrives.

        Raises:
            ValueError: its id waits already.
        """

    def put_back(self, job: Job, *, preempted: bool) -> None:
        """A request that was popped waits again: it was passed over in this step, or, ``preempted``, thrown
        out of the running batch. Among the unnamed it goes before all others; a preempted one goes before
        its client's others in any case.
        """

    def remove(self, request_id: str) -> Job:
        """Take out a request wherever it stands.

        Raises:
            KeyError: it does not wait.
        """

    def peek(self) -> Job:
        """The request to serve next; the same one until the order changes.

        Raises:
            IndexError: none waits.
        """

    def pop(self) -> Job:
        """Take out what ``peek`` returns. It charges nobody: the adapter charges what was computed.

        Raises:
            IndexError: none waits.
        """

    def begin_step(self) -> None:
        """A scheduling step begins: a bounded number of prefix hits is looked up anew. An adapter may leave
        it out for steps that pick nobody."""

    def foresee(self) -> None:
        """There is time before the first pick of this step, if there will be one: do now what it needs, and
        change no outcome."""

    def charge_extend(self, client: str, tokens: int) -> None:
        """``tokens`` of a client's prompts were computed; negative: a charge of this step is taken back."""

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        """``tokens`` were generated for a client; ``expected`` of them by requests that had reserved them."""

    def reserve_output(self, client: str, generated: int, at_most: int) -> int:
        """A request of this client begins to run, or goes on after it ``generated`` some tokens: how many it
        is taken to generate from now on, up to ``at_most``. The order counts them until they are generated
        or released; 0 where it charges output only as it comes."""

    def release_output(self, client: str, tokens: int) -> None:
        """Reserved tokens that will not come, or not before their request runs again."""

    def observe_output(self, client: str, tokens: int) -> None:
        """A request of this client is over and generated ``tokens`` in all."""

    def settle_by(self, settle: Settle) -> None:
        """From now on output is charged late: ``settle`` is called for a client before anything is decided by
        how that client stands."""

    def set_quantum(self, tokens: float) -> None:
        """A refill gives so many weighted tokens from now on; without effect for policies that have none.

        Raises:
            ValueError: it is not above 0.
        """

    def reweigh(self, client: str, weight: float) -> None:
        """A client that is known has another share from now on; others bring theirs with a request."""

    def clients(self) -> Iterable[ClientService]:
        """Every client that is remembered."""

    def __len__(self) -> int: ...

    def __contains__(self, request_id: object) -> bool: ...

    def __iter__(self) -> Iterator[Job]:
        """All waiting requests; in order of service for orders of arrival, unspecified for the others."""
