"""Step-time profiles: what a step costs before anything was measured on this engine.

``T = base + token * tokens + sum(knee slope * tokens above the knee) + request * requests
+ context * context tokens + pass * draft passes``: piecewise affine, convex and rising in every feature.
"""

from __future__ import annotations

import os
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


def find_profile(name_or_file: str) -> Profile:
    """A shipped profile by name, or one from a file of ``penstock profile``.

    Raises:
        ValueError: there is neither, or the file holds no profile; with what is allowed.
    """
    found = shipped_profiles().get(name_or_file)
    if found is not None:
        return found
    file = Path(name_or_file)
    if not file.is_file():
        names = ", ".join(sorted(shipped_profiles()))
        raise ValueError(f"profile: given {name_or_file!r}, allowed: {names}, or a file of penstock profile")
    return read_profile(file)


def read_profile(file: Path) -> Profile:
    """The profile in a JSON file.

    Raises:
        ValueError: it cannot be read, or holds no profile.
    """
    try:
        found = msgspec.json.decode(file.read_bytes(), type=Profile)
    except OSError as error:
        raise ValueError(f"profile: {file} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Without the form in which a configuration's errors say where they are.
        said = str(error).replace("`", "").replace(", got ", ", not ")
        raise ValueError(f"profile: {file} is no step-time profile: {said}") from error
    if not found.base_s + found.token_s:
        raise ValueError(f"profile: {file} has base_s and token_s 0, allowed: one above 0")
    return found


def write_profile(file: Path, profile: Profile) -> None:
    """Write a profile as :func:`read_profile` takes it; a reader never sees half a file.

    Raises:
        OSError: it cannot be written.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    draft.replace(file)
