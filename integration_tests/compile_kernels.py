"""Compiles each kernel for a GPU that need not be there, with the arguments that its launcher gives it.

    TRITON_INTERPRET=0 python compile_kernels.py COMPUTE_CAPABILITY

Prints one line a kernel: its name, and the bytes of shared memory that a program takes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from penstock.kernels.sparse.serving import ServingConfig
from penstock.kernels.triton import kmeans, quantise
from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.index import DeviceIndex
from penstock.kernels.triton.observe import Sample, observe
from penstock.kernels.triton.step import SparseStep, StepShape
from penstock.kernels.triton.summaries import Summaries, summarise_blocks

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


def compiling(target: GPUTarget) -> Any:
    """What stands for ``JITFunction.run``: compiles, and launches nothing."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **rest: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | rest
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        options = {name: rest[name] for name in OPTIONS if name in rest}
        made = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
        print(kernel.__name__, made.metadata.shared, flush=True)

    return run


def launch_all(dtype: torch.dtype, group: int, size: int, block_tokens: int) -> None:
    """Launch every kernel once for ``dtype``, ``group`` query heads of ``size``, and pages of
    ``block_tokens``."""
    requests, heads, pages = 2, 2, 64

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    memory = torch.zeros(4, heads, block_tokens, 2 * size, dtype=dtype)
    cache = PagedCache(*(part.transpose(1, 2) for part in memory.chunk(2, -1)))
    index = Summaries.empty(cache, block_tokens // 4)
    summarise_blocks(cache, ints(1), index, 2)
    query = torch.zeros(requests, heads * group, size, dtype=dtype)
    shape = StepShape(requests, heads, group, size, pages)
    step = SparseStep(ServingConfig(), shape, cache, tail_pages=8, processors=132)
    lengths = ints(requests), ints(requests)
    step.run(query, cache, index, ints(requests, pages), *lengths, torch.zeros(1), torch.empty_like(query))
    reads, scores = step.reads, step.logs
    device_index = DeviceIndex(cache, block_tokens // 4, 2, torch.zeros(4, dtype=torch.uint8))
    device_index.written(torch.zeros(1, dtype=torch.int64))
    device_index.count(ints(requests, pages), *lengths)
    device_index.catch_up(ints(requests, pages), *lengths, 4)
    observe(
        query, cache, ints(requests, pages), *lengths, step.scale, scores, reads,
        Sample.empty(group, pages, cache.keys.device), torch.zeros(4, dtype=torch.int64),
        layer=2, least_tokens=0,
    )  # fmt: skip
    keys, labels = torch.zeros(heads, 100, size, dtype=dtype), torch.zeros(heads, 100, dtype=torch.int64)
    centroids = torch.zeros(heads, 10, size)
    kmeans.nearest(keys, centroids, "tf32")
    kmeans.summarise(keys, labels, centroids, spreads=True)
    codes = quantise.quantise(torch.zeros(heads, 100, size), 4)
    near = torch.zeros(heads, 10, dtype=torch.uint8)
    places = ints(heads, 100), ints(heads, 100), near
    products, scores = torch.zeros(heads, group, 10), torch.zeros(heads, group, 100)
    quantise.score_keys(torch.zeros(heads, group, size), codes, *places, products, ints(1), scores)


if __name__ == "__main__":
    JITFunction.run = compiling(GPUTarget("cuda", int(sys.argv[1]), 32))
    launch_all(torch.bfloat16, group=4, size=128, block_tokens=16)
