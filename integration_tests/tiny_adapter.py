"""A LoRA adapter with random weights for the tiny model or the needle, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file

from penstock.benchmarks.needle.model import NeedleShape
from penstock.benchmarks.tiny_model import TinyLlama

RANK = 4


def write_adapter(
    folder: Path,
    seed: int,
    spec: TinyLlama | NeedleShape | None = None,
    *,
    size: float = 0.3,
    projection: Literal["q_proj", "o_proj"] = "q_proj",
) -> Path:
    """Write an adapter of one projection; its default ``size`` changes what greedy decoding says."""
    spec = spec or TinyLlama()
    inputs, outputs = spec.hidden_size, spec.heads * spec.head_size
    if projection == "o_proj":
        inputs, outputs = outputs, inputs
    rng = np.random.default_rng(seed)
    weights = {}
    for layer in range(spec.layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
        for half, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
            weights[f"{prefix}.{half}.weight"] = rng.standard_normal(shape, dtype=np.float32) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [projection],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
