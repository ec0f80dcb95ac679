"""The sparse backend over SGLang's own pool, allocator and layers, without a server."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from penstock.kernels.sparse.serving import ServingConfig
from penstock.plugins.sglang import kv_pool, sparse_layers, sparse_pages
from penstock.plugins.sglang.sparse_backend import TacticBackend

PAGE, PAGES, HEADS, GROUP, SIZE, LAYERS = 4, 96, 2, 2, 16, 3
LEAST = 40
CONFIG = ServingConfig(
    least_tokens=LEAST, dense_layers=1, mass=0.6, most_share=0.95, recent_tokens=4, sink_tokens=1, log_steps=0
)
HANDING_OUT = ("alloc", "alloc_extend", "alloc_decode")


def hook(patch: pytest.MonkeyPatch) -> None:
    """Wrap the allocator as the feature does, and stand in for what a server knows of its settings."""
    for name in HANDING_OUT:
        original = getattr(PagedTokenToKVPoolAllocator, name)

        def wrapped(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            return sparse_pages.allocate(original, self, *args, **kwargs)

        patch.setattr(PagedTokenToKVPoolAllocator, name, wrapped)
    patch.setattr(sparse_layers, "attention_backends", lambda: ("torch_native", "tactic"))
    patch.setattr(kv_pool, "wanted_layout", lambda: "tokens")


def make_pool(kind: type[MHATokenToKVPool], dtype: torch.dtype = torch.float32) -> MHATokenToKVPool:
    pool = kind(
        size=PAGE * PAGES,
        page_size=PAGE,
        dtype=dtype,
        head_num=HEADS,
        head_dim=SIZE,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        if buffer.is_floating_point():
            buffer.fill_(math.nan)
    return pool


def layer(number: int = 0, **named: Any) -> RadixAttention:
    return RadixAttention(HEADS * GROUP, SIZE, SIZE**-0.5, HEADS, number, **named)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Rig:
    """A backend, its pool and allocator, and requests whose keys and values are random."""

    def __init__(
        self,
        seed: int = 0,
        pool: type[MHATokenToKVPool] = MHATokenToKVPool,
        allocator: type[PagedTokenToKVPoolAllocator] = PagedTokenToKVPoolAllocator,
        dtype: torch.dtype = torch.float32,
        config: ServingConfig = CONFIG,
        layers: list[RadixAttention] | None = None,
    ) -> None:
        self.pool = make_pool(pool, dtype)
        self.allocator = allocator(PAGE * PAGES, PAGE, dtype, "cpu", self.pool, True)
        self.table = torch.zeros(16, PAGE * PAGES, dtype=torch.int32)
        self.layers = layers or [layer(number) for number in range(LAYERS)]
        runner = SimpleNamespace(
            device="cpu",
            model=torch.nn.ModuleList(self.layers),
            page_size=PAGE,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=self.allocator,
            use_mla_backend=False,
        )
        self.backend = TacticBackend(runner, config)
        self.stock = TorchNativeAttnBackend(runner)
        self.draw = torch.Generator().manual_seed(seed)

    def write(self, slots: torch.Tensor) -> None:
        """New contents, of no prompt and no transfer in particular."""
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer[slots] = torch.randn(len(slots), HEADS, SIZE, generator=self.draw).to(buffer.dtype)

    def extend(self, held: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """``held`` slots of a request, and those of more tokens, written; None if there is no room."""
        before, after = ids(len(held)), ids(len(held) + tokens)
        last = held[-1:] if len(held) else ids(-1)
        found = self.allocator.alloc_extend(before, before, after, after, last, tokens)
        if found is None:
            return None
        self.write(found)
        return torch.cat([held, found])

    def decode_pass(self, *requests: torch.Tensor, sparse: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """What our backend computes in layer ``sparse`` for requests whose last token decodes, and stock."""
        for row, slots in enumerate(requests):
            self.table[row, : len(slots)] = slots.int()
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            encoder_lens=None,
            req_pool_indices=torch.arange(len(requests)),
            seq_lens=ids(*map(len, requests)),
            out_cache_loc=torch.stack([slots[-1] for slots in requests]),
        )
        query, key, value = (
            torch.randn(len(requests), heads, SIZE, generator=self.draw).to(self.pool.dtype)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        given = 4 * query.flatten(1), key, value, self.layers[sparse], batch
        self.backend.init_forward_metadata(batch)
        return self.backend.forward_decode(*given), self.stock.forward_decode(*given)

    def sparse(self, number: int = 2) -> sparse_layers.SparseLayer:
        return self.backend.layers[number]


def all_pages(**named: Any) -> Rig:
    """A backend that chooses every page."""
    return Rig(config=msgspec.structs.replace(CONFIG, budget=1.0, most_share=1.0), **named)
