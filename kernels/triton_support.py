"""Whether Triton can run here; asked once, so that kernels fall back to torch in one place."""

from __future__ import annotations

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Triton is installed; it compiles for GPUs, and interprets on a CPU under ``TRITON_INTERPRET=1``."""
