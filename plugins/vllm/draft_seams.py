"""The upstream names that drafting and its control stand on."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm.flowkv_seams import override, read

DRAFTER = (
    Seam("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", Use.CALL, "(vllm_config)"),
    *read("vllm.config.speculative:SpeculativeConfig", "num_speculative_tokens", "model", "method"),
    *read("vllm.config.scheduler:SchedulerConfig", "max_num_seqs"),
    *read("vllm.config.vllm:VllmConfig", "additional_config", "speculative_config", "model_config"),
)
"""How a drafter that is not vLLM's is made, and what it reads."""

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

CONTROL = (
    *override(
        _SCHEDULER,
        schedule="(self, *args, **kwargs)",
        update_from_output="(self, scheduler_output, model_runner_output)",
        _free_request="(self, request, *args, **kwargs)",
        _update_after_schedule="(self, scheduler_output)",
    ),
    *read(
        _SCHEDULER,
        "running",
        "waiting",
        "num_spec_tokens",
        "max_num_running_reqs",
        "max_num_scheduled_tokens",
    ),
    *read(
        "vllm.v1.request:Request",
        "spec_token_ids",
        "is_prefill_chunk",
        "num_output_tokens",
        "num_computed_tokens",
        "num_tokens",
    ),
    *read(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_invalid_spec_tokens",
        "num_spec_tokens_to_schedule",
    ),
    *read("vllm.config.speculative:SpeculativeConfig", "method", "parallel_drafting", "use_multi_module_mtp"),
    *read("vllm.config.vllm:VllmConfig", "use_v2_model_runner", "parallel_config", "speculative_config"),
    *read("vllm.config.parallel:ParallelConfig", "data_parallel_size"),
    *read("vllm.v1.outputs:ModelRunnerOutput", "sampled_token_ids", "req_id_to_index"),
    *read("vllm.v1.core.sched.output:CachedRequestData", "resumed_req_ids"),
)
"""Where drafts are cut before a step, and what is heard of them after it."""
