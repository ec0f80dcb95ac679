"""Kernels compile for a GPU, which the interpreter says nothing of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "_catch_up", "_choose", "_count", "_decode", "_estimate", "_exact", "_masses", "_means", "_merge",
    "_nearest", "_observe", "_quantise", "_scores", "_summarise", "_written",
}  # fmt: skip
MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on compute capability 9.0."""


def test_every_kernel_compiles_for_hopper(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), "90"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}
    assert set(shared) == KERNELS
    assert max(shared.values()) <= MOST_SHARED
