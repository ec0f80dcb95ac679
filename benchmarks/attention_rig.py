"""One attention layer of vLLM's CPU engine without a model: the real layer, metadata builder and KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a layer and its cache; sizes in tokens."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_tokens: int = 128
    blocks: int = 64
    dtype: torch.dtype = torch.bfloat16


class AttentionRig:
    """A layer with ``backend`` (``CPU_ATTN`` or ``CUSTOM``), fed block tables by hand; ``settings`` are those
    of the ``section`` of ``penstock`` in ``additional_config``. Requests may have ``drafts`` besides a step's
    own row."""

    def __init__(
        self,
        model: str,
        shape: Shape,
        backend: str,
        settings: dict[str, Any] | None = None,
        layer: int = 5,
        drafts: int = 0,
        section: str = "sparse_attention",
        **arguments: Any,
    ) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention
        from vllm.v1.attention import selector
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        drafting = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2}
        additional = {"penstock": {section: settings}} if settings is not None else {}
        names: dict[torch.dtype, Any] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
        config = EngineArgs(
            model=model,
            dtype=names[shape.dtype],
            block_size=shape.block_tokens,
            attention_backend=backend,
            additional_config=additional,
            speculative_config=drafting if drafts else None,
            enforce_eager=True,
        ).create_engine_config()
        self.shape = shape
        name = f"model.layers.{layer}.self_attn.attn"
        # vLLM looks a backend up once in a process, which has one engine.
        selector._cached_get_attn_backend.cache_clear()
        with set_current_vllm_config(config):
            self.layer = Attention(
                shape.heads, shape.head_size, shape.head_size**-0.5, shape.kv_heads, prefix=name, **arguments
            )
            spec = FullAttentionSpec(
                block_size=shape.block_tokens,
                num_kv_heads=shape.kv_heads,
                head_size=shape.head_size,
                dtype=shape.dtype,
            )
            builder = self.layer.get_attn_backend().get_builder_cls()
            self.builder = builder(spec, [name], config, torch.device("cpu"))
        self.layer.process_weights_after_loading(shape.dtype)
        width = 2 * shape.head_size
        self.cache = torch.zeros(shape.blocks, shape.kv_heads, shape.block_tokens, width, dtype=shape.dtype)

    @property
    def query_shape(self) -> tuple[int, int]:
        """Query heads, and channels of one."""
        return self.shape.heads, self.shape.head_size

    @property
    def impl(self) -> Any:
        """The backend's part of the layer."""
        return self.layer.impl

    def write(self, keys: torch.Tensor, values: torch.Tensor, blocks: Sequence[int], start: int = 0) -> None:
        """Put ``keys`` and ``values`` [n, H, D] at positions from ``start`` of a request with ``blocks``."""
        slots = self._slots(blocks, torch.arange(start, start + len(keys)))
        self.impl.do_kv_cache_update(self.layer, keys, values, self.cache, slots)

    def metadata(self, tables: Sequence[Sequence[int]], tokens: Sequence[int], rows: Sequence[int]) -> Any:
        """The backend's description of a step (``common``)."""
        return self.builder.build(0, self.common(tables, tokens, rows))

    def common(self, tables: Sequence[Sequence[int]], tokens: Sequence[int], rows: Sequence[int]) -> Any:
        """A step in which request ``r`` has ``tokens[r]`` tokens, the last ``rows[r]`` of them queries."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.tensor([0, *rows]).cumsum(0).int()
        table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = torch.tensor(blocks)
        slots = [
            self._slots(blocks, torch.arange(count - row, count))
            for blocks, count, row in zip(tables, tokens, rows, strict=True)
        ]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(tokens, dtype=torch.int32),
            num_reqs=len(tables),
            num_actual_tokens=sum(rows),
            max_query_len=max(rows),
            max_seq_len=max(tokens),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
        )

    def attend(self, queries: torch.Tensor, metadata: Any) -> torch.Tensor:
        """Output [T, Hq, D] for ``queries`` [T, Hq, D]; keys of the queries must have been written."""
        output = torch.empty_like(queries)
        self.impl.forward(self.layer, queries, None, None, self.cache, metadata, output)
        return output

    def _slots(self, blocks: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        size = self.shape.block_tokens
        return torch.tensor(blocks)[positions // size] * size + positions % size
