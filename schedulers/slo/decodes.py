"""Decodes under targets in columns, kept from step to step: a plan asks hundreds of them the same questions.

A step gives each of them a token, so that what changes changes alike, and one operation on a column takes the
place of a loop over requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Pace

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]

OUTPUT, TOKENS, COMPUTED, MOST, DRAFTED, BEGIN, TPOT, LAST = range(8)
COUNTED = slice(OUTPUT, MOST)
"""What a step adds a token to."""
ROOM = 64
NAN = float("nan")


@dataclass(slots=True)
class Columns:
    """``n`` decodes under targets. ``values`` is ``[8, n]``: tokens of the output so far, all tokens, those
    computed, the most output tokens, and those of a draft; then seconds: from when on each token has its
    time, NaN where the token before says so; the time per token; when the last token came, NaN before one.
    All as floats, which are exact for so few tokens, so that one operation moves a request.

    ``requests`` are as old as the columns when they joined; :meth:`request` brings one up to date.
    """

    requests: list[Running]
    names: tuple[str, ...]
    values: Column

    @classmethod
    def of(cls, requests: Sequence[Running], pace: Pace) -> Columns:
        """Requests with targets as they are."""
        flat = chain.from_iterable([values_of(request, pace) for request in requests])
        values = np.fromiter(flat, np.float64, len(requests) * (LAST + 1))
        names = tuple([request.request_id for request in requests])
        return cls(list(requests), names, values.reshape(-1, LAST + 1).T)

    def beside(self, others: Columns) -> Columns:
        """These, and others behind them."""
        if not self.requests:
            return others
        values = np.concatenate((self.values, others.values), axis=1)
        return Columns(self.requests + others.requests, self.names + others.names, values)

    def where(self, kept: Mask) -> Columns:
        """Those that a mask keeps."""
        if kept.all():
            return self
        requests = list(compress(self.requests, kept.tolist()))
        names = tuple([request.request_id for request in requests])
        return Columns(requests, names, self.values[:, kept])

    def request(self, place: int) -> Running:
        """The request at a place, as it is now."""
        request, values = self.requests[place], self.values[:, place].tolist()
        request.output_tokens, request.tokens, request.computed_tokens = map(int, values[COUNTED])
        last_s = values[LAST]
        if not math.isnan(last_s):
            request.last_token_s = last_s
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
        self._values: Column = np.empty((LAST + 1, ROOM))
        self.names: tuple[str, ...] = ()

    def join(self, requests: Sequence[Running], comes_back_s: float | None = None) -> None:
        """Decodes with targets run behind the others. First tokens that have not come are expected at
        ``comes_back_s``, if given."""
        for place, request in enumerate(requests, len(self._requests)):
            if place == self._values.shape[1]:
                self._values = np.concatenate((self._values, np.empty_like(self._values)), axis=1)
            expected = request if comes_back_s is None else foreseen(request, comes_back_s)
            self._values[:, place] = values_of(expected, self._pace)
        self._requests += requests
        self._awaited += [request for request in requests if request.first_token_s is None]
        self.names += tuple([request.request_id for request in requests])

    def leave(self, place: int) -> None:
        """One ended. The others keep their order."""
        end = len(self._requests)
        self._values[:, place : end - 1] = self._values[:, place + 1 : end]
        request = self._requests.pop(place)
        if self._awaited:
            self._awaited = [one for one in self._awaited if one is not request]
        self.names = self.names[:place] + self.names[place + 1 :]

    def keep(self, places: list[int]) -> None:
        """Those at ``places`` run on, in that order. The others end here, and their requests say how far."""
        end = len(self._requests)
        if places == [*range(end)]:
            return
        columns = Columns(self._requests, self.names, self._values[:, :end])
        for place in set(range(end)).difference(places):
            columns.request(place)
        self._values[:, : len(places)] = self._values[:, places]
        self._requests = [self._requests[place] for place in places]
        self.names = tuple([request.request_id for request in self._requests])
        if self._awaited:
            kept = set(map(id, self._requests))
            self._awaited = [one for one in self._awaited if id(one) in kept]

    def went_on(self, steps: int) -> None:
        """So many steps give each a token."""
        self._values[COUNTED, : len(self._requests)] += steps

    def came_back(self, output_s: float, places: list[int] | None = None) -> None:
        """The last token of each, or of those at ``places``, came at ``output_s``."""
        if places is None:
            self._values[LAST, : len(self._requests)] = output_s
        else:
            self._values[LAST, places] = output_s

    def columns(self) -> Columns:
        """Those who have a token to come. Good until one joins or leaves, or they go on."""
        if self._awaited:
            self._begin()
        columns = Columns(self._requests, self.names, self._values[:, : len(self._requests)])
        return columns.where(columns.values[OUTPUT] < columns.values[MOST])

    def _begin(self) -> None:
        """With the first token the time of all further ones is known."""
        for request in [one for one in self._awaited if one.first_token_s is not None]:
            place = next(at for at, one in enumerate(self._requests) if one is request)
            self._values[BEGIN, place] = values_of(request, self._pace)[BEGIN]
            self._awaited = [one for one in self._awaited if one is not request]

    def generated(self) -> list[float]:
        """Tokens of the output so far."""
        found: list[float] = self._values[OUTPUT, : len(self._requests)].tolist()
        return found

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


def foreseen(request: Running, comes_back_s: float) -> Running:
    """A request as it is once its first token, which is on the way, has come then; any other as it is."""
    if not request.output_tokens or request.first_token_s is not None:
        return request
    return msgspec.structs.replace(request, first_token_s=comes_back_s, last_token_s=comes_back_s)


def values_of(request: Running, pace: Pace) -> tuple[float, ...]:
    """A decode's column. Under its pace token ``i`` is due at ``BEGIN + i * TPOT``, as
    :meth:`Running.due_s` says, or at ``LAST + TPOT`` where ``BEGIN`` is NaN."""
    targets, first_s, last_s = request.targets, request.first_token_s, request.last_token_s
    assert targets is not None
    if pace == "cumulative" or first_s is None or last_s is None:
        begin_s = targets.paced_from_s(request.arrival_s, first_s)
    else:
        begin_s = first_s if pace == "mean" else NAN
    return (
        request.output_tokens,
        request.tokens,
        request.computed_tokens,
        request.max_output_tokens,
        request.draft_tokens,
        begin_s,
        targets.tpot_s,
        NAN if last_s is None else last_s,
    )
