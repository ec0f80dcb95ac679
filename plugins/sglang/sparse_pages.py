"""Which summaries of pages still hold: those of pages that were handed to nobody since.

What is in a page that somebody holds does not change but at its end, which has no summary yet. It gets other
contents only after SGLang's allocator handed it out again, whoever writes them then: a prompt, a transfer
from a prefill server, or a copy that comes back after a retraction. The prefix cache hands a page on without
the allocator, and so with its summary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

    from penstock.kernels.sparse.block_index import BlockIndex

_indexes: WeakKeyDictionary[Any, list[BlockIndex]] = WeakKeyDictionary()
"""Those of each pool's layers."""


def register(pool: Any, index: BlockIndex) -> None:
    """Have ``index`` forget pages of ``pool`` as they are handed out, for as long as the pool lives."""
    _indexes.setdefault(pool, []).append(index)


def allocate(
    original: Callable[..., torch.Tensor | None], allocator: Any, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    """Around the methods of ``PagedTokenToKVPoolAllocator`` that hand slots out."""
    slots = original(allocator, *args, **kwargs)
    if slots is not None and (indexes := _indexes.get(allocator.get_kvcache())):
        # A page is begun at its start; what goes on within one belongs to who holds it.
        starts = slots[slots % allocator.page_size == 0]
        if len(starts):
            pages = starts // allocator.page_size
            for index in indexes:
                index.forget(pages)
    return slots
