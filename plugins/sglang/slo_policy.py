"""SGLang's passes under the SLO planner.

A pass of SGLang computes prompts, or a token of every running request, or with ``--enable-mixed-chunk`` both.
The plan of one step is carried out in one mixed pass, or in a pass of prompts and one of decodes if the plan
has both. A plan decides whether a pass takes prompts at all, who comes in, and how many tokens the prompts
get; which of the running requests decode is not for it to choose. While no live request has a target there is
no plan, and every pass is stock's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import match_kv_cache

from penstock.patches.slo_gauges import slo_gauges
from penstock.plugins.sglang.decode_batch import DecodeBatch
from penstock.plugins.sglang.policy import PassPolicy
from penstock.plugins.sglang.queue_watch import QueueWatch
from penstock.plugins.sglang.shared_clock import SharedClock
from penstock.plugins.sglang.slo_adder import planned
from penstock.plugins.sglang.slo_prompts import PromptPasses
from penstock.plugins.sglang.slo_records import Records
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import COMPUTED, TPOT, RunningBatch
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.planner import Planner
from penstock.schedulers.slo.requests import Limits, Running
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.steps_in_flight import StepsInFlight
from penstock.schedulers.slo.totals import SLOTotals
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

PASSIVE_STEPS = 8
"""While nobody has targets the time of one pass in so many is learned from."""
NO_LIMITS = Limits(step_tokens=0, running_requests=0)


class PlannedPolicy(PassPolicy):
    """A ``PassPolicy`` over a ``Planner``."""

    def __init__(
        self,
        scheduler: Any,
        config: SchedulerConfig,
        clock: Clock = time.monotonic,
        model: StepTimeModel | None = None,
    ) -> None:
        super().__init__(scheduler, config, clock)
        mixed = scheduler.is_mixed_chunk
        self.planner = Planner(_for_whole_passes(config.slo, mixed=mixed), model)
        self._passes = PromptPasses(self.planner, mixed=mixed, page=scheduler.page_size)
        shared = clock if isinstance(clock, SharedClock) else None
        self.records = Records(config, self.asking, clock, _front_clock(clock))
        self._decoding = DecodeBatch(self.planner.config.pace, self.records)
        self.totals = SLOTotals(self.planner, config.slo.tiers_s)
        self.plan: Plan = PASSIVE
        self.prompt_tokens: int | None = None
        """What the prompts of the pass may have; None leaves it to SGLang."""
        self._chunk_tokens = 0
        """What the one that goes on in chunks may have of that."""
        self._waiting: dict[str, Req] = {}
        self._queue = QueueWatch()
        self._steps = StepsInFlight()
        self._owes_decodes = self._awaits_launch = False
        # On a CPU the model has run when SGLang has launched it; on a virtual clock no time passed.
        real = shared is not None or clock is time.monotonic
        self._launch_is_run = scheduler.device == "cpu" and real
        self._at_end = shared.at_next if shared is not None else _at_once
        """Makes a call when the clock shows when what just ended did."""
        self.publish(self.totals, slo_gauges)

    def defers_prefill(self, running_batch: ScheduleBatch) -> bool:
        now_s = self.clock()
        self.plan, self.prompt_tokens = PASSIVE, None
        self._meet(self.scheduler.waiting_queue)
        if not self.records.with_targets:
            self.planner.plan(now_s, (), 0, NO_LIMITS)
            self._owes_decodes = self._awaits_launch = False
            return False
        if self._awaits_launch:
            # The pass that was planned held nothing: this one is SGLang's own.
            self._awaits_launch = False
            self.totals.yielded_steps += 1
            return False
        if self._owes_decodes:
            self._owes_decodes = False
            return bool(running_batch.reqs)
        return self._decide(now_s, running_batch)

    def _decide(self, now_s: float, running_batch: ScheduleBatch) -> bool:
        """Make a plan; True if it has no prompts."""
        chunked = self.scheduler.chunked_req
        in_flight = self._in_flight()
        others = self._look_at_others(running_batch.reqs, in_flight)
        if chunked is None and self._all_decode_on(now_s, running_batch.reqs):
            self._awaits_launch = True
            return True
        self._forget_beside({*running_batch.reqs, *in_flight, chunked})
        columns = self._decoding.columns()
        others = [request for request in others if request.output_tokens < request.max_output_tokens]
        decodes = len(columns) + len(others)
        context = int(columns.values[COMPUTED].sum()) + sum(request.computed_tokens for request in others)
        limits = self._limits(now_s, decodes, context)
        part = None if chunked is None else self.records.chunked(chunked)
        if part is not None:
            others.append(part)
        plan = self.planner.plan(now_s, RunningBatch(columns, others), self._free_kv_tokens(), limits)
        if plan.preempt:
            self._throw_out(frozenset(plan.preempt), running_batch)
        self._awaits_launch = True
        decoding = StepFeatures(decodes, decodes, context)
        tpot_s = float(columns.values[TPOT].min()) if len(columns) else 0.0
        share = self._passes.share(plan, part, decoding, tpot_s, limits.step_tokens)
        if decodes and not share.tokens:
            return True
        if share.tokens:
            self.plan, self.prompt_tokens, self._chunk_tokens = plan, share.tokens, share.chunk_tokens
            prompts = len(plan.waiting) + (part is not None and part.request_id in plan.caps)
            self._owes_decodes = not self.scheduler.is_mixed_chunk and len(plan.caps) > prompts
        return False

    def _look_at_others(self, running: list[Req], in_flight: set[Req]) -> list[Running]:
        """Requests that run and are not known to decode under targets, as the planner sees them; if all of
        them do, they are known from now on."""
        others = self._decoding.others(running)
        found = self.records.decoding(others, in_flight)
        # A beam's tokens do not come one by one.
        decode = len(found) == len(others) and all(request.beam_group is None for request in others)
        if not decode or any(one.targets is None for one in found):
            return found
        self._decoding.join(others, found, running)
        return []

    def _all_decode_on(self, now_s: float, running: list[Req]) -> bool:
        """Whether there is nothing to plan: everybody who runs decodes under targets, and nobody can come in.
        The planner hears of the pass all the same."""
        if len(self.records) != len(self._waiting) + len(running) or not self._decoding.is_all_of(running):
            return False
        scheduler = self.scheduler
        limits = Limits(
            step_tokens=len(running),
            running_requests=scheduler.max_running_requests,
            block_tokens=scheduler.page_size,
        )
        if not self.planner.closed(len(running), limits):
            return False
        names = self._decoding.names
        return self.planner.whole(now_s, names, self._free_kv_tokens(), limits) is not None

    def _limits(self, now_s: float, decodes: int, context_tokens: int) -> Limits:
        """What the pass may hold. Where decodes have a pass of their own after the prompts', that is so much
        less time until they are due."""
        tokens, left_s = self.scheduler.chunked_prefill_size, self._steps.left_s(now_s)
        if decodes and not self.scheduler.is_mixed_chunk:
            left_s += self.planner.model.seconds(StepFeatures(decodes, decodes, context_tokens))
            tokens += decodes
        seats = self.scheduler.max_running_requests
        return Limits(step_tokens=tokens, running_requests=seats, in_flight_s=left_s)

    def _in_flight(self) -> set[Req]:
        """Requests of batches that were launched and have not come back."""
        queue = getattr(self.scheduler, "result_queue", ())
        return {request for batch, _ in queue for request in batch.reqs}

    def _free_kv_tokens(self) -> int:
        allocator = self.scheduler.token_to_kv_pool_allocator
        return int(allocator.available_size() + self.tree_cache.evictable_size())

    def _throw_out(self, names: frozenset[str], batch: ScheduleBatch) -> None:
        """Retract as SGLang does when memory runs out."""
        keep: list[int] = []
        thrown: list[int] = []
        for place, request in enumerate(batch.reqs):
            out = request.rid in names and not request.finished() and request.beam_group is None
            (thrown if out else keep).append(place)
        requests = [batch.reqs[place] for place in thrown]
        for place in thrown:
            batch.release_req(place, len(keep))
        batch.filter_batch(keep_indices=keep)
        batch.batch_is_full = False
        for request in requests:
            self.scheduler._add_request_to_queue(request, is_retracted=True)

    def begin(self, waiting: list[Req]) -> Callable[[], Iterator[Req]] | None:
        return self._picks if self.plan.active else None

    def _picks(self) -> Iterator[Req]:
        # Some are taken from those that wait as the walk goes on.
        for name in self.plan.waiting:
            if (request := self._waiting.get(name)) is not None:
                yield request

    def adding(self, adder: type) -> type:
        """``adder``, within the plan of the pass."""
        return planned(adder, self)

    def admitted(self, request: Req) -> None:
        """A waiting request is in the batch that is being made."""
        name = request.rid
        if self._waiting.get(name) is request:
            del self._waiting[name]
            self._queue.took(request)
            self.planner.backlog.remove(name)

    def chunk_limit(self) -> int | None:
        """Tokens that the request that goes on in chunks may have. None leaves it to SGLang."""
        return self._chunk_tokens if self.plan.active else None

    def launched(self, batch: ScheduleBatch, result: Any, began_s: float) -> None:
        self._awaits_launch = False
        mode = batch.forward_mode
        if not (mode.is_extend() or mode.is_decode()):
            return
        if mode.is_decode():
            self._owes_decodes = False
        if _decodes(batch):
            self._decoding.launched(batch.reqs)
        if self.records.with_targets or not self.planner.counters.plans % PASSIVE_STEPS:
            features = features_of(batch)
            self._steps.begin(result, features, self.planner.model.seconds(features), began_s)
            if self._launch_is_run:
                self._at_end(partial(self._learn, result))

    def came_back(self, batch: ScheduleBatch, result: Any) -> None:
        self._at_end(partial(self._settle, batch, result))
        super().came_back(batch, result)

    def _settle(self, batch: ScheduleBatch, result: Any) -> None:
        """Note what a batch that came back gave to whom."""
        now_s = self.clock()
        self._learn(result)
        requests, decodes = batch.reqs, _decodes(batch)
        everyone = decodes and self._decoding.is_all_of(requests)
        self._decoding.came_back(requests, now_s, prompts_alone=not decodes)
        self.records.produced(requests, now_s, everyone=everyone)
        # What is left of a request that a prefill server computed is another server's.
        prefills = self.scheduler.disaggregation_mode == DisaggregationMode.PREFILL
        # What ``finished`` says, without a call for each.
        ended = [one for one in requests if one.finished_reason or (prefills and one.output_ids)]
        for request in ended:
            self._ended(request)

    def _learn(self, result: Any) -> None:
        """The step that ``result`` came of is over, if it was not before."""
        ended = self._steps.end(result, self.clock())
        if ended is not None:
            flight, seconds = ended
            self.planner.observe_step(flight.features, seconds)
            self.totals.stepped(flight.predicted_s, seconds)

    def idle(self) -> None:
        scheduler = self.scheduler
        if not scheduler.waiting_queue and not scheduler.running_batch.reqs:
            self._meet([])
            self._forget_beside({scheduler.chunked_req, *self._in_flight()})
        super().idle()

    def _meet(self, queue: list[Req]) -> None:
        """Who came to the waiting requests, and who left them without being served."""
        came, left = self._queue.look(queue)
        for request in left:
            self._leave(request)
        for request in came:
            self._waiting[request.rid] = request
            self.planner.arrive(self.records.waiting(request, self._cached_tokens(request)))

    def _cached_tokens(self, request: Req) -> int:
        """What the prefix cache holds of a prompt. Without targets it is not asked: it changes no order."""
        if self.records.of(request).running.targets is None or getattr(self.tree_cache, "disable", True):
            return 0
        match_kv_cache(request, self.tree_cache)
        return int(request.num_matched_prefix_tokens)

    def _leave(self, request: Req) -> None:
        name = request.rid
        self._decoding.left(request)
        if self._waiting.get(name) is request:
            del self._waiting[name]
        if self.records.close(request) is not None:
            self.planner.leave(name)

    def _ended(self, request: Req) -> None:
        self._decoding.left(request)
        record = self.records.close(request)
        if record is None:
            return
        if isinstance(request.finished_reason, FINISH_ABORT):
            self.planner.leave(request.rid)
            return
        self.totals.ended(record, len(request.origin_input_ids) + len(request.output_ids))
        self.planner.observe_finish(request.rid, record.running.class_name, len(request.output_ids))

    def _forget_beside(self, live: set[Req | None]) -> None:
        """Requests that SGLang gave up without a pass: the last ones of a full cache, for example. Those that
        wait are ``live`` beside those given: of thousands only the number is looked at."""
        live.discard(None)
        if len(self.records) > len(live) + len(self._waiting):
            for request in self.records.beside(live | set(self._waiting.values())):
                self._leave(request)

    def retraction_keys(self, requests: list[Req]) -> Sequence[float]:
        """Best effort goes first, the last to come before the others."""
        running = [self.records.of(request).running for request in requests]
        return [one.arrival_s if one.targets is None else -math.inf for one in running]

    def check_integrity(self, live: set[Req]) -> None:
        """Assert that planner, records and SGLang's lists agree between passes."""
        assert set(self._waiting.values()) == set(self._queue.waiting())
        assert all(name in self.planner.backlog for name in self._waiting)
        self.planner.check_integrity()
        self.records.check_integrity(live)
        self._decoding.check_integrity(self._in_flight())


def _for_whole_passes(config: SLOConfig, *, mixed: bool) -> SLOConfig:
    """A pass over the decodes serves all of them, and none is sent again; a mixed pass is one, so that
    nothing is saved by passing some over."""
    resumed_s = math.inf if mixed else 0.0
    return msgspec.structs.replace(config, resumed_token_s=resumed_s, lending=config.lending or "losses")


def _front_clock(clock: Clock) -> Clock | None:
    if isinstance(clock, SharedClock):
        return None
    # On a virtual clock there is one clock for all.
    return time.perf_counter if clock is time.monotonic else clock


def _at_once(call: Callable[[], None]) -> None:
    call()


def _decodes(batch: ScheduleBatch) -> bool:
    """Whether a batch gives all that run their next tokens."""
    return bool(batch.forward_mode.is_decode() or batch.forward_mode.is_mixed())


def features_of(batch: ScheduleBatch) -> StepFeatures:
    """What a batch computes."""
    requests = len(batch.reqs)
    if batch.forward_mode.is_decode():
        return StepFeatures(requests, requests, int(batch.seq_lens_cpu.sum()))
    return StepFeatures(int(batch.extend_num_tokens or 0), requests, sum(batch.prefix_lens or ()))
