"""What a P/D pair of SGLang servers must agree on, read off one rank's pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sglang
from sglang.srt.runtime_context import get_parallel

from penstock.connectors.compat import CompatibilityRecord
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang.kv_pool import RegionPool, pool_at

if TYPE_CHECKING:
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

    from penstock.connectors.geometry import CacheGeometry


def pool_of(args: KVArgs) -> RegionPool:
    """The pool that SGLang asks to transfer.

    Raises:
        ConfigurationError: the model's cache is more than one pool of plain K and V.
    """
    pool = pool_at(args.kv_data_ptrs[0]) if args.kv_data_ptrs else None
    if pool is None or args.state_types or args.num_draft_entries:
        states = ", ".join(state.value for state in args.state_types) or "none"
        raise ConfigurationError(
            "flowkv moves models whose cache is one pool of plain K and V (MHA, GQA); this one has other "
            f"pools, states ({states}) or {args.num_draft_entries} buffers of a draft model"
        )
    return pool


def record_of(
    args: KVArgs, server_args: ServerArgs, pool: RegionPool, geometry: CacheGeometry, digest: str
) -> CompatibilityRecord:
    """What a peer must match."""
    return CompatibilityRecord(
        engine="sglang " + ".".join(sglang.__version__.split(".")[:2]),
        model=str(server_args.model_path),
        cache_dtype=f"{args.kv_cache_dtype_str} as {pool.store_dtype}",
        block_size=args.page_size,
        tensor_parallel_size=get_parallel().attn_tp_size,
        num_layers=pool.layer_num,
        num_kv_heads=pool.head_num,
        head_size=pool.head_dim,
        layout=pool.layout,
        # The pool is SGLang's, not the backend's: all that take this one read the same bytes.
        attention_backend="any",
        packing=pool.kv_cache_layout,
        layer_order=f"{pool.start_layer} to {pool.start_layer + pool.layer_num}",
        strip_widths=tuple(strip.width for strip in geometry.strips),
        digest=digest,
    )
