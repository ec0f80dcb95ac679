"""One step: how long it may take, who decodes, and which prompts get the tokens that are left.

The step ends before the tightest decode is due (Sarathi's and Niyama's slack rule), but leaves prompts a
floor of tokens whatever the model believes. Decodes with slack for two such steps give their place to
prompts, where that saves more than it costs to take them up again. Prompts are served by deadline; one that
would end in the step keeps the step short enough for its own deadline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from penstock.schedulers.drafts import Besides
from penstock.schedulers.slo.batch import Entry, Paced
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import COMPUTED, Mask
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

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
        self.serves_all = False
        """Whether all decodes under targets have a token, as far as the step holds so many."""
        self._tightest_s = math.inf
        self._lendable_s = self._lent_s = 0.0

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

    def force(self, overdue: Sequence[Running]) -> None:
        """First of all, serve whoever may not be passed over again: one token each, more where there is
        room.
        """
        for request in overdue:
            self.give(request, 1)
        share = (self._limits.step_tokens - self.tokens) // max(1, 2 * len(overdue))
        for request in overdue:
            if not request.decodes:
                self.give(request, min(share, self._config.skipped_chunk_tokens))

    def decode(self, paced: Paced, *, prompts: bool) -> None:
        """Bound the step by the tightest decode; serve those due in it, or all where no prompt waits or where
        it does not pay to pass any over."""
        guarded, time_s = paced.guarded, paced.time_s
        all_guarded = guarded.all()
        if guarded.any():
            self._tightest_s = float((time_s if all_guarded else time_s[guarded]).min())
            self._lendable_s = paced.lent_s
            self.length_s = self._longest_s()
        far_s = max(2 * self.length_s, self._config.longest_step_s)
        due = time_s <= (far_s if all_guarded else np.where(guarded, far_s, self.length_s))
        number = int(np.count_nonzero(due)) if prompts else len(due)
        self.serves_all = number == len(due)
        if self.serves_all:
            self._give_to_all(paced)
        elif self._pays_to_pass_over(paced, due, number):
            self._give_in_turn(paced, paced.by_turn(due))
        else:
            self._give_to_all(paced, first=due)
        self._take_as_long_as_needed()

    def begins_later(self, seconds: float) -> None:
        """So much later than its decodes were told, or earlier if below 0; nothing but decodes is in it."""
        self._tightest_s -= seconds
        self.length_s = self._longest_s()
        self._take_as_long_as_needed()

    def lend(self, prompts: Sequence[Prompt]) -> None:
        """Let the step take the time that its decodes lend, if at their pace some of ``prompts``, by
        deadline, would be late."""
        if self._lendable_s <= self.length_s:
            return
        rate = self.room(self.length_s) / self.length_s if self.length_s > 0 else 0.0
        missing = 0
        for slack, _, request in prompts:
            missing += request.missing_tokens
            if missing > rate * slack:
                self._lent_s = self._lendable_s
                self.length_s = self._longest_s()
                return

    def lend_no_more(self) -> None:
        """What the step holds from now on gets no time that its decodes do not have."""
        if self._lent_s:
            self._lent_s = 0.0
            self.length_s = min(self.length_s, self._longest_s())

    def _longest_s(self) -> float:
        return min(self._config.longest_step_s, max(self._lent_s, self._tightest_s))

    def take_back(self, name: str, computed_tokens: int) -> None:
        """One that was given tokens, and has computed so many before, ended."""
        self.tokens -= self.caps.pop(name)
        self.context_tokens -= computed_tokens

    def _take_as_long_as_needed(self) -> None:
        self.length_s = max(self.length_s, self._model.seconds(self.features))

    def _pays_to_pass_over(self, paced: Paced, due: Mask, number: int) -> bool:
        """Whether a step with only the ``number`` decodes that are ``due`` is shorter by more than it costs
        to serve the others again afterwards."""
        computed = paced.columns.values[COMPUTED]
        tokens, requests, others = self.tokens + number, len(self.caps) + number, len(due) - number
        served_context = int(computed[due].sum())
        context, more_context = self.context_tokens + served_context, int(computed.sum()) - served_context
        without = StepFeatures(tokens, requests, context)
        beside = StepFeatures(tokens + others, requests + others, context + more_context)
        saved_s = self._model.seconds(beside) - self._model.seconds(without)
        return saved_s > self._config.resumed_token_s * more_context

    def _give_to_all(self, paced: Paced, first: Mask | None = None) -> None:
        """A token for every decode; where the step does not hold so many, for those that come ``first``
        before the others."""
        names = paced.columns.names
        if not self.caps and len(names) <= self._limits.step_tokens:
            self.caps = dict.fromkeys(names, 1)
            self.tokens = len(names)
            self.context_tokens = int(paced.columns.values[COMPUTED].sum())
            return
        first = np.ones(len(names), np.bool_) if first is None else first
        self._give_in_turn(paced, [*paced.by_turn(first), *paced.by_turn(~first)])

    def _give_in_turn(self, paced: Paced, places: Sequence[int]) -> None:
        """A token for each that has none, as ``give`` would: batches of decodes are large."""
        names, computed = paced.columns.names, paced.columns.values[COMPUTED].tolist()
        caps, most = self.caps, self._limits.step_tokens
        for place in places:
            name = names[place]
            if name not in caps and self.tokens < most:
                caps[name] = 1
                self.tokens += 1
                self.context_tokens += int(computed[place])

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

    def fill_with_decodes(self, decodes: list[Entry]) -> None:
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
