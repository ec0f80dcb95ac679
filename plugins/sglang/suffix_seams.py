"""How drafts from suffixes come to SGLang, and the upstream names that they stand on."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang.flowkv_seams import override
from penstock.plugins.sglang.scheduler_seams import read
from penstock.plugins.sglang.suffix_settings import ALGORITHM

_SPECULATIVE = "sglang.srt.speculative"
_ALGORITHM = f"{_SPECULATIVE}.spec_info:SpeculativeAlgorithm"
_CUSTOM = f"{_SPECULATIVE}.spec_registry:CustomSpecAlgo"
_WORKER = f"{_SPECULATIVE}.ngram_worker:NGRAMWorker"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
CORPUS = f"{_SPECULATIVE}.cpp_ngram.ngram_corpus:NgramCorpus"
_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter"
COUNTING = f"{_REPORTER}.update_spec_metrics"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Our entry in SGLang's registry of speculative algorithms."""

    @property
    def target(self) -> str:
        """The registry's front."""
        return f"{_ALGORITHM}.register"

    def register(self) -> None:
        """Hand it over; a second time without effect."""
        from penstock.plugins.sglang.suffix_algorithm import register

        if not self.in_place():
            register()

    def in_place(self) -> bool:
        """Whether the registry has it, and as ours."""
        from sglang.srt.speculative.spec_registry import get_spec

        from penstock.plugins.sglang.suffix_algorithm import SuffixAlgorithm

        return isinstance(get_spec(ALGORITHM), SuffixAlgorithm)


REGISTRY = (
    Seam(
        f"{_ALGORITHM}.register",
        Use.CALL,
        "(cls, name, *, supports_overlap=..., validate_server_args=..., spec_class=...)",
    ),
    Seam(f"{_SPECULATIVE}.spec_registry:get_spec", Use.CALL, "(name)"),
    *override(
        _CUSTOM,
        is_ngram="(self)",
        has_draft_kv="(self)",
        handle_server_args="(self, server_args)",
    ),
    *override(_ALGORITHM, carries_draft_hidden_states="(self)", need_topk="(self)"),
    *read(_ALGORITHM, "create_future_map"),
    Seam("sglang.srt.utils.common:is_cpu", Use.READ),
)
"""Where the algorithm is registered, and what SGLang asks of it."""

WORKER = (
    *override(
        _WORKER,
        _prepare_draft_tokens="(self, batch)",
        _update_ngram_corpus="(self, batch)",
        clear_cache_pool="(self)",
        on_verify_complete_cpu="(self, num_correct_drafts_per_req, batch_size=...)",
    ),
    # What a pass without a verification goes through is the rest of these.
    Seam(
        f"{_WORKER}._prepare_for_speculative_decoding",
        Use.PATCH,
        "(self, batch)",
        fingerprints=("1046f4fa8a99", "d1ebc024f5e1"),
        wraps=True,
    ),
    Seam(
        f"{_WORKER}.forward_batch_generation",
        Use.PATCH,
        "(self, batch, on_publish=..., pp_proxy_tensors=...)",
        fingerprints=("1d860bccc96f",),
        wraps=True,
    ),
    *read(_WORKER, "draft_token_num", "model_runner", "device"),
    Seam(CORPUS, Use.PATCH),
    *override(CORPUS, reset="(self)", erase_match_state="(self, req_ids)"),
    *read(f"{_SPECULATIVE}.ngram_info:NgramVerifyInput", "accept_tokens", "accept_lens"),
    *read(
        _BATCH,
        "forward_mode",
        "has_grammar",
        "input_ids",
        "out_cache_loc",
        "req_pool_indices",
        "req_to_token_pool",
        "reqs",
        "return_hidden_states",
        "return_logprob",
        "seq_lens",
        "seq_lens_cpu",
        "seq_lens_sum",
        "spec_info",
    ),
    *read(
        "sglang.srt.managers.schedule_batch:Req",
        "rid",
        "origin_input_ids",
        "origin_input_ids_unpadded",
        "output_ids",
        "return_sampling_mask",
    ),
    Seam(
        "sglang.kernels.ops.speculative.cache_locs:assign_extend_cache_locs_func",
        Use.CALL,
        "(req_pool_indices, req_to_token, start_offset, end_offset, batch_size, draft_token_num, device)",
    ),
    *read("sglang.srt.model_executor.model_runner:ModelRunner", "decode_cuda_graph_captured", "model_config"),
    Seam("sglang.srt.configs.hybrid_arch:mambaish_config", Use.CALL, "(model_config)"),
    Seam("sglang.srt.runtime_context:get_spec", Use.CALL, "()"),
)
"""The worker whose drafts are replaced, and what it reads of a batch."""

METRICS = (
    Seam(
        COUNTING,
        Use.PATCH,
        "(self, bs, num_correct_drafts, num_accept_tokens, num_block_accept_tokens=..., num_cap_tokens=...)",
        wraps=True,
    ),
    *read(_REPORTER, "metrics_collector", "scheduler"),
    *read("sglang.srt.managers.scheduler:Scheduler", "draft_worker"),
    *read("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector", "labels"),
)
"""Where SGLang counts what was verified."""
