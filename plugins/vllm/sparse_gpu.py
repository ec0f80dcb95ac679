"""Sparse decode over a stock GPU backend of vLLM: what is mixed into its three classes.

The stock backend writes the cache, and does prefill, mixed steps and whatever is dense. A step in which
every request has one query row goes to :class:`penstock.kernels.triton.layers.SparseLayers`, whole: which
contexts are too short, and what each KV head reads, is decided on the device, so that a CUDA graph of a batch
size holds for all lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport

from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.layers import SparseLayers
from penstock.kernels.triton.step import MOST_HEAD_SIZE, MOST_PAGE_TOKENS, StepShape
from penstock.plugins.configuration import ConfigurationError, sparse_config
from penstock.plugins.vllm import sparse_blocks
from penstock.plugins.vllm.sparse_worker import SparseWorker, check, dense_reason

HEAD_SIZES = range(16, MOST_HEAD_SIZE + 1)


class SparseGPUBackend:
    """Mixed into a subclass of ``AttentionBackend``, in front of the stock one."""

    @staticmethod
    def get_name() -> str:
        """The member of the enum."""
        return "CUSTOM"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Those of the stock backend with 16 or 32 bits."""
        quantised = kv_cache_dtype is not None and is_quantized_kv_cache(kv_cache_dtype)
        return not quantised and bool(_stock(SparseGPUBackend, cls).supports_kv_cache_dtype(kv_cache_dtype))

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """What a head reads is cut into parts by the size of the batch."""
        return False


class SparseGPUImpl:
    """Mixed into a subclass of ``AttentionImpl``, in front of the stock one."""

    supports_dcp = False
    supports_pcp = False

    head_size: int
    kv_cache_dtype: str
    num_queries_per_kv: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _stock(SparseGPUImpl, self).__init__(*args, **kwargs)
        check(self.kv_cache_dtype, self.head_size, HEAD_SIZES)
        self.dense_reason = dense_reason(self)
        self.sparse: SparseLayers | None = None
        """Set while this layer decodes sparse."""
        self.number = -1

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernels do not quantise what they write."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """What is written has to pass through ``do_kv_cache_update``, which summarises it."""
        return False

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """As stock's; blocks that are full now are summarised."""
        _stock(SparseGPUImpl, self).do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.sparse is not None:
            self.sparse.written(self.number, slot_mapping)

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
        """As stock's; steps that ``is_decode`` knows read chosen pages."""
        layers = self.sparse
        if layers is not None and attn_metadata is not None and is_decode(attn_metadata, layers.config):
            rows = len(attn_metadata.seq_lens)
            table, lengths = attn_metadata.block_table, attn_metadata.seq_lens
            if layers.attend(self.number, query[:rows], table, lengths, output[:rows]):
                return output
        found: torch.Tensor = _stock(SparseGPUImpl, self).forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        return found


class SparseGPUBuilder:
    """Mixed into a subclass of ``AttentionMetadataBuilder``, in front of the stock one.

    It owns what the sparse layers of its group share, since vLLM calls it once before every step, also
    before one that replays a graph.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        _stock(SparseGPUBuilder, self).__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._device = device
        self._vllm = vllm_config
        self._config = gpu_config(vllm_config)
        self._worker = SparseWorker(self._config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self._layers = sparse_layers(self._config, layers)
        self._worker.tell_layers({name: layer.impl.dense_reason for name, layer in layers.items()})
        self._sparse: SparseLayers | None = None
        self._bound_to: tuple[int, ...] = ()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole graphs of steps with one row a request; steps of other kinds run stock's attention between
        the pieces of a graph."""
        stock = _stock(SparseGPUBuilder, cls).get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(stock, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda one: one.value)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: Any, kv_cache_spec: Any) -> int | None:  # noqa: ARG003
        """None: a graph is of steps with one row a request."""
        return None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As stock does, between two steps of the sparse layers."""
        stock = _stock(SparseGPUBuilder, self).build(common_prefix_len, common_attn_metadata, fast_build)
        if self._layers:
            sparse = self._bind(stock.block_table)
            sparse.between_steps(len(stock.seq_lens) if is_decode(stock, self._config) else 0)
            self._worker.tell_progress()
        return stock

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As stock does; a graph of decode steps is to serve the longest contexts."""
        stock = _stock(SparseGPUBuilder, self).build_for_cudagraph_capture(common_attn_metadata)
        stock.max_seq_len = max(stock.max_seq_len, self._vllm.model_config.max_model_len)
        return stock

    def _bind(self, table: torch.Tensor) -> SparseLayers:
        """Make the index of the cache that the layers have now: vLLM makes a small one first, to see what
        graphs take, and the real one later."""
        first = next(iter(self._layers.values()))
        bound_to = (first.kv_cache.data_ptr(), len(first.kv_cache), table.shape[1])
        if self._sparse is not None and self._bound_to == bound_to:
            return self._sparse
        caches = {number: paged_cache(layer.kv_cache) for number, layer in self._layers.items()}
        # Steps run in inference mode; blocks are forgotten between them.
        with torch.inference_mode(False):
            self._sparse = sparse = SparseLayers(
                self._config,
                step_shape(first, self._vllm.scheduler_config.max_num_seqs, table.shape[1]),
                caches,
                self._worker.calibration,
                self._worker.stats,
                scale=first.impl.scale,
                processors=processors_of(self._device),
                foreign=self._vllm.kv_transfer_config is not None,
            )
        if self._vllm.kv_transfer_config is not None:
            sparse_blocks.register(sparse)
        for number, layer in self._layers.items():
            layer.impl.sparse, layer.impl.number = sparse, number
        self._worker.index_bytes = self._worker.cache_bytes = 0
        self._worker.tell_index(
            sparse.index_bytes, sum(layer.kv_cache.nbytes for layer in self._layers.values())
        )
        self._bound_to = bound_to
        return sparse


def is_decode(metadata: Any, config: ServingConfig) -> bool:
    """Whether a step, by what the host knows of it, may be sparse: one row a request, and some context that
    may be long enough."""
    return bool(
        metadata.max_query_len == 1
        and metadata.causal is True
        and metadata.max_seq_len >= config.least_tokens
    )


def sparse_layers(config: ServingConfig, layers: dict[str, Any]) -> dict[int, Any]:
    """Those of ``layers`` that decode sparse, by their number in the model; one that is not like the first
    is given a reason to be dense."""
    found: dict[int, Any] = {}
    for name, layer in layers.items():
        impl, number = layer.impl, extract_layer_index(name)
        if not isinstance(impl, SparseGPUImpl) or impl.dense_reason or number < config.dense_layers:
            continue
        first = next(iter(found.values()), layer).impl
        if (impl.num_queries_per_kv, impl.scale) == (first.num_queries_per_kv, first.scale):
            found[number] = layer
        else:
            impl.dense_reason = "other query heads or another softmax scale than the first sparse layer"
    return found


def gpu_config(vllm_config: Any) -> ServingConfig:
    """The configuration of sparse attention on a GPU.

    Raises:
        ConfigurationError: the kernels there cannot do it.
    """
    config = sparse_config(vllm_config.additional_config)
    if config.group_rule != "ranked":
        raise ConfigurationError(f"sparse_attention.group_rule: given {config.group_rule}, allowed: ranked")
    if not config.estimate_rest:
        raise ConfigurationError("sparse_attention.estimate_rest: given false, allowed on a GPU: true")
    if config.budget is not None:
        raise ConfigurationError(f"sparse_attention.budget: given {config.budget}, allowed on a GPU: none")
    if vllm_config.parallel_config.use_ubatching:
        raise ConfigurationError("sparse attention: given micro-batches (--enable-dbo), allowed: none")
    block = vllm_config.cache_config.block_size
    if block is not None and block > MOST_PAGE_TOKENS:
        raise ConfigurationError(f"--block-size: given {block}, allowed: at most {MOST_PAGE_TOKENS}")
    return config


def paged_cache(cache: torch.Tensor) -> PagedCache:
    """A layer's cache [B, H, N, 2 * D], in either layout, as kernels see it."""
    return PagedCache(*(part.transpose(1, 2) for part in cache.chunk(2, dim=-1)))


def step_shape(layer: Any, requests: int, pages: int) -> StepShape:
    """The most that a step of ``layer`` may have."""
    impl = layer.impl
    return StepShape(requests, impl.num_kv_heads, impl.num_queries_per_kv, impl.head_size, pages)


def processors_of(device: torch.device) -> int:
    """Multiprocessors of ``device``; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _stock(ours: type, bound: Any) -> Any:
    """``super()`` for a class whose stock part is not known to a type checker."""
    return super(ours, bound)
