"""Sparse decode over vLLM's Triton attention."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from penstock.plugins.vllm.sparse_gpu import SparseGPUBackend, SparseGPUBuilder, SparseGPUImpl


class SparseTritonImpl(SparseGPUImpl, TritonAttentionImpl):
    """Attention of one layer."""


class SparseTritonBuilder(SparseGPUBuilder, TritonAttentionMetadataBuilder):
    """Describes steps."""


class SparseTritonBackend(SparseGPUBackend, TritonAttentionBackend):
    """What ``AttentionBackendEnum.CUSTOM`` stands for on GPUs that FlashAttention does not know."""

    @staticmethod
    def get_impl_cls() -> type[SparseTritonImpl]:
        """The class of a layer's attention."""
        return SparseTritonImpl

    @staticmethod
    def get_builder_cls() -> type[SparseTritonBuilder]:
        """The class that describes steps."""
        return SparseTritonBuilder
