"""What a step of vLLM's scheduler means for drafts: who may draft, what else it holds, what came of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.schedulers.acceptance_table import Floats, Ints
from penstock.schedulers.asking import Asking
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.draft_cost import DraftCost
from penstock.schedulers.draft_lengths import DraftLengths
from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

MOST_IN_FLIGHT = 16


@dataclass(slots=True)
class _Pace:
    """A request with a target for each token, since its first one."""

    tpot_s: float
    first_token_s: float
    first_output_tokens: int

    def needed(self, request: Request, now_s: float, step_s: float) -> float:
        """Tokens that are due before the end of the step after this one; one more is sure."""
        made = request.num_output_tokens - self.first_output_tokens
        slack_s = self.first_token_s + (made + 1) * self.tpot_s - now_s
        return 1.0 + max(0.0, 2 * step_s - slack_s) / self.tpot_s


@dataclass(frozen=True, slots=True)
class _InFlight:
    output: SchedulerOutput
    features: StepFeatures
    started_s: float
    drafted: int
    padded: frozenset[str]


class DraftBudget:
    """Cuts drafts to what they are worth. Calls come in the order of a step: ``cut``, ``scheduled``,
    ``executed``, ``verified`` for each draft, ``learn``; several steps may be in flight."""

    def __init__(
        self,
        config: SpeculationConfig,
        most_tokens: int,
        clock: Clock,
        asking_of: Callable[[Request], Asking],
    ) -> None:
        self.lengths = DraftLengths(
            most_tokens,
            spare_worth=config.spare_worth,
            least_gain=config.least_gain,
            probe_share=config.probe_share,
        )
        self.model = StepTimeModel(find_profile(config.profile))
        self.cost = DraftCost(self.model)
        self._prompt_worth = config.prompt_worth
        self._spare_worth = config.spare_worth
        self._clock = clock
        self._asking_of = asking_of
        self._rows: dict[str, int] = {}
        self._paces: dict[str, _Pace] = {}
        self._in_flight: deque[_InFlight] = deque(maxlen=MOST_IN_FLIGHT)
        self._padded: frozenset[str] = frozenset()
        self._verified: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._started_s = self._ended_s = -math.inf
        self._context = self._prompt_tokens = 0
        self.allocated = self.accepted = self.cut_off = 0

    def cut(self, running: Sequence[Request], most_scheduled: int, *, waits: bool) -> None:
        """Shorten the drafts of ``running`` for a step of up to ``most_scheduled`` tokens."""
        self._started_s = now_s = self._clock()
        # Comprehensions, since a batch has hundreds of requests and a step lasts milliseconds.
        decoding = [request for request in running if not request.is_prefill_chunk]
        drafting = [request for request in decoding if request.spec_token_ids]
        self._context = sum([request.num_computed_tokens for request in running])
        if not drafting:
            return
        prompts = self._prompt_tokens if waits else 0
        if len(decoding) < len(running):
            prefilling = [request for request in running if request.is_prefill_chunk]
            prompts += sum([request.num_tokens - request.num_computed_tokens for request in prefilling])
        known = self._rows
        for request in drafting:
            if request.request_id not in known:
                self._open(request)
        rows = np.array([known[request.request_id] for request in drafting])
        available = np.array([len(request.spec_token_ids) for request in drafting])
        room = max(0, min(int(available.sum()), most_scheduled - len(decoding)))
        # Drafts go before prompts: what finds no room any more is computed in a later step.
        drafts = np.arange(room + 1)
        held = np.minimum(len(decoding) + prompts + drafts, most_scheduled)
        seconds = self.cost.seconds(StepFeatures(0, len(running), self._context), held)
        needed = self._needed(drafting, now_s, float(seconds[0]))
        sure = self._spare_worth * len(decoding) + (1 - self._spare_worth) * np.count_nonzero(needed)
        rest = sure + self._prompt_worth * (held - len(decoding) - drafts)
        lengths = self.lengths.lengths(
            rows, available, needed, rest=rest, seconds=seconds, unsure=self.cost.unsure
        )
        self._shorten(drafting, lengths, available)

    def _shorten(self, drafting: list[Request], lengths: Ints, available: Ints) -> None:
        shorter = np.flatnonzero(lengths < available)
        for index, kept in zip(shorter.tolist(), lengths[shorter].tolist(), strict=True):
            request = drafting[index]
            request.spec_token_ids = request.spec_token_ids[:kept]
        self.cut_off += int(available.sum() - lengths.sum())

    def _needed(self, drafting: list[Request], now_s: float, step_s: float) -> Floats:
        needed: Floats = np.zeros(len(drafting))
        if self._paces:
            for index, request in enumerate(drafting):
                pace = self._paces.get(request.request_id)
                if pace is not None:
                    needed[index] = pace.needed(request, now_s, step_s)
        return needed

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
        features = StepFeatures(output.total_num_scheduled_tokens, len(tokens), self._context)
        self._in_flight.append(_InFlight(output, features, self._started_s, drafted, padded))

    def executed(self, output: SchedulerOutput) -> None:
        """The result of a step is there. Its time began when it was scheduled, or, where steps overlap, when
        the one before it ended."""
        now_s = self._clock()
        while self._in_flight:
            step = self._in_flight.popleft()
            if step.output is output:
                self._padded = step.padded
                if step.features.tokens:
                    self.cost.observe(step.features, step.drafted, now_s - max(step.started_s, self._ended_s))
                break
        self._ended_s = now_s

    def verified(self, request_id: str, drafted: int, accepted: int) -> None:
        """The first ``accepted`` of ``drafted`` tokens were right."""
        row = self._rows.get(request_id)
        if row is None or request_id in self._padded or drafted <= 0:
            return
        rows, tried, right = self._verified
        rows.append(row)
        tried.append(drafted)
        right.append(min(accepted, drafted))

    def learn(self) -> None:
        """All drafts of a step were reported."""
        rows, tried, right = self._verified
        if rows:
            self.accepted += sum(right)
            self.lengths.table.observe(np.array(rows), np.array(tried), np.array(right))
            self._verified = ([], [], [])

    def forget(self, request_id: str) -> None:
        """A request is gone."""
        self._rows.pop(request_id, None)
        self._paces.pop(request_id, None)
        self.lengths.table.forget(request_id)

    def _open(self, request: Request) -> None:
        asking = self._asking_of(request)
        self._rows[request.request_id] = self.lengths.table.row(request.request_id, asking.client)
        if asking.tpot_slo_ms is not None:
            now_s = self._clock()
            self._paces[request.request_id] = _Pace(
                asking.tpot_slo_ms / 1e3, now_s, request.num_output_tokens
            )

    def counts(self) -> dict[str, float]:
        """What was drafted since the start, and how well steps are predicted; plain values."""
        return {
            "allocated": self.allocated,
            "accepted": self.accepted,
            "wasted": self.allocated - self.accepted,
            "cut_off": self.cut_off,
            "probes": self.lengths.probes,
            "step_time_error": self.model.error(),
        }

    def check_integrity(self) -> None:
        """Assert that rows agree and that nothing was accepted that was not drafted."""
        self.lengths.table.check_integrity()
        assert len(self._rows) == len(self.lengths.table)
        assert self._paces.keys() <= self._rows.keys()
        assert 0 <= self.accepted <= self.allocated
