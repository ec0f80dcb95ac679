"""Which summaries of blocks still hold: those of blocks that no request was given since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    import torch


class Index(Protocol):
    """Summaries of ``blocks`` blocks, by number."""

    @property
    def blocks(self) -> int:
        """How many it can tell apart."""

    def forget(self, blocks: torch.Tensor) -> None:
        """Drop those of ``blocks`` (int64 [P])."""


_indexes: WeakSet[Index] = WeakSet()


def register(index: Index) -> None:
    """Have ``index`` forget blocks as they are handed out, for as long as it lives."""
    _indexes.add(index)


def hear(runner: Any, scheduler_output: Any) -> None:
    """Forget the summaries of all blocks that a step hands out (``handed_out_blocks.watching``).

    A full block that a running request holds is written by nobody. It becomes another's only by passing
    through here, and a KV connector fills only blocks that its request does not run with yet. Several
    engines in one process forget each other's blocks too: that costs a summary, never a wrong one.
    """
    if not _indexes:
        return
    blocks = sorted(set(handed_out(scheduler_output, _cached_tokens_stand(), _block_tokens(runner))))
    if not blocks:
        return
    # Not before there is an index: the list of features is read where torch need not be.
    import torch

    numbers = torch.tensor(blocks)
    for index in _indexes:
        # One block of the manager may be several of the kernel.
        split = max(1, index.blocks // runner.kv_cache_config.num_blocks)
        spread = (numbers[:, None] * split + torch.arange(split)).flatten()
        index.forget(spread[spread < index.blocks])


def handed_out(scheduler_output: Any, cached_stand: bool, block_tokens: list[int]) -> Iterator[int]:
    """Numbers of the blocks that requests are given in a step.

    With ``cached_stand``, those that a new request has from the prefix cache are left out: they are as the
    request that filled them left them. ``block_tokens`` are the tokens of a block in each KV cache group.
    """
    for new in scheduler_output.scheduled_new_reqs:
        for blocks, size in zip(new.block_ids, block_tokens, strict=True):
            yield from blocks[new.num_computed_tokens // size if cached_stand else 0 :]
    for groups in scheduler_output.scheduled_cached_reqs.new_block_ids:
        for blocks in groups or ():
            yield from blocks


def _cached_tokens_stand() -> bool:
    # To a connector's request, tokens count as computed that came from elsewhere.
    from vllm.distributed.kv_transfer.kv_transfer_state import has_kv_transfer_group

    return not has_kv_transfer_group()


def _block_tokens(runner: Any) -> list[int]:
    return [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
