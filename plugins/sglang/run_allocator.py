"""SGLang's paged allocator with pages that lie together: the run allocator decides which are handed out.

Stock hands out the first free pages of a list. Here the list that stock's own code takes from holds exactly
the pages chosen for the call, so its kernels, on any device, write the same indices for other pages. What is
free is known on the host: pages that were freed on a device are fetched when pages run short or a prompt
needs some, never in a decode step that finds enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from penstock.connectors.allocator import AllocatorConfig, AllocatorStats, RunAllocator
from penstock.connectors.runs import blocks_of

CONFIG = AllocatorConfig(most_slack=0)
"""Nothing is reserved for growth: SGLang does not say which request a decode step's page is for."""


class RunPagedAllocator(PagedTokenToKVPoolAllocator):
    """``PagedTokenToKVPoolAllocator`` that prefers runs. Admits exactly what stock admits.

    ``epochs`` counts, for each page, how often it was handed out; the pool gets the same array.
    """

    spare = 0.025
    """Share of the pool that the prefix cache gives up beyond what is lacking: windows are chosen among what
    is free."""
    epochs: npt.NDArray[np.uint32]
    free_pages: torch.Tensor
    staged_pages: list[torch.Tensor]
    num_staged_pages: int

    @property
    def stats(self) -> AllocatorStats:
        """The run allocator's counters since the pool was last cleared."""
        return self._runs.stats

    def clear(self) -> None:
        """All pages are free."""
        super().clear()
        if not hasattr(self, "epochs"):
            self.epochs = np.zeros(self.num_pages + 1, dtype=np.uint32)
            self._kvcache.epochs = self.epochs
        self.free_pages = self.free_pages[:0]
        self._runs = RunAllocator(self.num_pages + 1, CONFIG)
        self._runs.release(range(1, self.num_pages + 1), worthless=True)
        self._behind: dict[int, object] = {}
        """Whose last page a page is: what continues behind it is of the same prompt."""

    def resize(self, config: Any) -> None:
        """Refused: pages that leave the pool may be promised to a reader.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("FlowKV's allocator keeps its size; leave post-capture KV sizing off")

    def available_size(self) -> int:
        """Tokens that free pages hold."""
        return (self._runs.num_free + self.num_staged_pages) * self.page_size

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """As stock's, but where the prefix cache must give something up, it gives up ``spare`` more.

        Stock frees what an allocation lacks and no more, so that it takes every hole there is.
        """
        if num_tokens > self.available_size():
            num_tokens += int(self.num_pages * self.spare) * self.page_size
        return super().evict_to_free_tokens(tree_cache, num_tokens)

    def get_all_free_pages(self) -> torch.Tensor:
        """Ids of all free pages, in ascending order."""
        self._take_back()
        return torch.tensor(list(blocks_of(self._runs.free_runs())), dtype=torch.int64, device=self.device)

    def merge_and_sort_free(self) -> None:
        """Nothing to do: stock calls this where its list is shorter than what it may need at most."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token indices of ``need_size`` tokens in whole pages, or None."""
        return self._allocate([need_size // self.page_size], partial(super().alloc, need_size))

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """As stock's: token indices of a batch's new tokens, request after request, or None."""
        held = self._pages_of(prefix_lens_cpu)
        counts = [after - before for after, before in zip(self._pages_of(seq_lens_cpu), held, strict=True)]
        lasts = (last_loc // self.page_size).tolist() if any(held) else [-1] * len(held)
        allocate = partial(
            super().alloc_extend,
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages,
        )
        self._take_back()
        return self._allocate(counts, allocate, list(zip(held, lasts, strict=True)))

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """As stock's: one token index a request, or None."""
        new = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        return self._allocate([new], partial(super().alloc_decode, seq_lens, seq_lens_cpu, last_loc))

    def _allocate(
        self,
        counts: Sequence[int],
        allocate: Callable[[], torch.Tensor | None],
        behind: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor | None:
        """Choose pages for each request and let stock's code take exactly these.

        ``behind`` holds, for each request, how many pages it has and the last of them.
        """
        if sum(counts) > self._runs.num_free:
            self._take_back()
        if sum(counts) > self._runs.num_free:
            return None
        if behind:
            chosen = [
                page
                for n, (held, last) in zip(counts, behind, strict=True)
                for page in self._continue(n, held, last)
            ]
        else:
            chosen = self._runs.allocate(sum(counts))
        self.epochs[chosen] += 1
        # One page more than is taken: stock's gathers need a row to point at where nothing is needed.
        self.free_pages = torch.tensor([*chosen, 0], dtype=torch.int64, device=self.device)
        indices = allocate()
        self.free_pages = self.free_pages[:0]
        return indices

    def _continue(self, count: int, held: int, last: int) -> list[int]:
        """Pages for a prompt that has ``held``, behind the last of them where they are free."""
        if not count:
            return []
        key = self._behind.pop(last, None) if held else None
        key = object() if key is None else key
        pages = self._runs.allocate(count, key, held)
        self._behind[pages[-1]] = key
        return pages

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        self.staged_pages.extend(page_ids)
        self.num_staged_pages += sum(ids.numel() for ids in page_ids)

    def _take_back(self) -> None:
        """Hand pages that were freed since the last time back to the run allocator."""
        if not self.staged_pages:
            return
        pages = torch.cat(self.staged_pages).sort().values.tolist()
        self.staged_pages, self.num_staged_pages = [], 0
        for page in self._behind.keys() & pages:
            self._runs.forget(self._behind.pop(page))
        self._runs.release(pages, worthless=True)

    def _pages_of(self, lengths: torch.Tensor) -> list[int]:
        pages: list[int] = ((lengths + self.page_size - 1) // self.page_size).tolist()
        return pages
