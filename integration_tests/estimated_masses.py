"""Estimates masses of a few pages; as a program, saves them for whoever compares processors.

python estimated_masses.py FILE
"""

from __future__ import annotations

import sys

import torch

from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.lanes import VNNI

random = torch.Generator().manual_seed(5)
index = BlockIndex(blocks=9, heads=2, block_tokens=32, head_size=64, summary_tokens=4, rounds=1)
blocks = torch.randperm(9, generator=random)
index.put(blocks, torch.randn(2, 9, 32, 64, generator=random))
logs = torch.empty(2, 3, 9)
index.log_masses(torch.randn(2, 3, 64, generator=random), blocks, logs)

if __name__ == "__main__":
    torch.save((VNNI, logs), sys.argv[1])
