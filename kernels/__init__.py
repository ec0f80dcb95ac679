"""Attention and selection kernels."""
