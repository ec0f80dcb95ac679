"""When requests come: seeded processes, and the Azure LLM inference traces."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


def gamma_arrivals(rate: float, count: int, rng: random.Random, *, cv: float = 1.0) -> list[float]:
    """``count`` times in seconds at ``rate`` a second, with gamma-distributed gaps.

    ``cv`` is the gaps' coefficient of variation: 1 is a Poisson process; 0 is evenly spaced.

    Raises:
        ValueError: the rate is not positive or ``cv`` is negative.
    """
    if not rate > 0 or cv < 0:
        raise ValueError(f"given rate {rate} and cv {cv}; allowed: a positive rate, cv 0 or more")
    now, times = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(cv**-2, cv**2 / rate) if cv else 1 / rate
        times.append(now)
    return times


@dataclass(frozen=True, slots=True)
class TimedLengths:
    """One request of an Azure trace: seconds since the trace began, and lengths in tokens."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


def read_azure(path: Path) -> list[TimedLengths]:
    """Read an Azure LLM inference trace (CSV, gzipped or not), in order of arrival.

    Raises:
        ValueError: a line is not a request, with the line's number.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    found: list[TimedLengths] = []
    begin: float | None = None
    with opener(path, "rt", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                time_s = _seconds(row["TIMESTAMP"])
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not an Azure request ({error!r})") from error
            begin = time_s if begin is None else begin
            found.append(TimedLengths(time_s - begin, *lengths))
    return sorted(found, key=lambda one: one.arrival_s)


def _seconds(timestamp: str) -> float:
    """Seconds of ``2023-11-16 18:15:46.6805900``, which has a digit more than Python's microseconds."""
    whole, _, fraction = timestamp.partition(".")
    return (datetime.fromisoformat(whole) - datetime(2023, 1, 1)).total_seconds() + float(
        f"0.{fraction or 0}"
    )


def window(trace: Sequence[TimedLengths], first: int, count: int) -> list[TimedLengths]:
    """``count`` requests from the ``first`` on, timed from the first of them.

    Raises:
        ValueError: the trace has no such window.
    """
    if first < 0 or count < 1 or first + count > len(trace):
        raise ValueError(f"given requests {first} to {first + count}, allowed: one or more of {len(trace)}")
    part = trace[first : first + count]
    return [_at(one, one.arrival_s - part[0].arrival_s) for one in part]


def at_rate(trace: Sequence[TimedLengths], rate: float) -> list[TimedLengths]:
    """The same requests with the gaps stretched or shrunk so that ``rate`` come a second in the mean.

    Raises:
        ValueError: the rate is not positive, or the trace has no length in time.
    """
    span = trace[-1].arrival_s - trace[0].arrival_s if trace else 0.0
    if not rate > 0 or not span > 0:
        raise ValueError(f"given rate {rate} and a trace of {span} s; allowed: both positive")
    factor = (len(trace) - 1) / span / rate
    return [_at(one, one.arrival_s * factor) for one in trace]


def _at(one: TimedLengths, arrival_s: float) -> TimedLengths:
    return TimedLengths(arrival_s, one.input_tokens, one.output_tokens)


def zipf_choices(choices: int, count: int, rng: random.Random, *, exponent: float = 1.0) -> Iterator[int]:
    """``count`` numbers below ``choices``; number ``k`` comes in proportion to ``(k + 1) ** -exponent``."""
    weights = [(k + 1) ** -exponent for k in range(choices)]
    return iter(rng.choices(range(choices), weights, k=count))
