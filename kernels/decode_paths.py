"""Which kernel does sparse decode on a device, and why: one table, asked once at start-up and by the doctor.

What FlashInfer can do is as of 0.7: ``xqa`` takes page tables and lengths that lie on the device, and gives
no log-sum-exp back (``flashinfer.xqa``); the block-sparse wrappers are planned by the host
(``flashinfer.sparse``, ``plan``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

Path = Literal["triton", "xqa", "block-sparse", "variable-block-sparse"]
Refusals = Iterator[str]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU and what is installed for it. ``capability`` is CUDA's compute capability; ``flashinfer`` its
    version, empty if it is missing."""

    name: str
    capability: tuple[int, int]
    triton: bool
    flashinfer: str = ""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a layer needs.

    ``head_size`` in channels; ``group`` query heads a KV head; ``dtype`` of the KV cache, as torch calls it;
    ``page_tokens``. ``per_head``: KV heads read different pages. ``captured``: inside a CUDA graph, or
    without a wait for the host. ``estimated``: what is not read is estimated, and merged by log-sum-exp.
    """

    head_size: int = 128
    group: int = 4
    dtype: str = "bfloat16"
    page_tokens: int = 16
    per_head: bool = True
    captured: bool = True
    estimated: bool = True


class Choice(msgspec.Struct, frozen=True):
    """The path to take, None for dense attention; why; and why each other one is not taken."""

    path: Path | None
    reason: str
    refused: dict[str, str] = {}


def choose_path(device: Device | None, task: Task) -> Choice:
    """The first path of the table that can do ``task`` on ``device`` (None: there is no GPU)."""
    if device is None:
        return Choice(
            None, "there is no CUDA device: on a CPU the engine's own kernel reads pruned block tables"
        )
    refused: dict[str, str] = {}
    for path, reason, refusals in TABLE:
        if found := list(refusals(device, task)):
            refused[path] = "; ".join(found)
        else:
            return Choice(path, reason, refused)
    return Choice(None, "no sparse kernel can do this: attention is dense", refused)


def _triton(device: Device, task: Task) -> Refusals:
    if not device.triton:
        yield "Triton is not installed"
    if device.capability < (8, 0):
        yield f"compute capability {_dotted(device)}, needed: 8.0"
    if not 16 <= task.head_size <= 256:
        yield f"head size {task.head_size}, allowed: 16 to 256"
    if task.dtype not in ("float16", "bfloat16", "float32"):
        yield f"a KV cache of {task.dtype}, allowed: float16, bfloat16, float32"
    if task.group > 64:
        yield f"{task.group} query heads a KV head, allowed: at most 64"
    if not 1 <= task.page_tokens <= 128:
        yield f"pages of {task.page_tokens} tokens, allowed: at most 128"


def _xqa(device: Device, task: Task) -> Refusals:
    if not device.flashinfer:
        yield "FlashInfer is not installed"
    if device.capability[0] not in (9, 10, 12):
        yield f"compute capability {_dotted(device)}, allowed: 9, 10 and 12"
    if task.estimated:
        yield "it gives no log-sum-exp back, which the estimate of what is not read is merged by"
    if task.page_tokens not in (16, 32, 64, 128):
        yield f"pages of {task.page_tokens} tokens, allowed: 16, 32, 64, 128"
    if task.head_size % 16 or not 16 <= task.head_size <= 256:
        yield f"head size {task.head_size}, allowed: multiples of 16 up to 256"
    if task.dtype not in ("float16", "bfloat16"):
        yield f"a KV cache of {task.dtype}, allowed: float16, bfloat16"


def _variable_blocks(device: Device, task: Task) -> Refusals:
    yield from _planned(device, task)


def _blocks(device: Device, task: Task) -> Refusals:
    yield from _planned(device, task)
    if task.per_head:
        yield "one mask for all KV heads"


def _planned(device: Device, task: Task) -> Refusals:
    if not device.flashinfer:
        yield "FlashInfer is not installed"
    if device.capability < (8, 0):
        yield f"compute capability {_dotted(device)}, needed: 8.0"
    if task.captured:
        yield "its plan waits for the host in every layer and step"
    if task.head_size not in (64, 128, 256):
        yield f"head size {task.head_size}, allowed: 64, 128, 256"
    if task.dtype not in ("float16", "bfloat16"):
        yield f"a KV cache of {task.dtype}, allowed: float16, bfloat16"


def _dotted(device: Device) -> str:
    return ".".join(map(str, device.capability))


TABLE: tuple[tuple[Path, str, Callable[[Device, Task], Refusals]], ...] = (
    ("xqa", "page tables and lengths stay on the device, and nothing is estimated", _xqa),
    ("triton", "reads lists of pages or tokens on the device, and gives the log-sum-exp", _triton),
    ("block-sparse", "one mask for all KV heads, planned by the host", _blocks),
    ("variable-block-sparse", "a mask for each KV head, planned by the host", _variable_blocks),
)
"""Paths in the order of preference, what speaks for each, and what speaks against it."""


def device_here() -> Device | None:
    """The first CUDA device of this process, or None; imports torch, and nothing of FlashInfer."""
    from importlib import metadata
    from importlib.util import find_spec

    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    found = next(iter(metadata.distributions(name="flashinfer-python")), None)
    return Device(
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        triton=find_spec("triton") is not None,
        flashinfer="" if found is None else found.version,
    )
