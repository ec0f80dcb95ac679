"""SGLang's prefill adder within the plan of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from penstock.plugins.sglang.slo_policy import PlannedPolicy


def planned(adder: type, policy: PlannedPolicy) -> type:
    """``adder``, whose prompts get no more tokens than ``policy`` plans, and the chunked one no more than its
    part.

    Stock gives the chunked prompt all there is, so that nobody takes the memory that it was admitted for, and
    ends the scheduler where it has none. Beside its part others come in and decodes grow: what is left of it
    is reserved before anybody else, and it waits where decodes took what it needs.
    """

    class PlannedAdder(adder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.rem_chunk_tokens: int
            self.chunked_req_limit: int | None
            self._waits = False
            if policy.prompt_tokens is not None:
                self.rem_chunk_tokens = min(self.rem_chunk_tokens, policy.prompt_tokens)

        def add_chunked_req(self, req: Req) -> Any:
            limit = policy.chunk_limit()
            if limit is None:
                return super().add_chunked_req(req)
            room = int(self.cur_rem_tokens) - self.per_req_token_overhead
            limit = min(limit, room // self.page_size * self.page_size)
            if limit <= 0:
                self._waits = True
                return req
            given = self.chunked_req_limit
            self.chunked_req_limit = limit if given is None else min(limit, given)
            unfinished = super().add_chunked_req(req)
            if unfinished is not None:
                self.memory_budget.total_offset += self._still_to_come(req)
            return unfinished

        def add_one_req(self, req: Req, has_chunked_req: bool, *args: Any, **kwargs: Any) -> Any:
            # SGLang tracks one request in chunks at a time, and counts a pass of anybody as one of its.
            if self._waits or (has_chunked_req and policy.plan.active and not self._fits_whole(req)):
                return AddReqResult.OTHER
            taken = len(self.can_run_list)
            result = super().add_one_req(req, has_chunked_req, *args, **kwargs)
            if len(self.can_run_list) > taken:
                policy.admitted(req)
            return result

        def _still_to_come(self, req: Req) -> int:
            """Tokens of the prompt behind this chunk, and those of its answer as stock counts them."""
            answer = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
            prompt = len(req.full_untruncated_fill_ids) - req.extend_end
            return int(prompt + min(answer, CLIP_MAX_NEW_TOKENS))

        def _fits_whole(self, req: Req) -> bool:
            left = len(req.full_untruncated_fill_ids) - req.prefix_len
            return bool(-(-left // self.page_size) * self.page_size <= self.rem_chunk_tokens)

    return PlannedAdder
