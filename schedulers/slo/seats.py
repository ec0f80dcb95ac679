"""Seats in the running batch and KV cache for those who come in, and whom of the best-effort to throw out.

What is thrown out keeps its generated tokens and resumes with one prefill; the last that came goes first
(SLOs-Serve's best-effort tier), and nobody more often than a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.schedulers.slo.requests import Running


class Seats:
    """Counts down what is free while requests are let in."""

    def __init__(
        self, free_kv_tokens: float, free_seats: int, victims: Sequence[Running], thrown_out: dict[str, int]
    ) -> None:
        """``victims`` are best-effort requests, the last one to go first."""
        self.free_kv_tokens = free_kv_tokens
        self.free_seats = free_seats
        self._victims = list(victims)
        self._thrown_out = thrown_out
        self.preempted: list[str] = []

    def take(self, kv_tokens: float) -> bool:
        """Whether there is a seat and room for one more; takes it."""
        if self.free_seats < 1 or self.free_kv_tokens < kv_tokens:
            return False
        self.free_seats -= 1
        self.free_kv_tokens -= kv_tokens
        return True

    def make_room(self, kv_tokens: float) -> bool:
        """Like ``take``, throwing out victims if, and only if, that makes enough room."""
        if self.take(kv_tokens):
            return True
        chosen: list[Running] = []
        freed = 0
        for victim in reversed(self._victims):
            if self.free_seats + len(chosen) >= 1 and self.free_kv_tokens + freed >= kv_tokens:
                break
            chosen.append(victim)
            freed += victim.computed_tokens
        if self.free_seats + len(chosen) < 1 or self.free_kv_tokens + freed < kv_tokens:
            return False
        for victim in chosen:
            self._victims.remove(victim)
            self.preempted.append(victim.request_id)
            self._thrown_out[victim.request_id] = self._thrown_out.get(victim.request_id, 0) + 1
        self.free_seats += len(chosen)
        self.free_kv_tokens += freed
        return self.take(kv_tokens)
