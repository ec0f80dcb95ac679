"""Who was served how much while all of them wanted more.

Service is counted as a step executes it: extend tokens (prompt tokens that the prefix cache did not hold)
once, output tokens twice, as DLPM does (arXiv 2501.14312). Recomputation after a preemption counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.simulation.engine import Step
from penstock.simulation.measures import jain

EXTEND_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class FairnessMeter:
    """Observes a run. A client is backlogged in a step if some request of it waits before and after.

    ``client_weights`` are the shares that clients are due, 1 each if not given: service is divided by them.
    """

    def __init__(self, clients: Sequence[str], client_weights: Sequence[float] | None = None) -> None:
        self.clients = tuple(clients)
        self._index = {client: number for number, client in enumerate(self.clients)}
        n = len(self.clients)
        self._due = np.ones(n) if client_weights is None else np.asarray(client_weights, dtype=np.float64)
        self.service = np.zeros(n)
        """Weighted service of each client over the whole run."""
        self.backlogged_s = 0.0
        """How long all clients were backlogged at once."""
        self._shared = {"extend": np.zeros(n), "service": np.zeros(n), "input": np.zeros(n)}
        self._was_backlogged = np.zeros(n, dtype=bool)
        self._low = np.zeros((n, n))
        self._high = np.zeros((n, n))
        self.largest_gap = 0.0
        """Largest ``|W_f - W_g|`` over any time in which both clients were backlogged, weighted tokens."""
        self.largest_batch = 0.0
        """Largest service that the requests of one step take in all, from their first token to the last."""

    def stepped(self, step: Step) -> None:
        """Count one step."""
        n = len(self.clients)
        extends, hits, outputs = [0] * n, [0] * n, [0] * n
        batch = 0.0
        for part in step.rows:
            ask = part.served.ask
            client = self._index[ask.client]
            extends[client] += part.extend_tokens
            hits[client] += part.cached_tokens
            outputs[client] += step.output_tokens.get(ask.request_id, 0)
            batch += part.served.prompt_tokens - part.served.cached_tokens + OUTPUT_WEIGHT * ask.output_tokens
        self.largest_batch = max(self.largest_batch, batch)
        extend, cached, output = (np.array(counts, dtype=np.float64) for counts in (extends, hits, outputs))
        served = (EXTEND_WEIGHT * extend + OUTPUT_WEIGHT * output) / self._due
        self.service += served
        waiting = step.waiting
        backlogged = np.array([waiting.get(client, 0) > 0 for client in self.clients])
        both = backlogged & self._was_backlogged
        if both.all():
            self.backlogged_s += step.end_s - step.begin_s
            self._shared["extend"] += extend / self._due
            self._shared["service"] += served
            self._shared["input"] += (extend + cached) / self._due
        self._follow_gaps(both)
        self._was_backlogged = backlogged

    def _follow_gaps(self, both: NDArray[np.bool_]) -> None:
        """Within an interval the gap is the range of the difference, so its extremes are all one needs."""
        difference = self.service[:, None] - self.service[None, :]
        pairs = both[:, None] & both[None, :]
        np.minimum(self._low, difference, out=self._low)
        np.maximum(self._high, difference, out=self._high)
        np.copyto(self._low, difference, where=~pairs)
        np.copyto(self._high, difference, where=~pairs)
        self.largest_gap = max(self.largest_gap, float((self._high - self._low).max(initial=0.0)))

    def service_while_all_wait(self) -> float:
        """Weighted service of the mean client while all were backlogged: what Jain's indices are taken of."""
        return float(self._shared["service"].mean())

    def jain_extend(self) -> float:
        """Jain's index of extend tokens while all clients were backlogged; 1 if they never were."""
        return jain(self._shared["extend"].tolist())

    def jain_service(self) -> float:
        """Jain's index of weighted service while all clients were backlogged."""
        return jain(self._shared["service"].tolist())

    def jain_input(self) -> float:
        """Jain's index of whole prompts, cached tokens included, while all clients were backlogged."""
        return jain(self._shared["input"].tolist())
