"""Digests of blocks: torch against plain integers, Triton's interpreter against torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from penstock.kernels.block_digest import GOLDEN, MULTIPLIERS, DeviceDigester, digest_words  # noqa: E402

MASK = (1 << 64) - 1


def by_hand(words: list[int]) -> int:
    total = 0
    for i, word in enumerate(words, start=1):
        x = (word + i * GOLDEN) & MASK
        x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & MASK
        x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & MASK
        total += x ^ (x >> 31)
    return total & MASK


def random_words(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, size=shape, dtype=np.int64))


def test_torch_equals_unbounded_integers():
    words = random_words(np.random.default_rng(0), 5, 37)
    expected = [by_hand([w & MASK for w in row]) for row in words.tolist()]
    assert digest_words(words).numpy().view(np.uint64).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_moved_or_repeated_word_changes_the_digest(seed):
    rng = np.random.default_rng(seed)
    words = random_words(rng, 1, 256)
    good = digest_words(words).item()
    for _ in range(50):
        bad = words.clone()
        i, j = rng.choice(256, 2, replace=False)
        match rng.integers(3):
            case 0:
                bad[0, i] ^= 1 << int(rng.integers(62))
            case 1:
                bad[0, [i, j]] = bad[0, [j, i]]
            case 2:
                bad[0, i] = bad[0, j]
        assert digest_words(bad).item() != good


def test_digester_reads_exactly_the_strips_of_the_blocks():
    rng = np.random.default_rng(3)
    memory = random_words(rng, 4096)
    strips = [(0, 64 * 8, 256 * 8), (64 * 8, 32 * 8, 256 * 8)]
    digester = DeviceDigester(memory, strips)
    before = digester.digests([3, 0, 7])
    memory[3 * 256 + 96 : 4 * 256] += 1
    assert (digester.digests([3, 0, 7]) == before).all()
    memory[7 * 256 + 70] += 1
    assert (digester.digests([3, 0, 7]) == before).tolist() == [True, True, False]


def test_strips_that_are_no_whole_words_are_refused():
    with pytest.raises(ValueError, match="64-bit words"):
        DeviceDigester(torch.zeros(8, dtype=torch.int64), [(0, 12, 16)])


INTERPRETED = """
import numpy as np, torch
from penstock.kernels.block_digest import digest_words
from penstock.kernels.block_digest_triton import digest_blocks
rng = np.random.default_rng(1)
for width, stride, offset in ((1, 1, 0), (100, 128, 3), (4096, 4096, 0), (5000, 6000, 17)):
    memory = torch.from_numpy(rng.integers(-2**63, 2**63 - 1, size=offset + 6 * stride, dtype=np.int64))
    for blocks in ([], [5], [2, 0, 4, 2]):
        ids = torch.tensor(blocks, dtype=torch.int64)
        words = memory[offset + ids[:, None] * stride + torch.arange(width)]
        found = digest_blocks(memory, ids, offset, width, stride)
        assert torch.equal(found, digest_words(words)), (width, blocks)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernel_equals_torch():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
