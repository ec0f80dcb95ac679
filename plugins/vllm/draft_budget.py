"""What a step of vLLM's scheduler means for drafts: who may draft, what else it holds, what came of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from penstock.schedulers.acceptance_table import NOBODY, Floats, Ints
from penstock.schedulers.asking import Asking
from penstock.schedulers.drafts import Besides, Drafts
from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.step_time import StepFeatures
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

MOST_IN_FLIGHT = 16
FIRST_STEPS, EVERY = 64, 8
"""The model sees all of the first steps, then one in so many: its fits take milliseconds, and slope and level
of what drafts cost follow at once without it."""


@dataclass(frozen=True, slots=True)
class _Paced:
    """A request that drafts: its row, and when its tokens are due, ``start_s + number * tpot_s``."""

    row: int
    tpot_s: float
    start_s: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests that draft in a step, and what stays of them while they are the same."""

    requests: list[Request] = field(default_factory=list)
    rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tpot_s: Floats = field(default_factory=lambda: np.zeros(0))
    start_s: Floats = field(default_factory=lambda: np.zeros(0))
    paced: bool = False


@dataclass(frozen=True, slots=True)
class _InFlight:
    output: SchedulerOutput
    features: StepFeatures
    started_s: float
    drafted: int
    padded: frozenset[str]


class DraftBudget:
    """Cuts drafts to what they are worth, and learns. Calls come in the order of a step: ``cut``, or ``keep``
    where a plan chose the lengths; ``limit_passes``; ``scheduled``; ``executed``. Several may overlap."""

    def __init__(
        self,
        drafts: Drafts,
        clock: Clock,
        asking_of: Callable[[Request], Asking],
        *,
        tell_model: bool = True,
        passes_end_later: bool = False,
    ) -> None:
        """``tell_model`` False leaves it to somebody else to tell the step-time model of steps.
        ``passes_end_later`` says that a step's result does not wait for the passes made at its end, so that
        the time of the next one has them."""
        self.drafts = drafts
        self._tell_model = tell_model
        self._passes_end_later = passes_end_later
        self._passes = 0
        self._clock = clock
        self._asking_of = asking_of
        self._known: dict[str, _Paced] = {}
        self._batch = _Batch()
        self._in_flight: deque[_InFlight] = deque(maxlen=MOST_IN_FLIGHT)
        self._started_s = self._ended_s = -math.inf
        self._context = self._prompt_tokens = self._steps = 0
        self.allocated = self.accepted = self.cut_off = 0

    def cut(self, running: Sequence[Request], most_scheduled: int, *, waits: bool) -> None:
        """Shorten the drafts of ``running`` for a step of up to ``most_scheduled`` tokens."""
        self._started_s = now_s = self._clock()
        # Comprehensions, since a batch has hundreds of requests and a step lasts milliseconds.
        prefilling = [request for request in running if request.is_prefill_chunk]
        # Passes are made for all who decode, whoever has a draft now.
        passes = self.drafts.in_passes
        drafting = [request for request in running if passes or request.spec_token_ids]
        self._context = sum([request.num_computed_tokens for request in running])
        if prefilling:
            drafting = [request for request in drafting if not request.is_prefill_chunk]
        if not drafting:
            return
        prompts = self._prompt_tokens if waits else 0
        prompts += sum([request.num_tokens - request.num_computed_tokens for request in prefilling])
        # Lists of the same objects compare at the cost of a look at each.
        if drafting != self._batch.requests:
            self._batch = self._gather(drafting)
        batch = self._batch
        slack_s = batch.tpot_s
        if batch.paced:
            made = np.array([request.num_output_tokens for request in drafting])
            with np.errstate(invalid="ignore"):
                slack_s = batch.start_s + batch.tpot_s * made - now_s
        available = np.array([len(request.spec_token_ids) for request in drafting])
        besides = Besides(
            decodes=len(running) - len(prefilling),
            prompt_tokens=prompts,
            prompts_within=most_scheduled,
            most_tokens=most_scheduled,
            requests=len(running),
            context_tokens=self._context,
        )
        lengths = self.drafts.choose(batch.rows, available, slack_s, batch.tpot_s, besides)
        self._shorten(drafting, lengths, available)

    def keep(self, running: Sequence[Request], plan: Plan) -> None:
        """Shorten drafts to those of an active plan. Who is passed over keeps a draft that is there; a place
        for one to come is given up, since workers keep no draft for a request that leaves their batch."""
        self._started_s = self._clock()
        self._context = sum([request.num_computed_tokens for request in running])
        served = plan.caps
        drafting = [
            request
            for request in running
            if (drafted := request.spec_token_ids)
            and not request.is_prefill_chunk
            and (drafted[0] < 0 or request.request_id in served)
        ]
        available = np.array([len(request.spec_token_ids) for request in drafting], dtype=np.int64)
        kept = np.array([plan.drafts.get(request.request_id, 0) for request in drafting], dtype=np.int64)
        self._shorten(drafting, np.minimum(kept, available), available)

    def _shorten(self, drafting: list[Request], lengths: Ints, available: Ints) -> None:
        shorter = np.flatnonzero(lengths < available)
        for index, kept in zip(shorter.tolist(), lengths[shorter].tolist(), strict=True):
            request = drafting[index]
            request.spec_token_ids = request.spec_token_ids[:kept]
        self.cut_off += int(available.sum() - lengths.sum())

    def _gather(self, drafting: list[Request]) -> _Batch:
        known = [self._known.get(one.request_id) or self._open(one) for one in drafting]
        tpot_s = np.array([one.tpot_s for one in known])
        return _Batch(
            drafting,
            np.array([one.row for one in known]),
            tpot_s,
            np.array([one.start_s for one in known]),
            bool(np.isfinite(tpot_s).any()),
        )

    def _open(self, request: Request) -> _Paced:
        asking = self._asking_of(request)
        tpot_s = math.inf if asking.tpot_slo_ms is None else asking.tpot_slo_ms / 1e3
        # The pace counts from the first token, or from when the request was first seen to draft.
        start_s = self._clock() + (1 - request.num_output_tokens) * tpot_s if tpot_s < math.inf else 0.0
        paced = _Paced(self.drafts.row(request.request_id, asking.client), tpot_s, start_s)
        self._known[request.request_id] = paced
        return paced

    def limit_passes(self, output: SchedulerOutput) -> None:
        """Have the drafter make no more passes at the end of the step than pay."""
        if self.drafts.in_passes:
            depth = min(self.drafts.depth, output.num_spec_tokens_to_schedule)
            output.num_spec_tokens_to_schedule = depth

    def scheduled(self, output: SchedulerOutput) -> None:
        """A step was made."""
        drafts = output.scheduled_spec_decode_tokens
        # vLLM pads a request that it admits with one token left; nobody drafted that.
        tokens = output.num_scheduled_tokens
        admitted = {new.req_id for new in output.scheduled_new_reqs}
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        padded = frozenset(admitted & drafts.keys())
        drafted = sum(map(len, drafts.values()))
        self.allocated += drafted - sum(len(drafts[name]) for name in padded)
        self._prompt_tokens = sum(tokens[name] for name in admitted)
        passes = max(1, output.num_spec_tokens_to_schedule) if self.drafts.in_passes else 0
        self._passes, before = passes, self._passes
        timed = before if self._passes_end_later else passes
        features = StepFeatures(output.total_num_scheduled_tokens, len(tokens), self._context, timed)
        self._in_flight.append(_InFlight(output, features, self._started_s, drafted, padded))

    def executed(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """The result of a step is there. Its time began when it was scheduled, or, where steps overlap, when
        the one before it ended."""
        now_s = self._clock()
        while self._in_flight:
            step = self._in_flight.popleft()
            if step.output is output:
                if step.features.tokens:
                    self._timed(step, now_s - max(step.started_s, self._ended_s))
                self._learn(output, result, step.padded)
                break
        self._ended_s = now_s

    def _timed(self, step: _InFlight, seconds: float) -> None:
        self._steps += 1
        if self._tell_model and (self._steps <= FIRST_STEPS or self._steps % EVERY == 0):
            self.drafts.model.observe(step.features, seconds)
        self.drafts.cost.observe(step.features, step.drafted, seconds)

    def _learn(self, output: SchedulerOutput, result: ModelRunnerOutput, padded: frozenset[str]) -> None:
        """The tokens that a step sampled for a request are its accepted drafts and one more."""
        drafts, sampled = output.scheduled_spec_decode_tokens, result.sampled_token_ids
        if not drafts or not sampled:
            return
        names, places = list(drafts), result.req_id_to_index
        rows = self.drafts.find(names)
        drafted = np.array(list(map(len, drafts.values())))
        right = np.array([len(sampled[places[name]]) - 1 for name in names])
        if padded or output.num_invalid_spec_tokens:
            # Nobody drafted what vLLM filled up, and a grammar refused the rest.
            invalid = output.num_invalid_spec_tokens or {}
            drafted -= np.array([invalid.get(name, 0) for name in names])
            rows[[name in padded for name in names]] = NOBODY
        told = (rows != NOBODY) & (drafted > 0) & (right >= 0)
        rows, drafted = rows[told], drafted[told]
        right = np.minimum(right[told], drafted)
        self.accepted += int(right.sum())
        self.drafts.learn(rows, drafted, right)

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        self._known.pop(request_id, None)
        self.drafts.forget(request_id)
        self._batch = _Batch()

    def counts(self) -> dict[str, float]:
        """What was drafted since the start, and how well steps are predicted; plain values."""
        return {
            "allocated": self.allocated,
            "accepted": self.accepted,
            "wasted": self.allocated - self.accepted,
            "cut_off": self.cut_off,
            "probes": self.drafts.lengths.probes,
            "step_time_error": self.drafts.model.error(),
        }

    def check_integrity(self) -> None:
        """Assert that rows agree and that nothing was accepted that was not drafted."""
        table = self.drafts.lengths.table
        table.check_integrity()
        assert table.find(list(self._known)).tolist() == [one.row for one in self._known.values()]
        assert 0 <= self.accepted <= self.allocated
