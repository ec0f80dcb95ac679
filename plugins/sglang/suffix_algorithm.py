"""The algorithm as SGLang's registry of speculative algorithms holds it."""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo
from sglang.srt.utils.common import is_cpu

from penstock.plugins.sglang.suffix_settings import (
    ALGORITHM,
    DRAFT_TOKENS,
    RUNNING_REQUESTS,
    branches_of,
    require_draftable,
)


class SuffixAlgorithm(CustomSpecAlgo):
    """To SGLang's scheduler it is drafts without a model, which it knows as n-grams."""

    # The registry's class lacks what the scheduler asks of an algorithm besides.
    create_future_map = SpeculativeAlgorithm.create_future_map

    def is_ngram(self) -> bool:
        return True

    def has_draft_kv(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def handle_server_args(self, server_args: Any) -> None:
        width = server_args.speculative_num_draft_tokens or DRAFT_TOKENS
        branches = min(branches_of(server_args), width - 1)
        server_args.speculative_num_draft_tokens = width
        server_args.speculative_eagle_topk = branches
        # SGLang sets memory aside for as many steps of as many branches.
        server_args.speculative_num_steps = max(1, width // branches)
        server_args.max_running_requests = server_args.max_running_requests or RUNNING_REQUESTS
        if is_cpu():
            # SGLang's CPU engine verifies without overlap, whoever drafts.
            server_args.disable_overlap_schedule = True


def register() -> None:
    """Hand the algorithm to SGLang.

    Raises:
        ValueError: the name is taken.
    """
    hand_over = SpeculativeAlgorithm.register(
        ALGORITHM,
        supports_overlap=True,
        validate_server_args=require_draftable,
        spec_class=SuffixAlgorithm,
    )
    hand_over(_worker)


def _worker(_server_args: Any) -> type:
    # Its module brings SGLang's kernels, which only a scheduler's process needs.
    from penstock.plugins.sglang.suffix_worker import SuffixWorker

    return SuffixWorker
