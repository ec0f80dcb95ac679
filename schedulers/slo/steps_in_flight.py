"""Steps that were scheduled and have not come back: how long they take, and when the next one will begin."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from penstock.schedulers.slo.step_time import StepFeatures

MOST_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Flight:
    """One step of the model, by the object that the engine knows it by."""

    output: object
    features: StepFeatures
    predicted_s: float
    scheduled_s: float


class StepsInFlight:
    """First in, first out, as an engine with overlap runs them. Times are on the planner's clock."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque(maxlen=MOST_IN_FLIGHT)
        self._ended_s = float("-inf")

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self, output: object, features: StepFeatures, predicted_s: float, now_s: float) -> None:
        """A step was scheduled. One without tokens runs no model and is not followed."""
        if features.tokens:
            self._flights.append(Flight(output, features, predicted_s, now_s))

    def end(self, output: object, now_s: float) -> tuple[Flight, float] | None:
        """The step of ``output`` came back; returns it with its seconds, from the end of the one before.

        None if it is not followed. Steps scheduled before it that never came back are dropped.
        """
        if not any(flight.output is output for flight in self._flights):
            return None
        flight = self._flights.popleft()
        while flight.output is not output:
            flight = self._flights.popleft()
        began_s = max(flight.scheduled_s, self._ended_s) if self._ended_s <= now_s else flight.scheduled_s
        self._ended_s = now_s
        return flight, now_s - began_s

    def left_s(self, now_s: float) -> float:
        """Seconds that the steps in flight will still take, as predicted."""
        if not self._flights:
            return 0.0
        first_s = max(self._flights[0].scheduled_s, self._ended_s)
        predicted_s = sum(flight.predicted_s for flight in self._flights)
        return min(predicted_s, max(0.0, first_s + predicted_s - now_s))

    def first_end_s(self, now_s: float) -> float:
        """When the first of them comes back, as predicted; now where none is in flight."""
        if not self._flights:
            return now_s
        first = self._flights[0]
        return max(now_s, max(first.scheduled_s, self._ended_s) + first.predicted_s)
