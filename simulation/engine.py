"""A serving engine on a virtual clock: requests arrive, the engine steps, a model says how long a step takes.

The engine is anything that can choose a batch and take its result; the real schedulers of real engines stand
behind ``SteppedEngine``. Nothing here reads real time, so equal inputs give bit-equal records.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from penstock.simulation.records import Ask, Batch, Progress, Row, Served
from penstock.simulation.step_time import Load

IDLE_TICK_S = 1e-3
"""How long an engine waits after a step in which it had nothing to compute."""
MOST_IDLE_TICKS = 100
"""Empty steps in a row, with requests unfinished, after which they are not waited for any more."""


class SimulationStall(RuntimeError):
    """Requests are unfinished, the engine schedules none of them, and nothing else will happen."""


class VirtualClock:
    """Seconds since the simulation began. Call it to read it; it never runs backwards."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance_to(self, time_s: float) -> None:
        """Move on to ``time_s``.

        Raises:
            ValueError: that lies in the past, or is not a number.
        """
        if not time_s >= self._now:
            raise ValueError(f"the clock stands at {self._now} s and cannot go to {time_s} s")
        self._now = time_s


class SteppedEngine(Protocol):
    """An engine that is told each step what the step before gave."""

    def add(self, ask: Ask) -> None:
        """A request arrives.

        Raises:
            ValueError: it can never be served, for example because it is longer than the model's context.
        """

    def schedule(self) -> Batch:
        """Choose what the next step computes; no rows if there is nothing."""

    def complete(self, batch: Batch) -> list[Progress]:
        """Take the step's result: every request that got tokens or finished."""

    def describe(self) -> str:
        """One line about what waits and what is free, for errors."""


class Workload(Protocol):
    """Who asks what. A closed loop asks more when it is answered."""

    def begin(self) -> Iterable[Ask]:
        """The requests that come whatever happens, in any order."""

    def follow(self, served: Served) -> Iterable[Ask]:
        """The requests that this one's end brings about, none of them earlier than that."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """A row of a finished step with what it meant: tokens counted as in ``Served``."""

    served: Served
    row: Row
    extend_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step as observers see it. ``waiting`` counts each client's waiting requests, and changes later."""

    begin_s: float
    end_s: float
    load: Load
    rows: list[StepRow]
    output_tokens: Mapping[str, int]
    waiting: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was chosen and has not come back."""

    batch: Batch
    rows: list[StepRow]
    load: Load
    begin_s: float
    end_s: float


class Observer(Protocol):
    """Sees every step as it ends."""

    def stepped(self, step: Step) -> None:
        """A step that computed something has ended."""


@dataclass(slots=True)
class Result:
    """All requests in order of arrival, and what the engine did in total."""

    served: list[Served]
    makespan_s: float
    steps: int
    idle_ticks: int

    def digest(self) -> str:
        """A hash of every time and count of every request: equal if and only if the runs were equal."""
        digest = hashlib.sha256()
        for one in self.served:
            counts = (one.extend_tokens, one.cached_tokens, one.recomputed_tokens, one.preemptions)
            digest.update(repr((one.ask.request_id, one.admitted_s, one.finished_s, counts)).encode())
            digest.update(one.token_times.tobytes())
        return digest.hexdigest()


@dataclass(slots=True)
class Simulation:
    """Steps ``engine`` through ``workload`` until every request has finished.

    ``step_time`` gives seconds for what a step computes. ``clock`` must be the one that the engine reads, if
    it reads one.
    """

    engine: SteppedEngine
    workload: Workload
    step_time: Callable[[Load], float]
    clock: VirtualClock = field(default_factory=VirtualClock)
    observers: tuple[Observer, ...] = ()
    overlap: bool = False
    """Whether a step is chosen as the one before begins, without its result: asynchronous scheduling."""
    tell: Callable[[int, int], None] | None = None
    """Told now and then how many requests have finished, and how many have come so far."""

    _coming: list[tuple[float, int, Ask]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)
    _served: dict[str, Served] = field(default_factory=dict)
    _waiting: Counter[str] = field(default_factory=Counter)
    _queued: set[str] = field(default_factory=set)
    _in_flight: deque[Flight] = field(default_factory=deque)
    _unfinished: int = 0
    _steps: int = 0

    def run(self) -> Result:
        """Run to completion.

        Raises:
            SimulationStall: the engine leaves requests lying for ever.
            ValueError: two requests have one id, or one can never be served.
        """
        for ask in self.workload.begin():
            self._expect(ask)
        idle = idle_in_a_row = 0
        while self._unfinished or self._coming or self._in_flight:
            if not self._unfinished and not self._in_flight:
                self.clock.advance_to(max(self._coming[0][0], self.clock()))
            self._arrive()
            if self._unfinished:
                self._begin()
                if self.overlap and len(self._in_flight) == 1 and self._in_flight[0].rows:
                    continue
            flight = self._in_flight.popleft()
            if flight.rows:
                idle_in_a_row = 0
                self._end(flight)
                continue
            self.engine.complete(flight.batch)
            if self._unfinished and not self._in_flight:
                idle, idle_in_a_row = idle + 1, idle_in_a_row + 1
                self._idle(idle_in_a_row)
        return Result(list(self._served.values()), self.clock(), self._steps, idle)

    def _expect(self, ask: Ask) -> None:
        heapq.heappush(self._coming, (ask.arrival_s, next(self._order), ask))

    def _arrive(self) -> None:
        """Hand over what has come by now."""
        while self._coming and self._coming[0][0] <= self.clock():
            ask = heapq.heappop(self._coming)[2]
            if ask.request_id in self._served:
                raise ValueError(f"two requests have the id {ask.request_id!r}")
            self._served[ask.request_id] = Served(ask, ask.prompt_tokens)
            self.engine.add(ask)
            self._queue(ask)
            self._unfinished += 1

    def _idle(self, in_a_row: int) -> None:
        """Wait a tick; for the next arrival if ticks do not help; give up if none comes."""
        if in_a_row < MOST_IDLE_TICKS:
            upcoming = self._coming[0][0] if self._coming else float("inf")
            self.clock.advance_to(max(self.clock(), min(self.clock() + IDLE_TICK_S, upcoming)))
        elif self._coming:
            self.clock.advance_to(max(self.clock(), self._coming[0][0]))
        else:
            raise SimulationStall(
                f"{self._unfinished} requests are unfinished at {self.clock():.3f} s, and {in_a_row} steps "
                f"in a row scheduled nothing: {self.engine.describe()}"
            )

    def _note_preempted(self, batch: Batch) -> None:
        for request_id in batch.preempted:
            served = self._served[request_id]
            served.preemptions += 1
            self._queue(served.ask)

    def _queue(self, ask: Ask) -> None:
        self._queued.add(ask.request_id)
        self._waiting[ask.client] += 1

    def _begin(self) -> None:
        """Choose the next step; it begins when those in flight have ended."""
        batch = self.engine.schedule()
        self._note_preempted(batch)
        begin = self._in_flight[-1].end_s if self._in_flight else self.clock()
        rows = [self._compute(row, begin) for row in batch.rows]
        load = _load_of(rows, batch.draft_steps)
        end = begin + self.step_time(load) if rows else begin
        self._in_flight.append(Flight(batch, rows, load, begin, end))

    def _end(self, flight: Flight) -> None:
        self.clock.advance_to(flight.end_s)
        outputs = {}
        for progress in self.engine.complete(flight.batch):
            outputs[progress.request_id] = progress.new_tokens
            self._progress(progress)
        self._steps += 1
        for observer in self.observers:
            observer.stepped(
                Step(flight.begin_s, flight.end_s, flight.load, flight.rows, outputs, self._waiting)
            )
        if self.tell is not None and self._steps % 100 == 0:
            self.tell(len(self._served) - self._unfinished, len(self._served))

    def _compute(self, row: Row, now: float) -> StepRow:
        served = self._served[row.request_id]
        if row.request_id in self._queued:
            self._queued.remove(row.request_id)
            self._waiting[served.ask.client] -= 1
            if served.admitted_s is None:
                served.admitted_s = now
        extend, cached = served.compute(row.start, row.tokens)
        return StepRow(served, row, extend, cached)

    def _progress(self, progress: Progress) -> None:
        served = self._served[progress.request_id]
        served.token_times.extend([self.clock()] * progress.new_tokens)
        if progress.finished:
            served.finished_s = self.clock()
            self._unfinished -= 1
            for ask in self.workload.follow(served):
                self._expect(ask)


def _load_of(rows: list[StepRow], draft_steps: int) -> Load:
    prefill = decode = context = 0
    for part in rows:
        row = part.row
        context += row.start
        if row.start < part.served.prompt_tokens:
            prefill += row.tokens
        else:
            decode += row.tokens
    return Load(prefill, decode, len(rows), context, draft_steps)
