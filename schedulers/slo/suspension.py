"""How long each running request was passed over in a row, and who may not be again.

Skipping decodes that have slack, and prompts that are late, buys time for others; without a bound a request
hangs (vLLM #44794 found its own starvation that way).
"""

from __future__ import annotations

from collections.abc import Iterable


class Suspensions:
    """For requests passed over last time, since which step they are, and the time of that.

    Who is passed over goes on being so without a change, and the first to be so tells whether anybody is
    overdue: hundreds may be passed over in one step.
    """

    def __init__(self, most_steps: int, most_s: float) -> None:
        self._most_steps = most_steps
        self._most_s = most_s
        self._steps = 0
        self._since: dict[str, tuple[int, float]] = {}
        self._first = (0, 0.0)
        """The least of these, if there are any."""
        self.longest_steps = 0
        self.longest_s = 0.0

    def must_run(self, request_id: str, now_s: float) -> bool:
        """Whether passing the request over in this step would break the bound."""
        since = self._since.get(request_id)
        return since is not None and self._is_long(since, now_s)

    def overdue(self, now_s: float) -> set[str]:
        """All of whom that is so."""
        if not self._since or not self._is_long(self._first, now_s):
            return set()
        return {name for name, since in self._since.items() if self._is_long(since, now_s)}

    def _is_long(self, since: tuple[int, float], now_s: float) -> bool:
        step, time_s = since
        return self._steps - step >= self._most_steps or now_s - time_s >= self._most_s

    def record(self, skipped_ids: Iterable[str], now_s: float) -> None:
        """A step at ``now_s`` passes over these running requests; who is not among them was served."""
        from_now, before = (self._steps, now_s), self._since
        self._steps += 1
        self._since = {name: before.get(name, from_now) for name in skipped_ids}
        if self._since:
            self._first = min(self._since.values())
            self.longest_steps = max(self.longest_steps, self._steps - self._first[0])
            self.longest_s = max(self.longest_s, now_s - self._first[1])

    def clock_stepped_back(self, now_s: float) -> None:
        """No one was served later than now."""
        self._since = {name: (step, min(time_s, now_s)) for name, (step, time_s) in self._since.items()}
        self._first = min(self._since.values(), default=self._first)

    def check_integrity(self) -> None:
        """Assert the bound on steps."""
        assert all(self._steps - step <= self._most_steps for step, _ in self._since.values())
