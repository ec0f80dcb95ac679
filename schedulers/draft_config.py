"""Configuration of draft lengths: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Worth = Annotated[float, msgspec.Meta(ge=0, le=10)]


class SpeculationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of draft lengths. Worth is relative to that of a token which a request needs for its pace."""

    profile: str = "h100-13b"
    """Step-time profile to start from, a shipped one by name or a file that ``penstock profile`` wrote; the
    model corrects it online."""
    least_gain: Share = 0.01
    """Drafts are left out where they are expected to raise worth a second by less."""
    probe_share: Share = 0.01
    """Time, of all that is served, that may go into drafts which are only to show whether drafts pay."""
    spare_worth: Worth = 0.5
    """A token ahead of the pace that ``tpot_slo_ms`` asks for, and any token of a request without it."""
    prompt_worth: Worth = 0.2
    """A prompt token that a draft token leaves no room for in the step."""
