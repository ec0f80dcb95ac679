"""What a step of vLLM's scheduler means for drafts: who may draft, what else it holds, what came of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.schedulers.acceptance_table import Floats
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
        drafting, rows, available = [], [], []
        context = prompts = decodes = 0
        known = self._rows
        for request in running:
            context += request.num_computed_tokens
            if request.is_prefill_chunk:
                prompts += request.num_tokens - request.num_computed_tokens
                continue
            decodes += 1
            tokens = len(request.spec_token_ids)
            if tokens:
                row = known.get(request.request_id)
                rows.append(self._open(request) if row is None else row)
                drafting.append(request)
                available.append(tokens)
        self._context = context
        if waits:
            prompts += self._prompt_tokens
        if not drafting:
            return
        # Drafts go before prompts: what finds no room any more is computed in a later step.
        drafts = np.arange(max(0, min(sum(available), most_scheduled - decodes)) + 1)
        tokens_held = np.minimum(decodes + prompts + drafts, most_scheduled)
        seconds = self.cost.seconds(StepFeatures(0, len(running), context), tokens_held)
        needed = self._needed(drafting, now_s, float(seconds[0]))
        sure = self._spare_worth * decodes + (1 - self._spare_worth) * np.count_nonzero(needed)
        rest = sure + self._prompt_worth * (tokens_held - decodes - drafts)
        lengths = self.lengths.lengths(
            np.array(rows), np.array(available), needed, rest=rest, seconds=seconds, unsure=self.cost.unsure
        )
        for request, kept, tokens in zip(drafting, lengths.tolist(), available, strict=True):
            if kept < tokens:
                self.cut_off += tokens - kept
                request.spec_token_ids = request.spec_token_ids[:kept]

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

    def _open(self, request: Request) -> int:
        asking = self._asking_of(request)
        row = self._rows[request.request_id] = self.lengths.table.row(request.request_id, asking.client)
        if asking.tpot_slo_ms is not None:
            now_s = self._clock()
            self._paces[request.request_id] = _Pace(
                asking.tpot_slo_ms / 1e3, now_s, request.num_output_tokens
            )
        return row

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
