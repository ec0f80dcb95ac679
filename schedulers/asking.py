"""Who asks, and how soon the answer is wanted: what a request says of itself, judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.schedulers.config import LARGEST_WEIGHT, LEAST_WEIGHT
from penstock.schedulers.waiting import UNNAMED

CLIENT_ID = "client_id"
WEIGHT = "weight"
TTFT_SLO_MS = "ttft_slo_ms"
TPOT_SLO_MS = "tpot_slo_ms"
LARGEST_SLO_MS = 86_400_000.0
"""One day."""

SHOWN_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Asking:
    """What a request asks for. Targets are in milliseconds: to the first token, and for each one after it."""

    client: str = UNNAMED
    weight: float = 1.0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None


class AskingError(ValueError):
    """A value that a request may not ask with; ``field`` is the name it was given under."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = repr(given) if _is_small(given) else f"{type(given).__name__} too large to show"
        super().__init__(f"{field}: given {shown}, allowed: {allowed}")
        self.field = field


def asking(extra_args: Mapping[str, Any], *, longest_client_id: int) -> Asking:
    """Read ``client_id``, ``weight``, ``ttft_slo_ms`` and ``tpot_slo_ms``; other keys are not looked at.

    ``longest_client_id`` is in bytes of UTF-8. A key that is absent or None keeps its default.

    Raises:
        AskingError: for the first value that is not allowed.
    """
    found, errors = forgiving(extra_args, longest_client_id=longest_client_id)
    if errors:
        raise errors[0]
    return found


def forgiving(
    extra_args: Mapping[str, Any], *, longest_client_id: int
) -> tuple[Asking, tuple[AskingError, ...]]:
    """As ``asking``, but a bad value becomes the default, and the errors come back beside the rest."""
    values: dict[str, Any] = {}
    errors: list[AskingError] = []
    for field, (attribute, read) in READERS.items():
        value = extra_args.get(field)
        if value is None:
            continue
        try:
            values[attribute] = read(field, value, longest_client_id)
        except AskingError as error:
            errors.append(error)
    return (Asking(**values) if values else NOTHING_ASKED), tuple(errors)


NOTHING_ASKED = Asking()


def client_id(field: str, value: object, longest: int) -> str:
    """A client's id: printable text of at most ``longest`` bytes; the empty one names nobody.

    Raises:
        AskingError: it is none.
    """
    allowed = f"printable text of at most {longest} bytes"
    if not isinstance(value, str) or len(value) > longest or not value.isprintable():
        raise AskingError(field, value, allowed)
    if len(value.encode()) > longest:
        raise AskingError(field, value, allowed)
    return value


def weight(field: str, value: object) -> float:
    """A client's share.

    Raises:
        AskingError: it is no number within bounds.
    """
    return _number(field, value, LEAST_WEIGHT, LARGEST_WEIGHT)


def target_ms(field: str, value: object) -> float:
    """A latency target in milliseconds.

    Raises:
        AskingError: it is no positive number of at most a day.
    """
    return _number(field, value, math.ulp(0.0), LARGEST_SLO_MS)


READERS: dict[str, tuple[str, Callable[[str, Any, int], Any]]] = {
    CLIENT_ID: ("client", client_id),
    WEIGHT: ("weight", lambda field, value, _: weight(field, value)),
    TTFT_SLO_MS: ("ttft_slo_ms", lambda field, value, _: target_ms(field, value)),
    TPOT_SLO_MS: ("tpot_slo_ms", lambda field, value, _: target_ms(field, value)),
}
"""By key: the attribute that it sets, and its reader, whose last argument is the longest client id."""


def number_of(field: str, text: str) -> float:
    """The number that a header's text stands for; its bounds are not judged here.

    Raises:
        AskingError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise AskingError(field, text, "a number") from None


def _number(field: str, value: object, least: float, most: float) -> float:
    lower = "above 0" if least == math.ulp(0.0) else f"from {least:g}"
    allowed = f"a number {lower} to {most:.12g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AskingError(field, value, allowed)
    # Comparisons hold for integers beyond any float, and fail for NaN.
    if not least <= value <= most:
        raise AskingError(field, value, allowed)
    return float(value)


def _is_small(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= SHOWN_CHARACTERS
    if isinstance(value, int):
        return bool(abs(value) < 10**SHOWN_CHARACTERS)
    return value is None or isinstance(value, float)
