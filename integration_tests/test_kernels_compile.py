"""Kernels for other processors than the one that the fast tests compile for or interpret on."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch

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


def test_processors_without_vnni_estimate_the_same_masses(tmp_path):
    script, file = Path(__file__).with_name("estimated_masses.py"), tmp_path / "generic"
    # Compiled code is kept by file and processor, and this one is pretended.
    variables = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(file)]
    subprocess.run(command, env={**os.environ, **variables}, check=True, timeout=300)
    with_vnni, of_generic = torch.load(file)
    assert not with_vnni
    torch.testing.assert_close(of_generic, runpy.run_path(str(script))["logs"], rtol=1e-6, atol=1e-5)
