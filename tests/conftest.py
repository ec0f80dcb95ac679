"""Triton interprets its kernels on the CPU unless a run says otherwise; it looks once, when it is
imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
