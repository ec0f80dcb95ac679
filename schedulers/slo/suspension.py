"""How long each running request was passed over in a row, and who may not be again.

Skipping decodes that have slack, and prompts that are late, buys time for others; without a bound a request
hangs (vLLM #44794 found its own starvation that way).
"""

from __future__ import annotations

from collections.abc import Iterable


class Suspensions:
    """Consecutive skipped steps and the time of the first of them, for requests passed over last time."""

    def __init__(self, most_steps: int, most_s: float) -> None:
        self._most_steps = most_steps
        self._most_s = most_s
        self._since: dict[str, tuple[int, float]] = {}
        self.longest_steps = 0
        self.longest_s = 0.0

    def must_run(self, request_id: str, now_s: float) -> bool:
        """Whether passing the request over in this step would break the bound."""
        skipped, served_s = self._since.get(request_id, (0, now_s))
        return skipped >= self._most_steps or (skipped > 0 and now_s - served_s >= self._most_s)

    def overdue(self, now_s: float) -> set[str]:
        """All of whom that is so."""
        return {name for name in self._since if self.must_run(name, now_s)}

    def record(self, skipped_ids: Iterable[str], now_s: float) -> None:
        """A step at ``now_s`` passes over these running requests; who is not among them was served."""
        since = {}
        for name in skipped_ids:
            skipped, served_s = self._since.get(name, (0, now_s))
            since[name] = (skipped + 1, served_s)
            self.longest_steps = max(self.longest_steps, skipped + 1)
            self.longest_s = max(self.longest_s, now_s - served_s)
        self._since = since

    def clock_stepped_back(self, now_s: float) -> None:
        """No one was served later than now."""
        self._since = {name: (skipped, min(s, now_s)) for name, (skipped, s) in self._since.items()}

    def check_integrity(self) -> None:
        """Assert the bound on steps."""
        assert all(skipped <= self._most_steps for skipped, _ in self._since.values())
