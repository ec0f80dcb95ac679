"""SGLang's prefill adder within the plan of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from penstock.plugins.sglang.slo_policy import PlannedPolicy


def planned(adder: type, policy: PlannedPolicy) -> type:
    """``adder``, whose prompts get no more tokens than ``policy`` plans, and the chunked one no more than its
    part."""

    class PlannedAdder(adder):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.rem_chunk_tokens: int
            self.chunked_req_limit: int | None
            if policy.prompt_tokens is not None:
                self.rem_chunk_tokens = min(self.rem_chunk_tokens, policy.prompt_tokens)

        def add_chunked_req(self, req: Req) -> Any:
            limit = policy.chunk_limit(req)
            if limit is not None:
                given = self.chunked_req_limit
                self.chunked_req_limit = limit if given is None else min(limit, given)
            return super().add_chunked_req(req)

        def add_one_req(self, req: Req, has_chunked_req: bool, *args: Any, **kwargs: Any) -> Any:
            if has_chunked_req and policy.plan.active and not self._fits_whole(req):
                # SGLang keeps track of one request in chunks at a time.
                return AddReqResult.OTHER
            taken = len(self.can_run_list)
            result = super().add_one_req(req, has_chunked_req, *args, **kwargs)
            if len(self.can_run_list) > taken:
                policy.admitted(req)
            return result

        def _fits_whole(self, req: Req) -> bool:
            left = len(req.full_untruncated_fill_ids) - req.prefix_len
            return bool(-(-left // self.page_size) * self.page_size <= self.rem_chunk_tokens)

    return PlannedAdder
