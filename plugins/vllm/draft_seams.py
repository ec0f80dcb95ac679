"""The upstream names that drafting and its control stand on."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm.flowkv_seams import read

DRAFTER = (
    Seam("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", Use.CALL, "(vllm_config)"),
    *read("vllm.config.speculative:SpeculativeConfig", "num_speculative_tokens", "model", "method"),
    *read("vllm.config.scheduler:SchedulerConfig", "max_num_seqs"),
    *read("vllm.config.vllm:VllmConfig", "additional_config", "speculative_config", "model_config"),
)
"""How a drafter that is not vLLM's is made, and what it reads."""
