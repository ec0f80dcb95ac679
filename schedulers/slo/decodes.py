"""Decodes under targets in columns, kept from step to step: a plan asks hundreds of them the same questions.

A step gives each of them a token, so that what changes changes alike, and one operation on a column takes the
place of a loop over requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Pace

Times = NDArray[np.float64]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]

OUTPUT, TOKENS, COMPUTED, MOST, DRAFTED = range(5)
BEGIN, TPOT, LAST = range(3)
ROOM = 64


@dataclass(slots=True)
class Columns:
    """``n`` decodes under targets. ``numbers`` is ``[5, n]``: tokens of the output so far, all tokens, those
    computed, the most output tokens, and those of a draft. ``times`` is ``[3, n]`` in seconds: from when on each token has its
    time, NaN where the token before says so; the time per token; when the last token came, NaN before one.

    ``requests`` are as old as the columns when they joined; :meth:`request` brings one up to date.
    """

    requests: list[Running]
    names: tuple[str, ...]
    numbers: Numbers
    times: Times

    @classmethod
    def of(cls, requests: Sequence[Running], pace: Pace) -> Columns:
        """Requests with targets as they are."""
        numbers = [
            (r.output_tokens, r.tokens, r.computed_tokens, r.max_output_tokens, r.draft_tokens)
            for r in requests
        ]
        times = [times_of(request, pace) for request in requests]
        return cls(
            list(requests),
            tuple([request.request_id for request in requests]),
            np.array(numbers, np.int64).reshape(-1, 5).T,
            np.array(times, np.float64).reshape(-1, 3).T,
        )

    def beside(self, others: Columns) -> Columns:
        """These, and others behind them."""
        if not others.requests:
            return self
        if not self.requests:
            return others
        return Columns(
            self.requests + others.requests,
            self.names + others.names,
            np.concatenate((self.numbers, others.numbers), axis=1),
            np.concatenate((self.times, others.times), axis=1),
        )

    def where(self, kept: Mask) -> Columns:
        """Those that a mask keeps."""
        if kept.all():
            return self
        places = np.flatnonzero(kept)
        requests = [self.requests[place] for place in places.tolist()]
        names = tuple([request.request_id for request in requests])
        return Columns(requests, names, self.numbers[:, places], self.times[:, places])

    def request(self, place: int) -> Running:
        """The request at a place, as it is now."""
        request, last_s = self.requests[place], self.times[LAST, place]
        request.output_tokens, request.tokens, request.computed_tokens = self.numbers[:MOST, place].tolist()
        if not np.isnan(last_s):
            request.last_token_s = float(last_s)
        return request

    def __len__(self) -> int:
        return len(self.requests)


class Decodes:
    """The columns of those that decode on, in the order in which they run, while some join and leave."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.clear()

    def clear(self) -> None:
        """Nobody is known to decode."""
        self._requests: list[Running] = []
        self._awaited: list[Running] = []
        self._numbers, self._times = np.empty((5, ROOM), np.int64), np.empty((3, ROOM))
        self.names: tuple[str, ...] = ()

    def join(self, requests: Sequence[Running]) -> None:
        """Decodes with targets run behind the others."""
        new, number = Columns.of(requests, self._pace), len(self._requests)
        end = number + len(new)
        if end > self._numbers.shape[1]:
            room = ((0, 0), (0, 2 * end - self._numbers.shape[1]))
            self._numbers, self._times = np.pad(self._numbers, room), np.pad(self._times, room)
        self._numbers[:, number:end], self._times[:, number:end] = new.numbers, new.times
        self._requests += requests
        self._awaited += [request for request in requests if request.first_token_s is None]
        self.names += new.names

    def leave(self, place: int) -> None:
        """One ended. The others keep their order."""
        end = len(self._requests)
        for columns in (self._numbers, self._times):
            columns[:, place : end - 1] = columns[:, place + 1 : end]
        request = self._requests.pop(place)
        self._awaited = [one for one in self._awaited if one is not request]
        self.names = self.names[:place] + self.names[place + 1 :]

    def went_on(self, steps: int, output_s: float) -> None:
        """Each had a token of so many steps, of which the last one came back at ``output_s``."""
        end = len(self._requests)
        self._numbers[:MOST, :end] += steps
        self._times[LAST, :end] = output_s

    def columns(self) -> Columns:
        """Those who have a token to come. Good until one joins or leaves, or they go on."""
        end = len(self._requests)
        if self._awaited:
            self._begin()
        columns = Columns(self._requests, self.names, self._numbers[:, :end], self._times[:, :end])
        return columns.where(columns.numbers[OUTPUT] < columns.numbers[MOST])

    def _begin(self) -> None:
        """With the first token the time of all further ones is known."""
        for request in [one for one in self._awaited if one.first_token_s is not None]:
            place = next(at for at, one in enumerate(self._requests) if one is request)
            self._times[BEGIN, place] = times_of(request, self._pace)[BEGIN]
            self._awaited.remove(request)

    def __len__(self) -> int:
        return len(self._requests)


class RunningBatch(Sequence[Running]):
    """All that run: those known to decode on under targets, and others behind them."""

    def __init__(self, decodes: Columns, others: Sequence[Running]) -> None:
        self.decodes = decodes
        self.others = others

    @overload
    def __getitem__(self, place: int) -> Running: ...
    @overload
    def __getitem__(self, place: slice) -> list[Running]: ...
    def __getitem__(self, place: int | slice) -> Running | list[Running]:
        return list(self)[place]

    def __iter__(self) -> Iterator[Running]:
        return chain(map(self.decodes.request, range(len(self.decodes))), self.others)

    def __len__(self) -> int:
        return len(self.decodes) + len(self.others)


def times_of(request: Running, pace: Pace) -> tuple[float, float, float]:
    """``BEGIN``, ``TPOT`` and ``LAST`` of a decode: under its pace token ``i`` is due at ``BEGIN + i * TPOT``,
    as :meth:`Running.due_s` says, or at ``LAST + TPOT`` where ``BEGIN`` is NaN."""
    targets, first_s, last_s = request.targets, request.first_token_s, request.last_token_s
    assert targets is not None
    nan = float("nan")
    if pace == "cumulative" or first_s is None or last_s is None:
        begin_s = targets.paced_from_s(request.arrival_s, first_s)
    else:
        begin_s = first_s if pace == "mean" else nan
    return begin_s, targets.tpot_s, nan if last_s is None else last_s
