"""LoRA adapters without a device: SGLang pins memory that it copies their sizes from, which torch refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from sglang.srt.lora import layers
from sglang.srt.lora.backend import torch_backend


class Unpinned:
    """``torch`` for a module that asks for pinned memory: its tensors lie in ordinary memory."""

    def __init__(self) -> None:
        self.empty, self.tensor, self.zeros = map(unpinned, (torch.empty, torch.tensor, torch.zeros))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``make`` without its ``pin_memory``."""

    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


def as_it_is(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    """``Tensor.pin_memory`` where nothing can be pinned."""
    return tensor


def install() -> None:
    """Let ``--lora-backend torch_native`` serve."""
    for module in (layers, torch_backend):
        module.torch = Unpinned()
    torch.Tensor.pin_memory = as_it_is
