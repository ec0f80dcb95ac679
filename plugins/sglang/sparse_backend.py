"""Decodes that read chosen pages of SGLang's pool; whatever is dense is computed by SGLang's own backend.

SGLang hands decode passes alone to this backend, prompts and passes that have both to the one that stands
for ``--prefill-attention-backend``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.sparse.token_pages import TokenPages
from penstock.kernels.sparse.warm_up import choose_once, warm_up_pages
from penstock.plugins.sglang import sparse_metrics
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.sparse_layers import (
    SparseLayer,
    attention_layers,
    dense_reason,
    require_plain_pool,
)
from penstock.plugins.sparse_worker import SparseWorker

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A pass of decodes of which one at least is long enough: tokens of each request, and its pages (int64
    [P])."""

    tokens: Sequence[int]
    pages: Sequence[torch.Tensor]


class TacticBackend(TorchNativeAttnBackend):
    """``torch_native``, with decodes over the pages that hold a share of the attention mass.

    Raises:
        ConfigurationError: the model or the platform has no plain pool of pages.
    """

    def __init__(self, model_runner: Any, config: ServingConfig) -> None:
        require_plain_pool(model_runner)
        super().__init__(model_runner)
        self.worker = SparseWorker(config, upstream().logger)
        sparse_metrics.workers.add(self.worker)
        self._page_tokens: int = model_runner.page_size
        self._step: DecodeStep | None = None
        layers = attention_layers(model_runner.model)
        reasons = {f"layer {number}": dense_reason(layer) for number, layer in layers.items()}
        self.worker.tell_layers(reasons)
        self.layers = {
            number: SparseLayer(layer, self.token_to_kv_pool, self.worker)
            for number, layer in layers.items()
            if reasons[f"layer {number}"] is None and number >= config.dense_layers
        }
        """Those that may be sparse, by their number."""
        if self.layers:
            self._warm_up(layers[next(iter(self.layers))])

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """As stock does, and the requests are listed where the pass may be sparse."""
        super().init_forward_metadata(forward_batch)
        self._step = self._described(forward_batch)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """As stock's to the bit for requests that are not long enough; of others chosen pages are read, all
        of them where that saves nothing."""
        sparse = self.layers.get(layer.layer_id)
        if self._step is None or sparse is None or k is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache:
            where = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        heads = layer.tp_k_head_num
        queries = q.reshape(len(self._step.tokens), heads, -1, layer.qk_head_dim).float() * layer.scaling
        reads = self._reads(sparse, queries, self._step)
        output = q.new_empty(len(reads), layer.tp_q_head_num * layer.v_head_dim)
        dense = [row for row, read in enumerate(reads) if self._is_stock_s(sparse, self._step, row, read)]
        if len(dense) < len(reads):
            ours = [row for row in range(len(reads)) if row not in dense]
            part = sparse.pages.attend(queries[ours], [reads[row] for row in ours])
            output[ours] = part.output.flatten(1).to(output.dtype)
        if dense:
            batch = _rows(forward_batch, dense)
            rows = [each[dense] for each in (q, k, v)]
            output[dense] = super().forward_decode(*rows, layer, batch, save_kv_cache=False)
        return output

    def _described(self, batch: ForwardBatch) -> DecodeStep | None:
        if not batch.forward_mode.is_decode() or batch.encoder_lens is not None or not self.layers:
            return None
        tokens: list[int] = batch.seq_lens.tolist()
        if not tokens or max(tokens) < self.worker.config.least_tokens:
            return None
        slots = self.req_to_token_pool.req_to_token
        # A request's page is whole, so that its first slot tells which one it is.
        rows = zip(batch.req_pool_indices.tolist(), tokens, strict=True)
        size = self._page_tokens
        return DecodeStep(tokens, [slots[row, :count:size].long() // size for row, count in rows])

    def _reads(self, sparse: SparseLayer, queries: torch.Tensor, step: DecodeStep) -> list[Read]:
        reads = []
        for query, tokens, pages in zip(queries, step.tokens, step.pages, strict=True):
            reads.append(sparse.decode.read(query, pages, tokens, self._page_tokens))
        self.worker.tell_progress()
        return reads

    def _is_stock_s(self, sparse: SparseLayer, step: DecodeStep, row: int, read: Read) -> bool:
        """Whether ``torch_native`` computes a row: below the activation length, whose output it is to the
        bit; and one that reads everything where our kernel is not compiled, and the slower of the two."""
        if step.tokens[row] < self.worker.config.least_tokens:
            return True
        return read.pages is None and not sparse.pages.is_compiled

    def _warm_up(self, layer: RadixAttention) -> None:
        """Compile what a step calls: no request waits for a compiler."""
        began = time.perf_counter()
        config, size = self.worker.config, self._page_tokens
        buffer = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        zeros = buffer.new_zeros(warm_up_pages(config, size) * size, *buffer.shape[1:])
        pages = TokenPages(zeros, zeros, size)
        query = torch.zeros(layer.tp_k_head_num, 1, layer.qk_head_dim)
        values = layer.v_head_dim if config.estimate_rest else 0
        pages.attend(query[None], [choose_once(config, pages, query, size, values)])
        self.worker.tell_ready(time.perf_counter() - began)


def _rows(batch: ForwardBatch, rows: list[int]) -> ForwardBatch:
    """What stock's decode reads of a batch, of some requests alone."""
    some = copy.copy(batch)
    some.req_pool_indices = batch.req_pool_indices[rows]
    some.seq_lens = batch.seq_lens[rows]
    return some
