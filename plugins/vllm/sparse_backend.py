"""vLLM's CPU attention with decode steps that read chosen pages; everything else is stock's.

Requests with a query row, or one and those of their drafts, are sparse where some context is long enough;
prompts beside them are dense, in a call of their own. Each KV head of a request becomes a request of one
head, over its own pages, and one call of a kernel serves all of them: ours where it reads the cache, else
stock's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.head_rows import HeadRows, Read, head_rows
from penstock.kernels.sparse.packed_attention import PackedAttention, rests
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.plugins.configuration import sparse_config
from penstock.plugins.vllm import sparse_blocks
from penstock.plugins.vllm.packed_keys import PackedKeys, own_attention
from penstock.plugins.vllm.sparse_steps import DecodeStep, decode_step, most_decode_rows
from penstock.plugins.vllm.sparse_warm_up import warm_up
from penstock.plugins.vllm.sparse_worker import SparseWorker, check, dense_reason


class SparseCPUBackend(CPUAttentionBackend):
    """What ``AttentionBackendEnum.CUSTOM`` stands for on CPUs."""

    @staticmethod
    def get_name() -> str:
        """The member of the enum."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The class of a layer's attention."""
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The class that describes steps."""
        return SparseCPUBuilder


@dataclass
class SparseCPUMetadata(CPUAttentionMetadata):
    """Stock's description of a step; ``decode`` is set where it may be sparse."""

    decode: DecodeStep | None = None


class SparseCPUBuilder(CPUAttentionMetadataBuilder):
    """Describes steps, and gives the layers of its group what they share."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = sparse_config(vllm_config.additional_config)
        self._most_rows = most_decode_rows(vllm_config)
        worker = SparseWorker(self.config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            if isinstance(layer.impl, SparseCPUImpl):
                layer.impl.bind(worker, extract_layer_index(name))
        if any(isinstance(layer.impl, SparseCPUImpl) and layer.impl.worker for layer in layers.values()):
            worker.tell_ready(warm_up(self.config, kv_cache_spec, self.isa))
        worker.tell_layers({name: layer.impl.dense_reason for name, layer in layers.items()})

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SparseCPUMetadata:
        """As stock does, with the requests listed where the step may be sparse."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = None
        plain = stock.causal is True and stock.dynamic_causal is None
        if plain and stock.max_seq_len >= self.config.least_tokens:
            step = decode_step(
                common_attn_metadata,
                most_rows=self._most_rows,
                least_tokens=self.config.least_tokens,
                block_tokens=self.block_size,
                heads=self.num_kv_heads,
                describe=partial(super().build, 0),
            )
        return SparseCPUMetadata(**vars(stock), decode=step)


class SparseCPUImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(self.kv_cache_dtype, self.head_size, SparseCPUBackend.get_supported_head_sizes())
        self.dense_reason = dense_reason(self)
        self.worker: SparseWorker | None = None
        self._number = 0
        self.decode: PagedDecode | None = None
        self._cache_at = 0
        self._flat: tuple[torch.Tensor, torch.Tensor]
        self._attention: PackedAttention | None = None

    def bind(self, worker: SparseWorker, number: int) -> None:
        """Share ``worker`` with other layers; this is layer ``number`` of the model."""
        self._number = number
        dense = self.dense_reason is not None or number < worker.config.dense_layers
        self.worker = None if dense else worker
        self.decode = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As stock's; chosen pages alone are read where ``attn_metadata`` allows and it saves something."""
        step: DecodeStep | None = None if attn_metadata is None else attn_metadata.decode
        reads = None
        if step is not None and self.worker is not None:
            reads = self._reads(self.worker, layer, query, kv_cache, step)
        if step is None or reads is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        self._attend(layer, query, kv_cache, step, reads, output)
        if step.others is not None:
            rows = step.others.rows
            part = torch.empty_like(output[: len(rows)])
            super().forward(layer, query[rows], key, value, kv_cache, step.others.metadata, part)
            output[rows] = part
        return output

    def _reads(
        self, worker: SparseWorker, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, step: DecodeStep
    ) -> list[Read] | None:
        """What each request reads; None where all of them read everything, and stock's kernel does that."""
        decode = self._bound_decode(worker, layer, kv_cache)
        heads, block_tokens = kv_cache.shape[1:3]
        by_head = query.unflatten(1, (heads, -1))
        reads = []
        for tokens, blocks, rows, first in zip(step.tokens, step.blocks, step.rows, step.first, strict=True):
            # All rows of a request read what their heads together need, as of the first row: what came after
            # it is recent to the others, and read by all.
            group = by_head[first : first + rows].float().transpose(0, 1).flatten(1, 2) * self.scale
            known = tokens - rows + 1
            read = decode.read(group, blocks[: -(-known // block_tokens)], known, block_tokens)
            pages = read.pages
            if pages is not None:
                pages = torch.nn.functional.pad(pages, (0, len(blocks) - pages.shape[1]), value=True)
            reads.append(Read(blocks, pages, tokens - (len(blocks) - 1) * block_tokens, read.rest))
        worker.tell_progress()
        stocks = self._attention is None or worker.config.mass == 1
        return None if stocks and all(read.pages is None for read in reads) else reads

    def _bound_decode(self, worker: SparseWorker, layer: Any, kv_cache: torch.Tensor) -> PagedDecode:
        if self.decode is None or self._cache_at != kv_cache.data_ptr():
            blocks, heads, block_tokens, _ = kv_cache.shape
            self._attention = own_attention(kv_cache, layer.isa)
            estimated = self._attention is not None and worker.config.estimate_rest
            # Steps run in inference mode; blocks are forgotten between them.
            with torch.inference_mode(False):
                index = BlockIndex(
                    blocks=blocks,
                    heads=heads,
                    block_tokens=block_tokens,
                    head_size=self.head_size,
                    summary_tokens=worker.config.summary_tokens,
                    rounds=worker.config.summary_rounds,
                    value_size=self.head_size if estimated else 0,
                )
            sparse_blocks.register(index)
            keys = PackedKeys(kv_cache, layer.isa)
            self.decode = PagedDecode(
                worker.config, self._number, index, keys, worker.calibration, worker.stats
            )
            self._cache_at = kv_cache.data_ptr()
            self._flat = _one_head(kv_cache)
            worker.tell_index(index.nbytes, kv_cache.nbytes)
        return self.decode

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: DecodeStep,
        reads: Sequence[Read],
        output: torch.Tensor,
    ) -> None:
        heads, block_tokens = kv_cache.shape[1:3]
        stride = kv_cache.stride(0) // kv_cache.stride(1)
        rows = head_rows(reads, heads, block_tokens, stride)
        count, group = len(rows.lengths), self.num_queries_per_kv
        if step.order is None:
            starts = torch.arange(count + 1, dtype=torch.int32)
            asked = query[: len(reads)].reshape(count, group, self.head_size)
            part = output[: len(reads)].view(count, group, self.head_size)
        else:
            counts = [0, *(rows for rows in step.rows for _ in range(heads))]
            starts = torch.tensor(counts).cumsum(0).int()
            asked = query.reshape(-1, group, self.head_size)[step.order]
            part = torch.empty_like(asked)
        if self._attention is not None:
            rest = rests(reads, step.rows, heads, group, self.head_size)
            self._attention.attend(asked, rows, starts, self.scale, part, rest)
        else:
            self._attend_by_stock(layer, asked, rows, starts, part)
        if step.order is not None:
            output.view(-1, group, self.head_size)[step.order] = part

    def _attend_by_stock(
        self,
        layer: Any,
        query: torch.Tensor,
        rows: HeadRows,
        starts: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        keys, values = self._flat
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows.lengths),
            num_heads=self.num_queries_per_kv,
            num_kv_heads=1,
            head_dim=self.head_size,
            seq_lens=rows.lengths,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=starts,
            seq_lens=rows.lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=rows.table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )


def _one_head(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache [B, H, N, 2 * D] as of one head, [R, 1, N, D]: head ``h`` of block ``b`` is
    number ``b * stride + h``, and a layout in which layers lie between the blocks only skips more."""
    blocks, heads, block_tokens, width = cache.shape
    stride = cache.stride(0) // cache.stride(1)
    flat = cache.as_strided(
        ((blocks - 1) * stride + heads, 1, 2 * block_tokens, width // 2),
        (cache.stride(1), cache.stride(1), width // 2, 1),
        cache.storage_offset(),
    )
    keys, values = flat.chunk(2, dim=2)
    return keys, values
