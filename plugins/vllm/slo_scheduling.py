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
from penstock.plugins.vllm.laid_out import LaidOut
from penstock.plugins.vllm.later import Later
from penstock.plugins.vllm.slo_queue import PlannedQueue
from penstock.plugins.vllm.slo_records import Records
from penstock.plugins.vllm.slo_stats import SLOStats
from penstock.plugins.vllm.slo_steps import PlannedSteps
from penstock.schedulers.slo.decodes import RunningBatch, foreseen
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.records import Record
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures
from penstock.schedulers.slo.steps_in_flight import Flight, StepsInFlight
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

PASSIVE_STEPS = 8
"""While nobody has targets the time of one step in so many is learned from."""

ENDED_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SLOScheduling(PlannedSteps):
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
        self._later = Later()
        self._scheduled: tuple[SchedulerOutput, float] | None = None
        self._last: SchedulerOutput | None = None
        self._serves_all = False
        self._ahead: LaidOut | None = None
        self._ended: set[str] = set()
        # To let go of hundreds of objects takes time, too.
        self._spent: tuple[object, ...] = ()

    def _job_of(self, request: Request) -> Waiting:
        record = self.records.of(request)
        # What the cache holds changes deadlines' order by nothing: without targets it is not looked up.
        cached = self._cached.tokens_of(request) if record.running.targets else 0
        return self.records.waiting(request, cached)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step as planned; vLLM's own where nobody has targets, or where the last plan held nothing."""
        now_s = self.clock()
        self.plan = self._make_plan(now_s)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = self._step_tokens
            self._cap_everybody()
        self._was_empty = not output.total_num_scheduled_tokens
        self._last, self._serves_all = output, len(output.num_scheduled_tokens) == len(self.running)
        if self.plan.whole and not self._serves_all:
            # One has its last token in flight, or was set back by a load that failed.
            self.records.look_again()
            self._decoding.forget()
        if self.records.with_targets or not self.planner.counters.plans % PASSIVE_STEPS:
            self._scheduled = output, now_s
        return output

    def _prepare(self) -> None:
        self._ahead = self._lay_out()

    def _catch_up(self) -> None:
        if self._later:
            # Who ended leaves the columns that the layout was made from.
            self._ahead = None
            self._ended.clear()
        super()._catch_up()
        if self._scheduled is not None:
            (output, now_s), self._scheduled = self._scheduled, None
            features = self._features(output)
            self._steps.begin(output, features, self.planner.model.seconds(features), now_s)
        self._stats.refresh()
        self._spent = ()

    def _lay_out(self) -> LaidOut | None:
        """The next step as far as it can be known, and the batch as it will be when this one has come back.
        None where the next plan has more to ask."""
        if not self._can_plan() or self.num_spec_tokens or self.kv_holding_waiting:
            return None
        now_s = self.clock()
        comes_back_s = self._steps.first_end_s(now_s)
        limits = self._limits(now_s)
        others = self._look_at_others(comes_back_s)
        if not others and self.planner.closed(len(self.running), limits):
            self.planner.lay_out_whole(now_s, self._decoding.names)
        running = RunningBatch(self._decoding.columns(comes_back_s), others)
        layout = self.planner.lay_out(now_s, running, self._free_kv_tokens(), limits)
        return LaidOut(layout, self.running) if layout is not None else None

    def _can_plan(self) -> bool:
        # A plan that serves nobody is never made twice in a row.
        paused = self._pause_state != PauseState.UNPAUSED
        return self.records.with_targets > 0 and not self._was_empty and not paused

    def _make_plan(self, now_s: float) -> Plan:
        """Decide the step and tell vLLM's scheduler."""
        ahead = self._take_layout()
        if not self._can_plan():
            if not self.records.with_targets:
                return self.planner.plan(now_s, (), 0, NO_LIMITS)
            self._stats.yielded_steps += self._was_empty
            return PASSIVE
        holding = self._holding()
        plan = self._complete(now_s, ahead) if ahead is not None and not holding else None
        if plan is None:
            self._catch_up()
            plan = self._plan_anew(now_s, holding)
        return self._carry_out(plan, holding) if plan.active else plan

    def _take_layout(self) -> LaidOut | None:
        """What was laid out for this step. Those who just arrived where few wait are decided on in it."""
        ahead, self._ahead = self._ahead, None
        self._spent = ahead, self.plan, self._last
        arrivals = self.waiting.arrivals
        if ahead is None or not self.records.with_targets or not self._ended.isdisjoint(arrivals):
            # Who comes back under an id that was put off to be forgotten comes after that.
            self._catch_up()
            return None
        if arrivals and len(arrivals) + self.planner.backlog.with_targets <= self.config.slo.replan_at_once:
            self.waiting.join()
        return ahead

    def _complete(self, now_s: float, ahead: LaidOut) -> Plan | None:
        """The plan that was laid out; None if the running batch is not that one but for those who ended."""
        if not ahead.is_for(self.running, self._ended):
            return None
        planner, limits = self.planner, self._limits(now_s)
        free_kv_tokens = self._free_kv_tokens()
        closed = not self._ended and planner.closed(len(self.running), limits)
        if closed and self._decoding.is_all_of(self.running):
            whole = planner.whole(now_s, self._decoding.names, free_kv_tokens, limits)
            if whole is not None:
                return whole
        return planner.complete(ahead.layout, now_s, self._ended, free_kv_tokens, limits)

    def _plan_anew(self, now_s: float, holding: list[Request]) -> Plan:
        planner, limits = self.planner, self._limits(now_s)
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

    def _limits(self, now_s: float) -> Limits:
        return Limits(
            step_tokens=self._step_tokens,
            running_requests=self.max_num_active_reqs - self.num_waiting_for_streaming_input,
            in_flight_s=self._steps.left_s(now_s),
            block_tokens=self.block_size,
        )

    def _look_at_others(self, comes_back_s: float | None = None) -> list[Running]:
        """Requests that run and are not known to decode on, as the planner sees them; if all of them do, they
        are known from now on. With ``comes_back_s`` as they will be when the step in flight comes back."""
        others = self._decoding.others(self.running)
        found = self.records.running(others, self._output_s, comes_back_s)
        decode = len(found) == len(others) and self.records.all_decode(others)
        if not decode or self.num_spec_tokens:
            return found if comes_back_s is None else [foreseen(one, comes_back_s) for one in found]
        self._decoding.join(others, found, self._output_s, comes_back_s)
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

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.records.preempted(request.request_id)
        self._decoding.forget()
        self._ahead = None
        super()._preempt_request(request, *args, **kwargs)

    def _handle_invalid_blocks(self, *args: Any, **kwargs: Any) -> Any:
        # A load failed: requests that run may be set back, and have a prompt to compute again.
        self.records.look_again()
        self._decoding.forget()
        self._ahead = None
        return super()._handle_invalid_blocks(*args, **kwargs)

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
        if self._scheduled is not None:
            self._catch_up()
        everyone = self._serves_all if output is self._last else self._served_all(output)
        if not everyone:
            self._catch_up()
            self.records.catch_up(self.running, before_s)
        ended = self._steps.end(output, self._output_s)
        if ended is not None:
            self._later.put(self._learn, *ended)
        outputs = super().update_from_output(*args, **kwargs)
        if self.records.with_targets:
            served = output.num_scheduled_tokens
            self._later.put(self.records.produced, self.requests, served, self._output_s, everyone=everyone)
        return outputs

    def _served_all(self, output: SchedulerOutput) -> bool:
        """Whether a step holds all that run now, after others were scheduled."""
        self._catch_up()
        served = output.num_scheduled_tokens
        others = self._decoding.others(self.running)
        return self._decoding.are_in(served) and all(one.request_id in served for one in others)

    def _learn(self, flight: Flight, seconds: float) -> None:
        self.planner.observe_step(flight.features, seconds)
        self._stats.stepped(flight.predicted_s, seconds)

    def _update_request_as_session(self, session: Request, *args: Any, **kwargs: Any) -> None:
        # The output of a turn becomes prompt of the next one: count it while it is output.
        self._catch_up()
        super()._update_request_as_session(session, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        # Every request ends here, whatever it was doing.
        if self._scheduled is not None:
            self._catch_up()
        result = super()._free_request(request, *args, **kwargs)
        record = self.records.close(request.request_id)
        self._ended.add(request.request_id)
        self._later.put(self._settle, request, record, self._output_s)
        return result

    def _settle(self, request: Request, record: Record | None, output_s: float) -> None:
        """Count a request that ended; the last tokens of it came at ``output_s``."""
        self._decoding.left(request)
        if record is not None:
            self.records.note_last(record, request, output_s)
        if record is not None and request.status in ENDED_BY_ITSELF:
            self._stats.ended(record, request.num_tokens)
            class_name = record.running.class_name
            self.planner.observe_finish(request.request_id, class_name, request.num_output_tokens)
        else:
            self.planner.leave(request.request_id)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            idle = not self.running and not self.has_unfinished_requests()
            if idle:
                self._catch_up()
            self._stats.add_to(stats, idle=idle)
            self.add_draft_counts(stats)
        return stats

    def check_integrity(self) -> None:
        """Assert that queue, planner, records and vLLM's own tables agree."""
        self._catch_up()
        self.waiting.check_integrity()
        self.planner.check_integrity()
        self.records.check_integrity(list(self.requests))


NO_LIMITS = Limits(step_tokens=0, running_requests=0)


class SyncSLOScheduler(SLOScheduling, Scheduler):
    """For engines that schedule a step when the one before has ended."""


class AsyncSLOScheduler(SLOScheduling, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""
