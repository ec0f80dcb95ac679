"""SGLang's KV pool in one allocation, so that a run of pages is one extent, or one a layer and side.

Stock allocates a tensor a layer: a run of pages is then ``2 * layers`` pieces in as many registrations. Here
all of them are views of one region, which is all that changes for the rest of SGLang. Two layouts:

* ``tokens``: a token's K and V of all layers lie together, so a page holds all layers. What reads and writes
  the cache must take a stride between tokens, which the torch backend does.
* ``layers``: each layer's K and V is contiguous, as stock allocates it; for every other backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_disagg, get_exec, get_memory

from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of
from penstock.plugins.configuration import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Layout = Literal["tokens", "layers"]
STRIDED = frozenset({"torch_native", "tactic"})
"""Attention backends that read and write a cache whose tokens lie further apart than they are long."""
BACKUPS = ("cpu_tensor", "none")
"""Of ``--disaggregation-decode-retraction-backup``: those that copy by index, whatever the strides."""

_pools: WeakValueDictionary[int, RegionPool] = WeakValueDictionary()


class RegionPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` whose buffers are views of ``region``."""

    region: torch.Tensor | None = None
    """The whole allocation as bytes; None where stock allocated something that is not plain tokens."""
    layout: Layout
    k_buffer: list[torch.Tensor]
    v_buffer: list[torch.Tensor]
    epochs: npt.NDArray[np.uint32] | None = None
    """How often each page was handed out, counted by the allocator."""

    def _create_buffers_normal(self) -> None:
        if self.kv_cache_layout != "nhd" or self.enable_custom_mem_pool:
            super()._create_buffers_normal()
            return
        self.layout = wanted_layout()
        shapes = self._kv_buffer_shapes()
        widths = [heads * size for _, heads, size in shapes]
        rows = -(-shapes[0][0] // self.page_size) * self.page_size
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            values = torch.zeros(
                rows * self.layer_num * sum(widths), dtype=self.store_dtype, device=self.device
            )
        self.region = values.view(torch.uint8)
        self.k_buffer, self.v_buffer = [], []
        for layer in range(self.layer_num):
            for side, (buffers, (count, heads, size)) in enumerate(
                zip((self.k_buffer, self.v_buffer), shapes, strict=True)
            ):
                if self.layout == "tokens":
                    stride = self.layer_num * sum(widths)
                    start = layer * sum(widths) + side * widths[0]
                else:
                    stride = widths[side]
                    start = rows * (layer * sum(widths) + side * widths[0])
                buffers.append(values.as_strided((count, heads, size), (stride, size, 1), start))
        _pools[self.region.data_ptr()] = self

    def geometry(self) -> CacheGeometry:
        """Where the pages lie; page 0 is SGLang's padding.

        Raises:
            ConfigurationError: the pool is not in one region.
        """
        if self.region is None:
            raise ConfigurationError(
                f"FlowKV needs a plain KV pool; this one has layout {self.kv_cache_layout}, "
                f"quantized {self.is_quantized_kv_cache}, post-capture {self.post_capture_active}"
            )
        pages = self._page_placements()
        return CacheGeometry(
            base_address=self.region.data_ptr(),
            size=self.region.numel(),
            num_blocks=-(-(self.size + self.page_size) // self.page_size),
            strips=strips_of(pages),
            memory="DRAM" if self.region.device.type == "cpu" else "VRAM",
            device=self.region.device.index or 0,
        )

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """As stock's; with layout ``tokens`` the region, which is the only contiguous buffer."""
        if self.region is None or self.layout == "layers":
            return super().get_contiguous_buf_infos()
        page_bytes = self.page_size * self.k_buffer[0].stride(0) * self.store_dtype.itemsize
        return [self.region.data_ptr()], [self.region.numel()], [page_bytes]

    def _page_placements(self) -> list[LayerPages]:
        size = self.store_dtype.itemsize
        if self.layout == "tokens":
            page_bytes = self.page_size * self.k_buffer[0].stride(0) * size
            return [LayerPages(1, page_bytes, page_bytes, page_bytes)]
        assert self.region is not None
        base = self.region.data_ptr()
        return [
            LayerPages(
                1,
                0,
                self.page_size * t.stride(0) * size,
                self.page_size * t.stride(0) * size,
                t.data_ptr() - base,
            )
            for t in (*self.k_buffer, *self.v_buffer)
        ]


def pool_at(address: int) -> RegionPool | None:
    """The pool whose region begins at ``address``: SGLang tells a transfer backend addresses, not objects."""
    return _pools.get(address)


def wanted_layout() -> Layout:
    """The layout for this process's attention backends.

    Raises:
        ConfigurationError: retracted requests would be backed up by kernels that know no such layout.
    """
    kernel = get_exec().kernel
    backends = (kernel.attention_backend, kernel.prefill_attention_backend, kernel.decode_attention_backend)
    if not STRIDED.issuperset(filter(None, backends)) or get_memory().enable_hierarchical_cache:
        return "layers"
    disagg = get_disagg()
    if disagg.disaggregation_mode == "decode" and (
        disagg.disaggregation_decode_retraction_backup not in BACKUPS
    ):
        raise ConfigurationError(
            "--disaggregation-decode-retraction-backup: "
            f"given {disagg.disaggregation_decode_retraction_backup}, allowed with flowkv and "
            f"--attention-backend {kernel.attention_backend}: {', '.join(BACKUPS)}"
        )
    return "tokens"
