"""What a run was worth: throughput, hit rate, latencies, and targets met under three readings of TPOT.

Throughput is over the makespan of a run to completion, so that no policy gains from what it leaves undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

from penstock.simulation.records import Served

TpotRule = Literal["deadline", "mean", "gap"]
TPOT_RULES: tuple[TpotRule, ...] = ("deadline", "mean", "gap")


def jain(shares: Sequence[float]) -> float:
    """Jain's index of a non-empty sample: 1 if all are equal, or zero, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value of a non-empty sample that at least ``share`` of it does not exceed."""
    ordered = sorted(values)
    rank = -int(-share * len(ordered) // 1)
    return ordered[min(max(rank - 1, 0), len(ordered) - 1)]


def input_tokens(served: Iterable[Served]) -> int:
    """Prompt tokens that were asked for, cached ones included."""
    return sum(one.prompt_tokens for one in served)


def throughput(served: Sequence[Served], makespan_s: float) -> float:
    """Prompt and output tokens a second, cached prompt tokens included."""
    return (input_tokens(served) + sum(one.output_tokens for one in served)) / makespan_s


def hit_rate(served: Sequence[Served]) -> float:
    """Share of the prompt tokens that came from the prefix cache."""
    return sum(one.cached_tokens for one in served) / input_tokens(served)


def ttfts(served: Iterable[Served]) -> dict[str, list[float]]:
    """Times to first token in seconds by client, of the requests that have one."""
    found: dict[str, list[float]] = {}
    for one in served:
        if one.ttft_s is not None:
            found.setdefault(one.ask.client, []).append(one.ttft_s)
    return found


def meets_ttft(one: Served) -> bool:
    """Whether the first token came in time; a request without a target needs only to finish."""
    if one.finished_s is None or one.ttft_s is None:
        return False
    target = one.ask.ttft_slo_ms
    return target is None or one.ttft_s * 1e3 <= target


def meets_tpot(one: Served, rule: TpotRule, *, every: int = 10, tolerance: float = 0.05) -> bool:
    """Whether the tokens after the first came in time.

    ``deadline``: token ``k`` (of every ``every``, and the last) is due ``k`` targets, stretched by
    ``tolerance``, after the first token was due or came, whichever is later: early tokens bank slack
    (SLOs-Serve, arXiv 2504.08784, as evaluated). ``mean``: the mean time between tokens, as ``vllm bench
    serve`` counts it. ``gap``: the largest time between two tokens.
    """
    times, target = one.token_times, one.ask.tpot_slo_ms
    if one.finished_s is None:
        return False
    if target is None or len(times) < 2:
        return True
    if rule == "mean":
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3 <= target
    if rule == "gap":
        return max(after - before for before, after in pairwise(times)) * 1e3 <= target
    due = times[0]
    if one.ask.ttft_slo_ms is not None:
        due = max(due, one.ask.arrival_s + one.ask.ttft_slo_ms / 1e3)
    last = len(times) - 1
    checked = [*range(every, last, every), last]
    return all(times[k] <= due + k * target / 1e3 * (1 + tolerance) for k in checked)


def attains(one: Served, rule: TpotRule) -> bool:
    """Whether a request met both of its targets."""
    return meets_ttft(one) and meets_tpot(one, rule)


def attainment(
    served: Iterable[Served], rule: TpotRule, *, weigh: Callable[[Served], float] = lambda one: 1.0
) -> dict[str, float]:
    """Share of the requests that met both targets, by tier, and of all of them under ``""``.

    ``weigh`` says what a request counts, for example its tokens.
    """
    total: dict[str, float] = {}
    met: dict[str, float] = {}
    for one in served:
        weight, good = weigh(one), attains(one, rule)
        for tier in {"", one.ask.tier}:
            total[tier] = total.get(tier, 0.0) + weight
            met[tier] = met.get(tier, 0.0) + weight * good
    return {tier: met[tier] / total[tier] for tier in total if total[tier]}
