"""A reference CPU platform for stock SGLang: correct and slow, for tests on machines without a GPU."""

from __future__ import annotations

import torch

PLATFORM = "penstock_refcpu.platform:ReferenceCpuPlatform"
NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def activate() -> str | None:
    """The platform's class for SGLang (``sglang.srt.platforms``); None, which leaves SGLang alone, where a
    GPU is visible."""
    if torch.cuda.is_available():
        return None
    declare_torchvision_operators()
    return PLATFORM


def declare_torchvision_operators() -> None:
    """Let ``import torchvision`` succeed beside a CPU build of torch; call it before importing transformers.

    SGLang imports torchvision whatever the model. Its default wheel is linked against CUDA, so its library of
    operators does not load here, and torchvision then trips over the missing schema of one.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", NMS_SCHEMA)
