"""Sparse attention on a GPU, kernel by kernel; :mod:`penstock.kernels.triton.step` puts them together.

Import it only where ``penstock.kernels.triton_support.HAS_TRITON``. A *row* is one request and KV head,
number ``b * H + h`` of ``B * H``. Launch grids depend on shapes alone and every length is read on the
device, so that a captured CUDA graph holds for other lengths; nothing waits for the host.
"""
