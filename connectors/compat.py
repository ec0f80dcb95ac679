"""What two engines must agree on before KV bytes of one mean anything to the other."""

from __future__ import annotations

from typing import Annotated

import msgspec

from penstock.connectors.errors import IncompatibleError

PROTOCOL = 1
"""Version of the control messages and of the meaning of a hand-off."""

Name = Annotated[str, msgspec.Meta(max_length=512)]


class CompatibilityRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Compared field by field at the handshake; every field must be equal.

    Fields of a later protocol are skipped, so that the two ``protocol`` numbers still meet and are named.
    """

    protocol: int = PROTOCOL
    engine: Name
    """Engine name and minor version, for example ``vllm 0.32``: KV packing may change between minors."""
    model: Name
    cache_dtype: Name
    block_size: int
    """Tokens a block."""
    tensor_parallel_size: int
    num_layers: int
    num_kv_heads: int
    """KV heads a rank."""
    head_size: int
    layout: Name
    """Order of layers, blocks, heads, tokens and content in memory, for example ``BLHNC``."""
    attention_backend: Name
    packing: Name
    """How a kernel stores K and V inside a page: ``logical``, or the name of an opaque packing."""
    layer_order: Name
    """Fingerprint of the layers' names in address order: equal strips of two engines hold the same layers."""
    strip_widths: Annotated[tuple[int, ...], msgspec.Meta(max_length=4096)]
    """Bytes a block in each strip (see ``geometry``)."""
    digest: Name
    """Algorithm and sampling of the block digests, or ``off``."""


class Mismatch(msgspec.Struct, frozen=True):
    """One field on which two records differ, with both values as text."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field} is {self.ours} here and {self.theirs} at the peer"


def mismatches(ours: CompatibilityRecord, theirs: CompatibilityRecord) -> list[Mismatch]:
    """Every field on which the two records differ, in declaration order."""
    return [
        Mismatch(name, repr(getattr(ours, name)), repr(getattr(theirs, name)))
        for name in ours.__struct_fields__
        if getattr(ours, name) != getattr(theirs, name)
    ]


def require_compatible(ours: CompatibilityRecord, theirs: CompatibilityRecord, peer: str) -> None:
    """Raise :class:`IncompatibleError` naming every differing field, unless the records are equal."""
    if differing := mismatches(ours, theirs):
        raise IncompatibleError(f"cannot exchange KV with {peer}: " + "; ".join(map(str, differing)))
