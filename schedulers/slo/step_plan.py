"""One step: how long it may take, who decodes, and which prompts get the tokens that are left.

The step ends before the tightest decode is due (Sarathi's and Niyama's slack rule), but leaves prompts a
floor of tokens whatever the model believes. Decodes with slack for two such steps give their place to
prompts, where that saves more than it costs to take them up again. Prompts are served by deadline; one that
would end in the step keeps the step short enough for its own deadline.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

from penstock.schedulers.drafts import Besides
from penstock.schedulers.slo.batch import Sorted
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.suspension import Suspensions

Prompt = tuple[float, str, Running | Waiting]
"""Slack in seconds, id, request."""


class Step:
    """Collects the tokens of one step."""

    def __init__(self, config: SLOConfig, model: StepTimeModel, limits: Limits) -> None:
        self._config = config
        self._model = model
        self._limits = limits
        self.caps: dict[str, int] = {}
        self.tokens = self.context_tokens = self.prompt_tokens = self.draft_tokens = 0
        self.length_s = config.longest_step_s

    @property
    def features(self) -> StepFeatures:
        """The step as it is now."""
        return StepFeatures(self.tokens, len(self.caps), self.context_tokens)

    def give(self, request: Running | Waiting, tokens: int) -> int:
        """Add up to ``tokens`` of a request; returns how many the engine's limit and its need allow."""
        done = request.computed_tokens if isinstance(request, Running) else request.cached_tokens
        before = self.caps.get(request.request_id, 0)
        given = min(tokens, request.missing_tokens - before, self._limits.step_tokens - self.tokens)
        if given <= 0:
            return 0
        if not before:
            self.context_tokens += done
        self.caps[request.request_id] = before + given
        self.tokens += given
        return given

    def room(self, length_s: float) -> int:
        """Tokens that still fit into a step of that length."""
        within = self._model.tokens_within(
            length_s / self._model.margin,
            len(self.caps) + 1,
            self.context_tokens,
            self._limits.step_tokens,
        )
        return max(0, within - self.tokens)

    def besides(self, prompt_tokens: int) -> Besides:
        """The step as drafts see it, with ``prompt_tokens`` that wait for room."""
        return Besides(
            decodes=self.tokens,
            prompt_tokens=prompt_tokens,
            prompts_within=self.tokens + self.room(self.length_s),
            most_tokens=self._limits.step_tokens,
            requests=len(self.caps),
            context_tokens=self.context_tokens,
        )

    def add_drafts(self, tokens: int) -> None:
        """Verify so many draft tokens; the step lasts as long as they take."""
        self.draft_tokens += tokens
        self.tokens += tokens
        self.length_s = max(self.length_s, self._model.seconds(self.features))

    def force(self, running: Iterable[Running], now_s: float, suspensions: Suspensions) -> None:
        """First of all, serve whoever may not be passed over again: one token each, more where there is
        room.
        """
        overdue = suspensions.overdue(now_s)
        if not overdue:
            return
        forced = [request for request in running if request.request_id in overdue]
        for request in forced:
            self.give(request, 1)
        share = (self._limits.step_tokens - self.tokens) // max(1, 2 * len(forced))
        for request in forced:
            if not request.decodes:
                self.give(request, min(share, self._config.skipped_chunk_tokens))

    def decode(self, batch: Sorted, *, prompts: bool) -> None:
        """Bound the step by the tightest decode; serve those due in it, or all where no prompt waits or where
        it does not pay to pass any over."""
        if batch.guarded:
            self.length_s = min(self.length_s, max(0.0, batch.guarded[0][0]))
        far_s = max(2 * self.length_s, self._config.longest_step_s) if prompts else float("inf")
        near_s = self.length_s if prompts else float("inf")
        guarded, far = _cut(batch.guarded, far_s)
        late, early = _cut(batch.late, near_s)
        due, others = guarded + late, far + early
        if others and not self._pays_to_pass_over(others, due):
            due += others
        self._give_one(due)
        shortest = self._model.seconds(self.features)
        self.length_s = max(self.length_s, shortest)

    def _pays_to_pass_over(self, decodes: Sequence[Running], served: Sequence[Running]) -> bool:
        """Whether a step without ``decodes``, with ``served``, is shorter by more than it takes to serve them
        again afterwards."""
        tokens, requests = self.tokens + len(served), len(self.caps) + len(served)
        context, more_context = self.context_tokens + _context(served), _context(decodes)
        without = StepFeatures(tokens, requests, context)
        beside = StepFeatures(tokens + len(decodes), requests + len(decodes), context + more_context)
        saved_s = self._model.seconds(beside) - self._model.seconds(without)
        return saved_s > self._config.resumed_token_s * more_context

    def _give_one(self, decodes: Sequence[Running]) -> None:
        """A token for each that has none, as ``give`` would: batches of decodes are large."""
        caps, most = self.caps, self._limits.step_tokens
        if not caps and len(decodes) <= most:
            self.caps = dict.fromkeys([request.request_id for request in decodes], 1)
            self.tokens = len(self.caps)
            self.context_tokens = _context(decodes)
            return
        for request in decodes:
            if request.request_id not in caps and self.tokens < most:
                caps[request.request_id] = 1
                self.tokens += 1
                self.context_tokens += request.computed_tokens

    def prefill(self, prompts: Iterable[Prompt], most: int, *, floor: bool = True) -> list[str]:
        """Give up to ``most`` tokens to prompts, by deadline; returns the ids of those served."""
        served = []
        for slack, name, request in prompts:
            left = min(most, max(self.room(self.length_s), self._floor() if floor else 0))
            given = self.give(request, left)
            if not given:
                break
            served.append(name)
            most -= given
            self.prompt_tokens += given
            if self.caps[name] >= request.missing_tokens and slack < self.length_s:
                self.length_s = max(slack, self._model.margin * self._model.seconds(self.features))
        return served

    def share(self, part: float) -> int:
        """A part of the prompt tokens that fit, at least 1."""
        return max(1, int(part * max(self.room(self.length_s), self._floor())))

    def _floor(self) -> int:
        """Prompt tokens that are left of those which no model can take away."""
        return max(0, self._config.least_prefill_tokens - self.prompt_tokens)

    def fill_with_decodes(self, decodes: list[tuple[float, str, Running]]) -> None:
        """Serve best-effort decodes, the one that waited longest first, in the time that is left."""
        pending = [request for _, name, request in decodes if name not in self.caps]
        if not pending:
            return
        spent = self._model.seconds(self.features)
        mean_context = sum(request.computed_tokens for request in pending) // len(pending)
        one_more = StepFeatures(self.tokens + 1, len(self.caps) + 1, self.context_tokens + mean_context)
        cost = self._model.seconds(one_more) - spent
        left = self.length_s / self._model.margin - spent
        number = len(pending) if cost <= 0 else int(left / cost)
        for request in pending[: max(0, number)]:
            self.give(request, 1)


def _cut(decodes: list[tuple[float, str, Running]], most_s: float) -> tuple[list[Running], list[Running]]:
    """Decodes, in the order of their times, up to ``most_s`` and beyond it."""
    place = bisect_right(decodes, most_s, key=itemgetter(0))
    requests = [request for _, _, request in decodes]
    return requests[:place], requests[place:]


def _context(decodes: Sequence[Running]) -> int:
    """KV tokens that a token of each attends to."""
    return sum([request.computed_tokens for request in decodes])
