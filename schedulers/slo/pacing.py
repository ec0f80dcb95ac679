"""How long the next token of a running request may still take, under the pace that its user counts.

By the mean of a whole answer a token may come late as long as the rest of the answer makes up for it. Neither
the length of the rest nor its speed is known: the answer is taken to be as short as few of its class are, and
steps to go on taking as long as they did lately. An engine whose steps leave no time to catch up lends none.

Where a step serves every decode, however much slack it has, one answer in debt would hold up all prompts. The
same prompts in more and shorter steps leave a decode as far behind by the time it has made up for a long one:
only an answer that ends before that loses by it. There steps are as long as such losses are few.
"""

from __future__ import annotations

import numpy as np

from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.decodes import BEGIN, LAST, MOST, OUTPUT, TPOT, Column, Columns
from penstock.schedulers.slo.lengths import OutputLengths
from penstock.schedulers.slo.requests import Running
from penstock.schedulers.slo.targets import Targets

SMOOTHING = 1 / 64
"""Weight of the newest step in what a step takes lately."""
LENGTHS = np.array([[1.0], [0.8], [0.6], [0.4], [0.3]])
"""What a step may last, as parts of the longest, ``[5, 1]``."""
LEAST_GAIN_S = 1e-6


class Pacing:
    """Slack of running requests, in seconds."""

    def __init__(self, config: SLOConfig, lengths: OutputLengths) -> None:
        self.pace = config.pace
        self._quantile = config.short_answer_quantile
        self._by_losses = config.lending == "losses"
        self._lent_step_s = config.lent_step_s
        self._lost_answer_s = config.lost_answer_s
        self._lengths_s = config.longest_step_s * LENGTHS
        self._outputs = lengths
        self._step_s: float | None = None

    def observe_step(self, seconds: float) -> None:
        """A step took so long."""
        before = seconds if self._step_s is None else self._step_s
        self._step_s = before + SMOOTHING * (seconds - before)

    def slack_s(self, request: Running, targets: Targets, start_s: float) -> float:
        """Time from ``start_s`` until the next token of a request is due, below 0 if it was before.

        Time that is lent makes a short step efficient, so it ends at ``lent_step_s``: where pace and load
        leave longer steps anyway, lending costs tokens their pace and gains prompts little.
        """
        slack = request.due_s(targets, self.pace) - start_s
        if self.pace == "mean" and slack < self._lent_step_s and request.output_tokens:
            slack = min(self._lent_step_s, slack + self._catch_up_s(request, targets.tpot_s))
        return slack

    def slacks_s(self, decodes: Columns, start_s: float) -> Column:
        """``slack_s`` of each of many that decode."""
        begin_s, tpot_s, last_s = decodes.values[BEGIN], decodes.values[TPOT], decodes.values[LAST]
        slack_s: Column = begin_s + decodes.values[OUTPUT] * tpot_s
        if self.pace == "gap":
            slack_s = np.where(np.isnan(begin_s), last_s + tpot_s, slack_s)
        slack_s -= start_s
        if self.pace == "mean" and self._step_s is not None and not self._by_losses:
            self._lend(decodes, slack_s, self._step_s)
        return slack_s

    def _lend(self, decodes: Columns, slack_s: Column, step_s: float) -> None:
        """Add to the slack of each what the rest of a short answer makes up for."""
        tpot_s = decodes.values[TPOT]
        short = np.flatnonzero((slack_s < self._lent_step_s) & (tpot_s > step_s))
        if len(short):
            names = [decodes.requests[place].class_name for place in short.tolist()]
            output, most = decodes.values[OUTPUT, short], decodes.values[MOST, short]
            left = self._outputs.remaining_of_each(names, self._quantile, output, most)
            faster_s = (tpot_s[short] - step_s) * np.maximum(0.0, left - 1.0)
            slack_s[short] = np.minimum(self._lent_step_s, slack_s[short] + faster_s)

    def lent_s(self, decodes: Columns, slack_s: Column) -> float:
        """How long a step may be, whatever the slack of its decodes, for prompts that have targets: the
        longest that takes ``lost_answer_s`` or more for each answer which is expected to end before it has
        made up for that step, and would have met its pace after one that keeps it. 0 where there is none."""
        step_s = self._step_s
        if self.pace != "mean" or not self._by_losses or step_s is None or not len(decodes):
            return 0.0
        lengths_s = self._lengths_s
        near = np.flatnonzero(slack_s < lengths_s[0, 0])
        tpot_s, slack_s = decodes.values[TPOT, near], slack_s[near]
        late_s = np.maximum(
            0.0, np.stack(np.broadcast_arrays(lengths_s, np.minimum(lengths_s, tpot_s))) - slack_s
        )
        made_up_after = late_s / np.maximum(LEAST_GAIN_S, tpot_s - step_s)
        names = [decodes.requests[place].class_name for place in near.tolist()]
        output, most = decodes.values[OUTPUT, near], decodes.values[MOST, near]
        long, kept = self._outputs.ends_within(names, output, most, made_up_after)
        fits = (long - kept).sum(axis=1) * self._lost_answer_s <= lengths_s[:, 0]
        return float(lengths_s[fits].max(initial=0.0))

    def _catch_up_s(self, request: Running, tpot_s: float) -> float:
        """By how much the rest of a short answer will be faster than its pace."""
        if self._step_s is None or self._step_s >= tpot_s:
            return 0.0
        left = self._outputs.remaining(
            request.class_name, self._quantile, request.output_tokens, request.max_output_tokens
        )
        return (tpot_s - self._step_s) * max(0.0, left - 1.0)
