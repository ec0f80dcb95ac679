"""When admission is decided anew, what the problem is then, and what becomes of its answer.

Hysteresis: who was admitted stays so until it is served or its deadline is out of reach. Only when not even
the admitted fit any more are they weighed again, each at a bonus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from penstock.schedulers.slo.admission import Candidates, Instance, Numbers
from penstock.schedulers.slo.backlog import Backlog
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import MOST, OUTPUT, TOKENS, TPOT, Column, Columns
from penstock.schedulers.slo.lengths import OutputLengths
from penstock.schedulers.slo.requests import Limits, Running, Waiting
from penstock.schedulers.slo.rules import RULES
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.schedulers.slo.supply import PLAIN, ModelledSupply
from penstock.schedulers.slo.targets import Targets, Tiers

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


class Replanner:
    """Keeps the set of admitted waiting requests."""

    def __init__(
        self, config: SLOConfig, model: StepTimeModel, lengths: OutputLengths, backlog: Backlog
    ) -> None:
        self._config = config
        self._tiers = Tiers(config.tiers_s)
        self._tpots_s = np.array(config.tiers_s)
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
            or self.due_at_once
        )

    @property
    def due_at_once(self) -> bool:
        """Whether somebody arrived where few wait: the step that comes next decides."""
        return self._arrivals > 0 and self._backlog.with_targets <= self._config.replan_at_once

    def expire(self, now_s: float) -> None:
        """Demote a few whose deadline has passed, where nothing is decided: the next decision finds fewer."""
        for _ in range(EXPIRED_AT_ONCE):
            if self._backlog.first_due_s >= now_s:
                break
            self._demote(self._backlog.urgent(1)[0][1])

    def replan(
        self, now_s: float, decodes: Columns, prefills: Sequence[Running], free_kv_tokens: int, limits: Limits
    ) -> None:
        """Decide who is admitted beside ``decodes`` and ``prefills``, which run and have targets, and demote
        whose deadline is out of reach."""
        self._next_s = now_s + self._config.replan_s
        self._arrivals = self._finishes = 0
        self.counters.replans += 1
        start_s = now_s + limits.in_flight_s
        jobs, slack_s = self._in_reach(start_s)
        near_s = slack_s[slack_s < LATEST_S]
        horizon_s = float(near_s.max()) if len(near_s) else 1.0
        supply, growth = self._supply(decodes, horizon_s, limits)
        memory = free_kv_tokens - growth
        candidates = self._candidates(prefills, start_s, jobs, slack_s)
        instance = Instance(candidates.by_deadline(), memory, supply)
        runs = np.arange(len(candidates)) < len(prefills)
        kept = (candidates.mandatory & ~runs).any()
        if kept and instance.demands.least.min() < -self._config.least_prefill_tokens:
            self.counters.reweighed += 1
            instance = Instance(replace(candidates, mandatory=runs).by_deadline(), memory, supply)
        self._decide(instance)

    def _in_reach(self, start_s: float) -> tuple[list[Waiting], Column]:
        """Who waits for a decision, and their slack; who would come too late is demoted, even if the engine
        did nothing else."""
        urgent = self._backlog.urgent(self._config.replan_window)
        jobs = [job for _, job in urgent]
        slack_s = np.array([due_s for due_s, _ in urgent]) - start_s
        alone_s: Column = np.zeros(len(jobs))
        if self._model.corrected:
            tokens = np.array([job.tokens for job in jobs], np.int64)
            alone_s = self._model.seconds_of_each(_missing(jobs), tokens)
        late = alone_s > slack_s
        if late.any():
            for place in np.flatnonzero(late).tolist():
                self._demote(jobs[place])
            jobs = [jobs[place] for place in np.flatnonzero(~late).tolist()]
            slack_s = slack_s[~late]
        return jobs, slack_s

    def _decide(self, instance: Instance) -> None:
        decision = RULES[self._config.rule](instance, self._config.replan_work)
        self.counters.past_work_bound += not decision.complete
        names, waiting = instance.columns.request_ids, self._backlog.names
        chosen = [names[place] for place in decision.accepted]
        admitted = dict.fromkeys([name for name in chosen if name in waiting])
        self.counters.admitted += len(admitted.keys() - self.admitted.keys())
        self.admitted = admitted
        others = () if len(chosen) == len(names) else names
        self.rejected = {name: None for name in others if name not in admitted and name in waiting}

    def _demote(self, job: Waiting) -> None:
        self._backlog.demote(job.request_id)
        self.admitted.pop(job.request_id, None)
        self.counters.demoted += 1

    def _supply(self, decodes: Columns, horizon_s: float, limits: Limits) -> tuple[ModelledSupply, float]:
        """What the running decodes leave, and the KV tokens by which they grow within the horizon.

        One that ends within the horizon counts by its share of it.
        """
        tiers = self._tier_of_each(decodes.values[TPOT])
        tpot_s = self._tpots_s[tiers]
        names = [request.class_name for request in decodes.requests]
        output, most = decodes.values[OUTPUT], decodes.values[MOST]
        left = self._lengths.remaining_of_each(names, 0.5, output, most)
        shares = np.minimum(1.0, left * tpot_s / horizon_s)
        loads = np.bincount(tiers, weights=shares, minlength=len(self._tiers))
        supply = ModelledSupply(
            self._model,
            self._tiers,
            loads.tolist(),
            context_tokens=int(decodes.values[TOKENS].sum()) / len(decodes) if decodes else self._mean_prompt,
            longest_step_s=self._config.longest_step_s,
            most_tokens=limits.step_tokens,
            yields=self.yields,
        )
        return supply, float((shares * horizon_s / tpot_s).sum())

    def _candidates(
        self, prefills: Sequence[Running], start_s: float, jobs: Sequence[Waiting], slack_s: Column
    ) -> Candidates:
        """Prompts that run, then those that wait by slack. The former and the admitted are mandatory; where
        the admitted are weighed again they are worth more."""
        config, number = self._config, len(prefills)
        requests: list[Running | Waiting] = [*prefills, *jobs]
        names = [request.request_id for request in requests]
        admitted = np.array([name in self.admitted for name in names], np.bool_)
        missing = _missing(requests)
        memory, profit = missing.copy(), (missing / self._mean_prompt) ** config.long_prompt_weight
        memory[number:] = self._kv_tokens(jobs)
        profit *= np.where(admitted, 1.0 + config.kept_bonus, 1.0)
        profit[:number], admitted[:number] = 1.0, True
        deadlines_s = np.concatenate((self._deadlines_s(prefills, start_s), slack_s))
        tiers = self._tier_of_each(np.array([_targets(request).tpot_s for request in requests]))
        # Not in the past, and bounded where there is none.
        within_s = np.minimum(LATEST_S, np.maximum(0.0, deadlines_s))
        return Candidates(names, within_s, missing, memory, tiers, profit, admitted)

    def _deadlines_s(self, prefills: Sequence[Running], start_s: float) -> Column:
        """When prompts that run are due, from the start of the step."""
        due_s = [
            _targets(request).due_s(request.arrival_s, request.output_tokens, request.first_token_s)
            for request in prefills
        ]
        return np.array(due_s, np.float64) - start_s

    def _kv_tokens(self, jobs: Sequence[Waiting]) -> Numbers:
        """The KV cache that requests are expected to hold in the end."""
        output = np.array([job.output_tokens for job in jobs], np.int64)
        most = np.array([job.max_output_tokens for job in jobs], np.int64)
        names, quantile = [job.class_name for job in jobs], self._config.output_quantile
        expected = self._lengths.remaining_of_each(names, quantile, output, most)
        return (np.array([job.tokens for job in jobs], np.int64) + expected).astype(np.int64)

    def _tier_of_each(self, tpot_s: Column) -> Numbers:
        """``Tiers.index`` of each of many times per token."""
        tiers: Numbers = np.maximum(0, np.searchsorted(self._tpots_s, tpot_s, side="right") - 1)
        return tiers


def _missing(requests: Sequence[Running | Waiting]) -> Numbers:
    """Tokens that prompts have to compute."""
    return np.array([request.missing_tokens for request in requests], np.int64)


def _targets(request: Running | Waiting) -> Targets:
    assert request.targets is not None
    return request.targets
