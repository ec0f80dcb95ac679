"""When admission is decided anew, what the problem is then, and what becomes of its answer.

Hysteresis: who was admitted stays so until it is served or its deadline is out of reach. Only when not even
the admitted fit any more are they weighed again, each at a bonus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from penstock.schedulers.slo.admission import Candidate, Instance
from penstock.schedulers.slo.backlog import Backlog
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.lengths import OutputLengths
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.rules import RULES
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel
from penstock.schedulers.slo.supply import PLAIN, ModelledSupply
from penstock.schedulers.slo.targets import Tiers

EXPIRED_AT_ONCE = 8
LATEST_S = 3600.0
"""Deadlines further away than this, or none, count as this far away."""


class ReplanCounters(msgspec.Struct):
    """Totals since the start."""

    replans: int = 0
    past_work_bound: int = 0
    admitted: int = 0
    demoted: int = 0
    reweighed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The running requests with targets, by what they do: decode, or still compute their prompt."""

    decodes: Sequence[Running]
    prefills: Sequence[Running]


class Replanner:
    """Keeps the set of admitted waiting requests."""

    def __init__(
        self, config: SLOConfig, model: StepTimeModel, lengths: OutputLengths, backlog: Backlog
    ) -> None:
        self._config = config
        self._tiers = Tiers(config.tiers_s)
        self._model = model
        self._lengths = lengths
        self._backlog = backlog
        self._arrivals = self._finishes = 0
        self._next_s = float("-inf")
        self._mean_prompt = 512.0
        self.admitted: dict[str, None] = {}
        """Ids, in the order of their deadlines."""
        self.rejected: dict[str, None] = {}
        """Ids that the last decision passed over, in the order of their deadlines."""
        self.yields = PLAIN
        """Of the decodes, as long as speculation goes on as it does."""
        self.counters = ReplanCounters()

    def arrived(self, tokens: int) -> None:
        """A request with targets waits from now on."""
        self._arrivals += 1
        self._mean_prompt += 0.02 * (tokens - self._mean_prompt)

    def finished(self) -> None:
        """A request ended."""
        self._finishes += 1

    def clock_stepped_back(self) -> None:
        """Decide anew in the next step."""
        self._next_s = float("-inf")

    def due(self, now_s: float) -> bool:
        """Whether this step decides anew."""
        config = self._config
        return (
            now_s >= self._next_s
            or self._arrivals >= config.replan_arrivals
            or self._finishes >= config.replan_finishes
            or (self._arrivals > 0 and self._backlog.with_targets <= config.replan_at_once)
        )

    def expire(self, now_s: float) -> None:
        """Demote a few whose deadline has passed, where nothing is decided: the next decision finds fewer."""
        for _ in range(EXPIRED_AT_ONCE):
            if self._backlog.first_due_s >= now_s:
                break
            self._demote(self._backlog.urgent(1)[0][1])

    def replan(self, now_s: float, batch: Batch, free_kv_tokens: int, limits: Limits) -> None:
        """Decide who is admitted, and demote whose deadline is out of reach."""
        self._next_s = now_s + self._config.replan_s
        self._arrivals = self._finishes = 0
        self.counters.replans += 1
        start_s = now_s + limits.in_flight_s
        urgent = [(due_s - start_s, job) for due_s, job in self._backlog.urgent(self._config.replan_window)]
        waiting = [entry for entry in urgent if not self._demote_if_hopeless(*entry)]
        horizon_s = max((slack_s for slack_s, _ in waiting if slack_s < LATEST_S), default=1.0)
        supply, growth = self._supply(batch.decodes, horizon_s, limits)
        memory = free_kv_tokens - growth
        candidates = sorted(
            (*self._running(batch.prefills, start_s), *self._waiting(waiting, mandatory=True)),
            key=lambda candidate: candidate.deadline_s,
        )
        instance = Instance(candidates, memory, supply)
        kept = [c for c in candidates if c.mandatory and c.request_id in self.admitted]
        if kept and min(instance.demands.floors) < -self._config.least_prefill_tokens:
            self.counters.reweighed += 1
            candidates = sorted(
                (*self._running(batch.prefills, start_s), *self._waiting(waiting, mandatory=False)),
                key=lambda candidate: candidate.deadline_s,
            )
            instance = Instance(candidates, memory, supply)
        self._decide(instance)

    def _decide(self, instance: Instance) -> None:
        decision = RULES[self._config.rule](instance, self._config.replan_work)
        self.counters.past_work_bound += not decision.complete
        chosen = (instance.candidates[place].request_id for place in decision.accepted)
        admitted = {name: None for name in chosen if name in self._backlog}
        self.counters.admitted += len(admitted.keys() - self.admitted.keys())
        self.admitted = admitted
        names = (candidate.request_id for candidate in instance.candidates)
        self.rejected = {name: None for name in names if name not in admitted and name in self._backlog}

    def _demote_if_hopeless(self, slack_s: float, job: Waiting) -> bool:
        """Whether even an engine that did nothing else would come too late."""
        model = self._model
        alone = model.seconds(StepFeatures(job.missing_tokens, 1, job.tokens)) if model.corrected else 0.0
        hopeless = alone > slack_s
        if hopeless:
            self._demote(job)
        return hopeless

    def _demote(self, job: Waiting) -> None:
        self._backlog.demote(job.request_id)
        self.admitted.pop(job.request_id, None)
        self.counters.demoted += 1

    def _supply(
        self, decodes: Sequence[Running], horizon_s: float, limits: Limits
    ) -> tuple[ModelledSupply, float]:
        """What the running decodes leave, and the KV tokens by which they grow within the horizon.

        One that ends within the horizon counts by its share of it.
        """
        loads = [0.0] * len(self._tiers)
        context, growth = 0, 0.0
        for request in decodes:
            assert request.targets is not None
            tier = self._tiers.index(request.targets.tpot_s)
            left = self._lengths.remaining(
                request.class_name, 0.5, request.output_tokens, request.max_output_tokens
            )
            share = min(1.0, left * self._tiers.tpots_s[tier] / horizon_s)
            loads[tier] += share
            growth += share * horizon_s / self._tiers.tpots_s[tier]
            context += request.tokens
        supply = ModelledSupply(
            self._model,
            self._tiers,
            loads,
            context_tokens=context / len(decodes) if decodes else self._mean_prompt,
            longest_step_s=self._config.longest_step_s,
            most_tokens=limits.step_tokens,
            yields=self.yields,
        )
        return supply, growth

    def _running(self, prefills: Sequence[Running], start_s: float) -> Iterable[Candidate]:
        for request in prefills:
            assert request.targets is not None
            due_s = request.targets.due_s(request.arrival_s, request.output_tokens, request.first_token_s)
            tier = self._tiers.index(request.targets.tpot_s)
            missing = request.missing_tokens
            deadline_s = self._within(due_s - start_s)
            yield Candidate(request.request_id, deadline_s, missing, missing, tier, 1.0, True)

    def _waiting(self, waiting: Iterable[tuple[float, Waiting]], *, mandatory: bool) -> Iterable[Candidate]:
        """Candidates of those that wait, by slack; the admitted are mandatory, or worth more."""
        config, remaining = self._config, self._lengths.remaining
        exponent, quantile = config.long_prompt_weight, config.output_quantile
        for slack_s, job in waiting:
            assert job.targets is not None
            kept, missing = job.request_id in self.admitted, job.missing_tokens
            output = remaining(job.class_name, quantile, job.output_tokens, job.max_output_tokens)
            profit = (missing / self._mean_prompt) ** exponent
            yield Candidate(
                job.request_id,
                self._within(slack_s),
                missing,
                int(job.tokens + output),
                self._tiers.index(job.targets.tpot_s),
                profit * (1.0 + config.kept_bonus if kept else 1.0),
                kept and mandatory,
            )

    def _within(self, deadline_s: float) -> float:
        """A deadline from now: not in the past, and bounded where there is none."""
        return min(LATEST_S, max(0.0, deadline_s))
