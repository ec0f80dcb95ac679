"""How much a client's requests generate, learned from those that have ended."""

from __future__ import annotations

WINDOW = 32
"""Ended requests after which the mean forgets: enough to be steady, few enough to follow a client."""


class RunningMean:
    """A mean that begins with a guess, which counts as one value, and forgets after ``WINDOW`` values."""

    __slots__ = ("_count", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._count = 1

    def add(self, value: float) -> None:
        """Count one more."""
        self._count = min(self._count + 1, WINDOW)
        self.value += (value - self.value) / self._count


class OutputLengths:
    """Means by client; a client of which none has ended has the mean of all.

    Args:
        guess: generated tokens of a request before any has ended.
    """

    def __init__(self, guess: float) -> None:
        self._all = RunningMean(guess)

    def expected(self, own: RunningMean | None) -> int:
        """Tokens of a client's next request."""
        return round((own or self._all).value)

    def observe(self, own: RunningMean | None, tokens: int) -> RunningMean:
        """A request ended with ``tokens``; returns the client's mean from then on."""
        own = own or RunningMean(self._all.value)
        own.add(tokens)
        self._all.add(tokens)
        return own
