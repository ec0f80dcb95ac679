"""What an engine is told about shared prefixes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Method = Literal["cascade"]


class SharedPrefixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which prefixes are read once for all requests that begin with them."""

    method: Method = "cascade"
    """``cascade``: attention over the prefix for all requests together, merged with that over what is their
    own."""
    least_blocks: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    """Blocks that a prefix has beyond any other prefix that is read at once, for it to be worth a part of its
    own."""
    least_requests: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = 2
    """Requests that begin with it."""
    least_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """Of what a step reads: what must be saved, or the step is stock's."""
    log_steps: Annotated[int, msgspec.Meta(ge=0)] = 1000
    """Steps that shared a prefix between two lines of the log; 0 for none."""
