"""Step-time profiles: what a step costs before anything was measured on this engine.

``T = base + token * tokens + sum(knee slope * tokens above the knee) + request * requests
+ context * context tokens + pass * draft passes``: piecewise affine, convex and rising in every feature.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

Cost = Annotated[float, msgspec.Meta(ge=0, le=1000)]

KNEES = (512, 2048)
"""Scheduled tokens at which a step's cost per token may rise."""

FILE = Path(__file__).with_name("profiles.json")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of a step, and for each token, token above a knee, request, context token and draft pass."""

    base_s: Cost
    token_s: Cost
    knees_s: tuple[Cost, Cost] = (0.0, 0.0)
    request_s: Cost = 0.0
    context_s: Cost = 0.0
    pass_s: Cost = 0.0
    source: str = ""

    @property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of the model's columns."""
        return (self.base_s, self.token_s, *self.knees_s, self.request_s, self.context_s, self.pass_s)


@cache
def shipped_profiles() -> dict[str, Profile]:
    """The profiles that come with the package, by name."""
    return msgspec.json.decode(FILE.read_bytes(), type=dict[str, Profile])


def find_profile(name: str) -> Profile:
    """A shipped profile.

    Raises:
        ValueError: there is none of that name.
    """
    found = shipped_profiles().get(name)
    if found is None:
        raise ValueError(f"profile: given {name!r}, allowed: {', '.join(sorted(shipped_profiles()))}")
    return found
