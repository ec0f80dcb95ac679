"""What a policy counts, shown on ``/metrics`` and in the log by the scheduler's own process.

SGLang's processes write their series to files that the server reads, so the scheduler needs no one to carry
its statistics. Each series is there twice: under the name that it has on every engine, by ``engine``, and
under SGLang's (``sglang:...``), with the labels of SGLang's own series.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from penstock.schedulers.client_service import EXPORT_INTERVAL_S, LOG_INTERVAL_S
from penstock.schedulers.waiting import Clock

PREFIX = "sglang:"


class Source(Protocol):
    """Where the numbers come from."""

    def payload(self) -> dict[str, Any]:
        """What the series show."""

    def line(self) -> str:
        """What the log shows; nothing if it is empty."""


class Gauges(Protocol):
    """The series of one kind of policy."""

    def show(self, payload: dict[str, Any], *engine: str) -> None:
        """Replace what is shown of one engine."""


MakeGauges = Callable[..., Gauges]
"""With a prefix of names and the names of the labels that say which engine it is."""


class Publisher:
    """Publishes at most once a second while passes are made, and when the engine falls idle.

    ``labels`` are SGLang's; None where metrics are off, and only the log has a line every ten seconds. Of
    several ranks one ``leads``: it writes to the log, and the series that do not say of which rank they are.
    ``settle`` counts what is due, before each time and also where nothing is shown: it may change what is
    counted later, and ranks must not come to differ.
    """

    def __init__(
        self,
        source: Source,
        make_gauges: MakeGauges,
        labels: Mapping[str, Any] | None,
        clock: Clock,
        logger: logging.Logger,
        *,
        leads: bool = True,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._leads = leads
        self._settle = settle
        self._clock = clock
        self._logger = logger
        self._shown: list[tuple[Gauges, tuple[str, ...]]] = []
        if labels is not None:
            named = tuple(str(value) for value in labels.values())
            self._shown = [(make_gauges(PREFIX, tuple(labels)), named)]
            if leads:
                self._shown.append((make_gauges(), (str(labels.get("dp_rank", 0)),)))
        self._published_s = self._logged_s = clock()
        self._unpublished = False

    def passed(self) -> None:
        """A pass came back."""
        self._unpublished = True
        if self._clock() - self._published_s >= EXPORT_INTERVAL_S:
            self._publish()

    def idle(self) -> None:
        """There is nothing to do: what was not published yet would stay so until the next request."""
        if self._unpublished:
            self._publish()

    def _publish(self) -> None:
        now = self._clock()
        self._published_s, self._unpublished = now, False
        self._settle()
        if self._shown:
            payload = self._source.payload()
            for gauges, engine in self._shown:
                gauges.show(payload, *engine)
        if self._leads and now - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now
            if line := self._source.line():
                self._logger.info("penstock: %s", line)
