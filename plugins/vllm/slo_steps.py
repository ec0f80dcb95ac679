"""A plan carried out through vLLM's own seams: who is first to lose its blocks, the step's budget, each
request's tokens, and whom to preempt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from vllm.v1.request import RequestStatus

from penstock.plugins.vllm.behind_model import BehindTheModel
from penstock.plugins.vllm.slo_queue import PlannedQueue
from penstock.plugins.vllm.slo_records import Records
from penstock.schedulers.slo.plan import Plan

if TYPE_CHECKING:
    from vllm.v1.request import Request


class PlannedSteps(BehindTheModel):
    """Sets the scheduler up for one step; whoever mixes this in makes ``plan`` and restores the budget."""

    records: Records
    waiting: PlannedQueue
    _step_tokens: int
    _cuts_anywhere: bool

    def _carry_out(self, plan: Plan, holding: list[Request]) -> Plan:
        if plan.whole:
            self.max_num_scheduled_tokens = plan.step_tokens
            if not self.kv_holding_waiting:
                self._leave_decodes()
            return plan
        if plan.preempt:
            self._throw_out(plan.preempt)
        adapted = self._adapted_beside(plan) if self.lora_config else {}
        if adapted:
            plan = msgspec.structs.replace(plan, caps={**plan.caps, **adapted})
        if plan.reorders:
            # Whom the plan leaves out has its last token in flight, and must not be the one to throw out.
            places = {name: place for place, name in enumerate(plan.order)}
            self.running.sort(key=lambda request: places.get(request.request_id, -1))
        others = self.records.prompts or self.kv_holding_waiting or self.num_spec_tokens
        if not others and len(plan.caps) - len(plan.waiting) == len(self.running):
            self._leave_decodes()
        beside = sum(request.request_id not in plan.caps for request in holding)
        drafts = 0
        if self.num_spec_tokens:
            drafts = sum(plan.drafts.values())
            if self.drafts is None:
                drafts = sum(len(one.spec_token_ids) for one in self.running if one.request_id in plan.caps)
            # vLLM pads whom it admits with one token left to a whole draft.
            drafts += self.num_spec_tokens * (len(holding) + len(plan.waiting))
        more = beside + drafts + len(adapted)
        self.max_num_scheduled_tokens = min(self._step_tokens, plan.step_tokens + more)
        return plan

    def _adapted_beside(self, plan: Plan) -> dict[str, int]:
        """A token for each running request with a LoRA adapter that ``plan`` passes over: vLLM admits by the
        adapters of the requests that it schedules, and asserts later that those of all that run have room.
        """
        running = (request for request in self.running if request.lora_request)
        return {one.request_id: 1 for one in running if one.request_id not in plan.caps}

    def _leave_decodes(self) -> None:
        """Where all that run decode in this step, vLLM's own hook says the same of each as the plan's caps;
        from the first look at the queue on, those are asked."""
        self._reserve_prefill_lookahead = super()._reserve_prefill_lookahead  # type: ignore[method-assign]
        self.waiting.begin_step()

    def _cap_everybody(self) -> None:
        self.__dict__.pop("_reserve_prefill_lookahead", None)

    def _throw_out(self, names: tuple[str, ...]) -> None:
        """Preempt as vLLM does when blocks run out: what is in flight is delivered."""
        now_s = time.monotonic()
        for name in names:
            request = self.requests[name]
            if request.status == RequestStatus.RUNNING and self._request_blocks_can_be_freed(request):
                self.running.remove(request)
                self._preempt_request(request, now_s, drop_stale_output=self.requires_kv_delivery)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        if self.plan.active:
            if num_new_tokens == 1 and self._cuts_anywhere and request.status is RequestStatus.RUNNING:
                return 1 if request.request_id in self.plan.caps else 0
            num_new_tokens = self._cap(request, num_computed_tokens, num_new_tokens)
            if not num_new_tokens:
                return 0
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return tokens

    def _cap(self, request: Request, computed: int, wanted: int) -> int:
        """Tokens of a request in this step. 0 passes over a running one and ends the admission of others."""
        planned = self.plan.caps.get(request.request_id, 0)
        if request.status is not RequestStatus.RUNNING:
            if not planned and request in self.kv_holding_waiting:
                # It stands before all who wait; 0 would keep them out.
                planned = 1
            if request.num_tokens - computed <= 1:
                # vLLM may have padded it to a whole draft, which must stay whole.
                return wanted if planned else 0
        elif request.spec_token_ids:
            planned += len(request.spec_token_ids) if planned else 0
        if request.has_encoder_inputs or self.need_mamba_block_aligned_split:
            # Where a chunk may end is not ours to choose: the step's budget alone bounds it.
            return wanted if planned else 0
        return min(wanted, planned)
