"""Sparse decode over vLLM's FlashAttention."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from penstock.plugins.vllm.sparse_gpu import SparseGPUBackend, SparseGPUBuilder, SparseGPUImpl


class SparseFlashImpl(SparseGPUImpl, FlashAttentionImpl):
    """Attention of one layer."""


class SparseFlashBuilder(SparseGPUBuilder, FlashAttentionMetadataBuilder):
    """Describes steps."""


class SparseFlashBackend(SparseGPUBackend, FlashAttentionBackend):
    """What ``AttentionBackendEnum.CUSTOM`` stands for where FlashAttention runs."""

    @staticmethod
    def get_impl_cls() -> type[SparseFlashImpl]:
        """The class of a layer's attention."""
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashBuilder]:
        """The class that describes steps."""
        return SparseFlashBuilder
