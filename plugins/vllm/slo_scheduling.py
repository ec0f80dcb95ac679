"""vLLM's scheduler under the SLO planner: one plan before each step, carried out through vLLM's own seams.

Nothing of ``Scheduler.schedule`` is replaced. A plan sets the order of running requests, the step's budget,
each request's tokens, and who comes in; while nobody has targets there is no plan and every step is stock's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from penstock.plugins.configuration import scheduler_config
from penstock.plugins.vllm.askings import Askings
from penstock.plugins.vllm.cached_prefix import CachedPrefix
from penstock.plugins.vllm.decode_batch import DecodeBatch
from penstock.plugins.vllm.draft_control import DraftControlling
from penstock.plugins.vllm.slo_queue import PlannedQueue
from penstock.plugins.vllm.slo_records import Records
from penstock.plugins.vllm.slo_stats import SLOStats
from penstock.schedulers.slo.decodes import RunningBatch
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures
from penstock.schedulers.slo.steps_in_flight import StepsInFlight
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

PASSIVE_STEPS = 8
"""While nobody has targets the time of one step in so many is learned from."""

ENDED_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SLOScheduling(DraftControlling):
    """The part of a scheduler that is ours; mixed in before a scheduler of vLLM's.

    ``clock`` gives seconds and may be virtual; ``wall_clock`` is the one that stamps arrivals in the front
    end. ``front_end_exports`` says that the process at the other end takes our statistics.
    """

    def __init__(
        self,
        *args: Any,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        planner: Planner | None = None,
        front_end_exports: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.config = scheduler_config(self.vllm_config.additional_config)
        self.clock = clock
        self._cached = CachedPrefix(self)
        slo = self.config.slo
        if self.vllm_config.use_v2_model_runner:
            # Its workers keep the tokens of whom a step passes over.
            slo = msgspec.structs.replace(slo, resumed_token_s=0.0)
        self.planner = planner or Planner(slo)
        asking_of = Askings(self.config).of
        self.records = Records(self.config, asking_of, clock, wall_clock, int(self.num_spec_tokens))
        self.control_drafts(self.config.speculation, clock, asking_of, self.planner.model)
        if self.drafts is not None:
            self.planner.drafts = self.drafts.drafts
        self.waiting = PlannedQueue(self.planner, self._job_of, self._cap_everybody)
        self.plan: Plan = PASSIVE
        self._decoding = DecodeBatch(self.planner.config.pace)
        self._steps = StepsInFlight()
        self._stats = SLOStats(self.planner, self.config.slo.tiers_s, clock, export=front_end_exports)
        self._step_tokens: int = self.max_num_scheduled_tokens
        self._cuts_anywhere = self.num_prefill_lookahead <= 1
        self._was_empty = False
        self._output_s = clock()

    def _job_of(self, request: Request) -> Waiting:
        record = self.records.of(request)
        # What the cache holds changes deadlines' order by nothing: without targets it is not looked up.
        cached = self._cached.tokens_of(request) if record.running.targets else 0
        return self.records.waiting(request, cached)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step as planned; vLLM's own where nobody has targets, or where the last plan held nothing."""
        now_s = self.clock()
        holding = self._holding() if self.records.with_targets else []
        self.plan = self._make_plan(now_s, holding)
        if self.plan.active:
            self._carry_out(self.plan, holding)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = self._step_tokens
            self._cap_everybody()
        self._was_empty = not output.total_num_scheduled_tokens
        if self.plan.whole and len(output.num_scheduled_tokens) != len(self.running):
            # One has its last token in flight, or was set back by a load that failed.
            self.records.look_again()
            self._decoding.forget()
        if self.records.with_targets or not self.planner.counters.plans % PASSIVE_STEPS:
            features = self._features(output)
            predicted_s = self.planner.model.seconds(features)
            self._steps.begin(output, features, predicted_s, now_s)
        return output

    def _make_plan(self, now_s: float, holding: list[Request]) -> Plan:
        planner = self.planner
        if not self.records.with_targets:
            return planner.plan(now_s, (), 0, NO_LIMITS)
        if self._was_empty or self._pause_state != PauseState.UNPAUSED:
            # A plan that serves nobody is never made twice in a row.
            self._stats.yielded_steps += self._was_empty
            return PASSIVE
        limits = Limits(
            step_tokens=self._step_tokens,
            running_requests=self.max_num_active_reqs - self.num_waiting_for_streaming_input,
            in_flight_s=self._steps.left_s(now_s),
            block_tokens=self.block_size,
        )
        free_kv_tokens = self._free_kv_tokens()
        others = self._look_at_others()
        closed = planner.closed(len(self.running), limits) and not holding
        if closed and self._decoding.is_all_of(self.running):
            whole = planner.whole(now_s, self._decoding.names, free_kv_tokens, limits)
            if whole is not None:
                return whole
        if holding:
            others += self.records.running(holding, self._output_s)
        running = RunningBatch(self._decoding.columns(self._output_s), others)
        return planner.plan(now_s, running, free_kv_tokens, limits)

    def _look_at_others(self) -> list[Running]:
        """Requests that run and are not known to decode on, as the planner sees them; if all of them do, they
        are known from now on."""
        others = self._decoding.others(self.running)
        found = self.records.running(others, self._output_s)
        decode = len(found) == len(others) and self.records.all_decode(others)
        if not decode or self.num_spec_tokens:
            return found
        self._decoding.join(others, found, self._output_s)
        return []

    def _holding(self) -> list[Request]:
        """Requests that wait with KV blocks of their own and may run: vLLM takes them in first."""
        found = []
        for request in self.kv_holding_waiting:
            loaded = (
                request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
                and request.request_id in self.finished_recving_kv_req_ids
            )
            if loaded or request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                self.records.of(request)
                found.append(request)
        return found

    def _free_kv_tokens(self) -> int:
        """Tokens that fit into blocks that are free or held by the prefix cache alone."""
        manager = self.kv_cache_manager
        groups = max(1, len(self.kv_cache_config.kv_cache_groups))
        return int(manager.block_pool.get_num_free_blocks() * self.block_size // groups)

    def _carry_out(self, plan: Plan, holding: list[Request]) -> None:
        if plan.whole:
            self.max_num_scheduled_tokens = plan.step_tokens
            if not self.kv_holding_waiting:
                self._leave_decodes()
            return
        if plan.preempt:
            self._throw_out(plan.preempt)
        adapted = self._adapted_beside(plan) if self.lora_config else {}
        if adapted:
            self.plan = msgspec.structs.replace(plan, caps={**plan.caps, **adapted})
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

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.records.preempted(request.request_id)
        self._decoding.forget()
        super()._preempt_request(request, *args, **kwargs)

    def _handle_invalid_blocks(self, *args: Any, **kwargs: Any) -> Any:
        # A load failed: requests that run may be set back, and have a prompt to compute again.
        self.records.look_again()
        self._decoding.forget()
        return super()._handle_invalid_blocks(*args, **kwargs)

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

    def _features(self, output: SchedulerOutput) -> StepFeatures:
        """What a step holds. ``num_computed_tokens`` counts its tokens already."""
        scheduled, requests = output.num_scheduled_tokens, self.requests
        tokens = output.total_num_scheduled_tokens
        decoding = self._decoding
        others = scheduled.keys() - decoding.names
        beside = sum([scheduled[name] for name in others])
        if len(scheduled) - len(others) == len(decoding.names) == tokens - beside > 0:
            computed = decoding.went_on() + sum([requests[name].num_computed_tokens for name in others])
        else:
            decoding.forget()
            computed = sum([requests[name].num_computed_tokens for name in scheduled])
        return StepFeatures(tokens, len(scheduled), computed - tokens)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        before_s, self._output_s = self._output_s, self.clock()
        output = args[0] if args else kwargs["scheduler_output"]
        ended = self._steps.end(output, self._output_s)
        if ended is not None:
            flight, seconds = ended
            self.planner.observe_step(flight.features, seconds)
            self._stats.stepped(flight.predicted_s, seconds)
        records = self.records
        served = output.num_scheduled_tokens
        others = self._decoding.others(self.running)
        everyone = self._decoding.are_in(served) and all(one.request_id in served for one in others)
        if not everyone:
            records.catch_up(self.running, before_s)
        outputs = super().update_from_output(*args, **kwargs)
        if records.with_targets:
            records.produced(self.requests, served, self._output_s, everyone=everyone)
        return outputs

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        # Every request ends here, whatever it was doing.
        self._decoding.left(request)
        result = super()._free_request(request, *args, **kwargs)
        record = self.records.ended(request, self._output_s)
        if record is not None and request.status in ENDED_BY_ITSELF:
            self._stats.ended(record, request.num_tokens)
            class_name = record.running.class_name
            self.planner.observe_finish(request.request_id, class_name, request.num_output_tokens)
        else:
            self.planner.leave(request.request_id)
        return result

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._stats.add_to(stats, idle=not self.has_unfinished_requests())
            self.add_draft_counts(stats)
        return stats

    def check_integrity(self) -> None:
        """Assert that queue, planner, records and vLLM's own tables agree."""
        self.waiting.check_integrity()
        self.planner.check_integrity()
        self.records.check_integrity(list(self.requests))


NO_LIMITS = Limits(step_tokens=0, running_requests=0)


class SyncSLOScheduler(SLOScheduling, Scheduler):
    """For engines that schedule a step when the one before has ended."""


class AsyncSLOScheduler(SLOScheduling, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""
