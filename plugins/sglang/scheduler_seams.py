"""The upstream names that request scheduling stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_POLICY = "sglang.srt.managers.schedule_policy:SchedulePolicy"
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
_REQUEST = "sglang.srt.managers.schedule_batch:Req"


def read(owner: str, *names: str) -> tuple[Seam, ...]:
    """Names that are read."""
    return tuple(Seam(f"{owner}.{name}", Use.READ) for name in names)


PASSES = (
    Seam(f"{_SCHEDULER}.init_schedule_policy", Use.PATCH, "(self)", wraps=True),
    Seam(f"{_SCHEDULER}.get_prefill_adder_class", Use.PATCH, "(self)", wraps=True),
    Seam(
        "sglang.srt.sampling.sampling_params:SamplingParams.verify",
        Use.PATCH,
        "(self, vocab_size)",
        wraps=True,
    ),
    # Its walk of the waiting list is what the order relies on: one, after ``calc_priority``.
    Seam(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        Use.PATCH,
        "(self, prefill_delayer_single_pass, running_batch)",
        fingerprints=("ea6fa4541a12",),
        wraps=True,
    ),
    *read(
        _SCHEDULER,
        "policy",
        "schedule_policy",
        "server_args",
        "tree_cache",
        "waiting_queue",
        "enable_hierarchical_cache",
        "enable_priority_scheduling",
        "schedule_low_priority_values_first",
    ),
)
"""How a pass over the waiting requests begins, goes on and ends."""

POLICY = (
    Seam(
        f"{_POLICY}.__init__",
        Use.CALL,
        "(self, policy, tree_cache, enable_hierarchical_cache, enable_priority_scheduling,"
        " schedule_low_priority_values_first)",
    ),
    Seam(f"{_POLICY}.calc_priority", Use.OVERRIDE, "(self, waiting_queue, *args, **kwargs)"),
    Seam("sglang.srt.mem_cache.common:match_kv_cache", Use.CALL, "(req, tree_cache)"),
)
"""The policy object that is replaced."""

ADMISSION = (
    Seam(f"{_ADDER}.add_one_req", Use.OVERRIDE, "(self, req, *args, **kwargs)"),
    Seam(f"{_ADDER}.add_chunked_req", Use.OVERRIDE, "(self, req)"),
    *read(_ADDER, "can_run_list"),
)
"""Where a request, or its next chunk, joins a batch."""

REQUESTS = (
    *read(
        _REQUEST,
        "rid",
        "origin_input_ids",
        "output_ids",
        "sampling_params",
        "prefix_len",
        "extend_end",
        "num_matched_prefix_tokens",
        "finished",
    ),
    *read("sglang.srt.sampling.sampling_params:SamplingParams", "custom_params", "max_new_tokens"),
)
"""What is read of a request."""
