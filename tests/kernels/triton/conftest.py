"""The devices that kernels are tried on, and paged caches whose foreign parts are poisoned."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from penstock.kernels.triton.cache import PagedCache  # noqa: E402


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU under Triton's interpreter, or the GPU; a process can have one of them only."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter":
        if not interpreted:
            pytest.skip("TRITON_INTERPRET is not 1: kernels are compiled in this run")
        return torch.device("cpu")
    if interpreted:
        pytest.skip("TRITON_INTERPRET is 1: TRITON_INTERPRET=0 pytest -m gpu compiles kernels")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


@dataclass
class Requests:
    """Requests in a paged cache in which all that is not theirs is NaN."""

    cache: PagedCache
    table: torch.Tensor
    lengths: torch.Tensor
    query: torch.Tensor

    @property
    def full(self):
        """Full pages of each, int32 [B]."""
        return self.lengths // self.cache.block_tokens

    def to(self, device):
        """The same elsewhere."""
        cache = PagedCache(self.cache.keys.to(device), self.cache.values.to(device))
        return Requests(cache, self.table.to(device), self.lengths.to(device), self.query.to(device))


@pytest.fixture
def make() -> Callable[..., Requests]:
    """``make(lengths, heads, group, size, block_tokens, dtype)`` in vLLM's order of memory, on the CPU."""

    def build(
        lengths,
        *,
        heads=2,
        group=4,
        size=64,
        block_tokens=16,
        dtype=torch.float32,
        pages=None,
        sharp=2.0,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        pages = pages or max(1, -(-max(lengths) // block_tokens)) + 1
        blocks = len(lengths) * pages + 3
        memory = torch.full((blocks, heads, block_tokens, 2 * size), torch.nan, dtype=dtype)
        table = torch.zeros(len(lengths), pages, dtype=torch.int32)
        free = torch.randperm(blocks, generator=generator).tolist()
        for request, length in enumerate(lengths):
            for page in range(-(-length // block_tokens)):
                block = free.pop()
                table[request, page] = block
                used = min(block_tokens, length - page * block_tokens)
                rows = torch.randn(heads, used, 2 * size, generator=generator)
                memory[block, :, :used] = rows.to(dtype)
            # What a table holds beyond a request's pages is anybody's block.
            table[request, -(-length // block_tokens) :] = free[0]
        keys, values = (part.transpose(1, 2) for part in memory.chunk(2, -1))
        query = torch.randn(len(lengths), heads * group, size, generator=generator) * sharp
        return Requests(
            PagedCache(keys, values), table, torch.tensor(lengths, dtype=torch.int32), query.to(dtype)
        )

    return build


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "is_nonzero"}, name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reading():
    """A context in which the host may not wait for a device."""
    return NoReading()
