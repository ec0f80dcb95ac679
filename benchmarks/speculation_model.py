"""A decode loop on a virtual clock: requests come, draft lengths are chosen, drafts are verified by chance.

The lengths of ours are chosen by the very object that vLLM's scheduler asks; the rest is a model: a step
takes what a profile says, with noise, its drafter's passes with it, and a draft token is right with the
probability of its request's class. Whether it is depends on request and place alone, so that every way to
choose lengths meets the same luck.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from penstock.plugins.vllm.draft_budget import DraftBudget
from penstock.schedulers.acceptance_table import AcceptanceTable, Floats, Ints
from penstock.schedulers.asking import Asking
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.profiles import Profile, find_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.simulation.vllm_engine import luck

DRAFT_TOKENS = 5
NOISE = 0.02
STEP_TOKENS = 2048
SEATS = 256
DRAFT = (7,) * DRAFT_TOKENS


@dataclass(slots=True)
class Asked:
    """One request of a trace. ``rate`` is the chance that a draft token is right if those before it are."""

    request_id: str
    arrival_s: float
    prompt: int
    output: int
    client: str
    rate: float
    tpot_s: float | None = None


@dataclass(slots=True, eq=False)
class Live:
    """A running request, with the names that vLLM's have."""

    asked: Asked
    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    is_prefill_chunk: bool = True
    spec_token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None

    @classmethod
    def of(cls, asked: Asked) -> Live:
        return cls(asked, asked.request_id, asked.prompt)

    def right(self, drafted: int) -> int:
        """Of the next ``drafted`` tokens, those before the first that a draft has wrong."""
        places = range(self.num_output_tokens, self.num_output_tokens + drafted)
        wrong = (place for place in places if luck(self.request_id, place) >= self.asked.rate)
        return next(wrong, places.stop) - places.start


Limit = Callable[[list[Live]], None]
"""Shortens the drafts of the running requests."""


class BySchedule:
    """vLLM's schedule: one length for all in the step after this one, by the number of requests in this."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = ranges
        """Largest batch and its draft tokens, ascending."""

    def cut(self, running: list[Live]) -> None:
        """Nothing: drafts are as long as they should be."""

    def depth(self, scheduled: int) -> int:
        """Draft tokens that are made at the end of a step of so many requests."""
        return next((tokens for most, tokens in self._ranges if scheduled <= most), 0)


class ByWorth:
    """Ours, with a step-time profile that is not the engine's to start from."""

    def __init__(self, clock: Callable[[], float], prior: str, *, in_passes: bool = False) -> None:
        model = StepTimeModel(find_profile(prior))
        drafts = Drafts(SpeculationConfig(profile=prior), DRAFT_TOKENS, model, in_passes=in_passes)
        self.budget = DraftBudget(drafts, clock, _asking_of)
        self.waits = False

    def cut(self, running: list[Live]) -> None:
        self.budget.cut(running, STEP_TOKENS, waits=self.waits)

    def depth(self, _: int) -> int:
        """Draft tokens that are made at the end of a step."""
        return self.budget.drafts.depth


class Knowing(ByWorth):
    """Ours with the true acceptance in place of the estimated and the true profile to start from:
    the rate of each request, or, ``tokens``, even which draft tokens are right."""

    def __init__(
        self, clock: Callable[[], float], profile: str, *, tokens: bool, in_passes: bool = False
    ) -> None:
        super().__init__(clock, profile, in_passes=in_passes)
        self._table = KnownAcceptance(DRAFT_TOKENS, tokens=tokens)
        self.budget.drafts.lengths.table = self._table

    def cut(self, running: list[Live]) -> None:
        self._table.live = {live.request_id: live for live in running}
        super().cut(running)


class KnownAcceptance(AcceptanceTable):
    """What an estimate cannot be better than."""

    def __init__(self, most_tokens: int, *, tokens: bool) -> None:
        super().__init__(most_tokens)
        self._tokens = tokens
        self._of_row: dict[int, str] = {}
        self.live: dict[str, Live] = {}

    def row(self, request_id: str, class_name: str) -> int:
        row = super().row(request_id, class_name)
        self._of_row[row] = request_id
        return row

    def survival(self, rows: Ints) -> Floats:
        places = np.arange(1, self.most_tokens + 1)
        live = [self.live[self._of_row[row]] for row in rows.tolist()]
        if self._tokens:
            return np.array([places <= one.right(self.most_tokens) for one in live], dtype=float)
        found: Floats = np.array([one.asked.rate for one in live])[:, None] ** places
        return found


def _asking_of(request: Any) -> Asking:
    tpot_s = request.asked.tpot_s
    return Asking(request.asked.client, tpot_slo_ms=None if tpot_s is None else 1e3 * tpot_s)


@dataclass(slots=True)
class Outcome:
    """What became of a trace."""

    ended_s: float = 0.0
    steps: int = 0
    output_tokens: int = 0
    attained: int = 0
    requests: int = 0
    drafted: int = 0
    accepted: int = 0


class Loop:
    """One engine. ``make`` makes what cuts drafts from the loop's clock; None drafts nothing."""

    def __init__(self, truth: Profile, make: Callable[[Callable[[], float]], Any] | None, seed: int) -> None:
        self._time = StepTimeModel(truth)
        self._rng = random.Random(seed)
        self.now_s = 0.0
        self._cutter = None if make is None else make(lambda: self.now_s)
        self._depth = 0
        self.running: list[Live] = []
        self.outcome = Outcome()

    def run(self, trace: Sequence[Asked], most_steps: int = 10**9) -> Outcome:
        """All of a trace, or so many steps of it."""
        coming = deque(trace)
        while (coming or self.running) and self.outcome.steps < most_steps:
            if not self.running and coming[0].arrival_s > self.now_s:
                self.now_s = coming[0].arrival_s
            while coming and coming[0].arrival_s <= self.now_s and len(self.running) < SEATS:
                self.running.append(Live.of(coming.popleft()))
            self._step()
        self.outcome.ended_s = self.now_s
        return self.outcome

    def _step(self) -> None:
        for live in self.running:
            if not live.is_prefill_chunk:
                left = live.asked.output - live.num_output_tokens - 1
                live.spec_token_ids = list(DRAFT[: min(self._depth, max(0, left))])
        if self._cutter is not None:
            self._cutter.cut(self.running)
        tokens = self._fill()
        total = sum(tokens.values())
        output = self._output(tokens, total) if isinstance(self._cutter, ByWorth) else None
        context = sum(live.num_computed_tokens for live in self.running)
        passes = 0
        if self._cutter is not None:
            # The first pass keeps a drafter's own KV cache up to date, so that it is always made.
            self._depth = self._cutter.depth(len(tokens))
            passes = max(1, self._depth)
        seconds = self._time.seconds(StepFeatures(total, len(tokens), context, passes))
        self.now_s += seconds * max(0.5, self._rng.gauss(1.0, NOISE))
        self.outcome.steps += 1
        self._finish(tokens, output)

    def _fill(self) -> dict[str, int]:
        """Decodes with their drafts first, then prompts in order of arrival."""
        tokens = {}
        room = STEP_TOKENS
        for live in self.running:
            if not live.is_prefill_chunk:
                tokens[live.request_id] = 1 + len(live.spec_token_ids)
                room -= tokens[live.request_id]
        for live in self.running:
            if live.is_prefill_chunk and room > 0:
                tokens[live.request_id] = min(room, live.num_tokens - live.num_computed_tokens)
                room -= tokens[live.request_id]
        return tokens

    def _output(self, tokens: dict[str, int], total: int) -> Any:
        drafts = {live.request_id: live.spec_token_ids for live in self.running if live.spec_token_ids}
        output = SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens=drafts,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
            num_invalid_spec_tokens=None,
            num_spec_tokens_to_schedule=self._cutter.depth(len(tokens)),  # type: ignore[union-attr]
        )
        self._cutter.budget.scheduled(output)  # type: ignore[union-attr]
        return output

    def _finish(self, tokens: dict[str, int], output: Any) -> None:
        budget = None if output is None else self._cutter.budget  # type: ignore[union-attr]
        served = [live for live in self.running if live.request_id in tokens]
        made = [self._progress(live, tokens[live.request_id]) for live in served]
        if budget is not None:
            places = {live.request_id: place for place, live in enumerate(served)}
            sampled = [[0] * number for number in made]
            budget.executed(output, SimpleNamespace(sampled_token_ids=sampled, req_id_to_index=places))
        ended = [live for live in self.running if live.num_output_tokens >= live.asked.output]
        for live in ended:
            self.running.remove(live)
            self._count(live)
            if budget is not None:
                budget.forget(live.request_id)

    def _progress(self, live: Live, tokens: int) -> int:
        """Returns the tokens that the request was given."""
        if live.is_prefill_chunk:
            live.num_computed_tokens += tokens
            if live.num_computed_tokens < live.num_tokens:
                return 0
            live.is_prefill_chunk = False
            made = 1
        else:
            drafted = len(live.spec_token_ids)
            accepted = live.right(drafted)
            self.outcome.drafted += drafted
            self.outcome.accepted += accepted
            made = accepted + 1
            live.num_computed_tokens += made
        live.spec_token_ids = []
        live.num_tokens += made
        live.num_output_tokens += made
        if live.first_token_s is None:
            live.first_token_s = self.now_s
        return made

    def _count(self, live: Live) -> None:
        self.outcome.requests += 1
        self.outcome.output_tokens += live.num_output_tokens
        asked = live.asked
        assert live.first_token_s is not None
        spent_s = self.now_s - live.first_token_s
        if asked.tpot_s is None or spent_s <= asked.tpot_s * (asked.output - 1):
            self.outcome.attained += 1
