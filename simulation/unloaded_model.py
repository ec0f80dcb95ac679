"""A model that no simulation loads, and that engines take for one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VOCABULARY = 32_000
STOP = VOCABULARY - 1
"""The token that ends an answer before it is as long as was allowed."""


@contextmanager
def unloaded_model(context_tokens: int, dtype: str) -> Iterator[str]:
    """A folder with the configuration of a model of ``context_tokens`` and ``dtype``, and nothing else.

    Its shape decides nothing but what the engine's own configuration accepts.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "eos_token_id": STOP,
        "max_position_embeddings": context_tokens,
        "torch_dtype": dtype,
    }
    with tempfile.TemporaryDirectory(prefix="penstock-simulated-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder
