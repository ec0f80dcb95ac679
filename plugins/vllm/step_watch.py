"""vLLM's own scheduler with a watch: what each step held, and how long it took.

Nothing of what is scheduled changes. A step's time is that between the ends of steps, as the SLO policy's
model of step times learns it while serving.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.schedulers.slo.step_time import StepFeatures
from penstock.schedulers.slo.steps_in_flight import StepsInFlight
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Stock
else:
    Stock = object


class WatchedStep(NamedTuple):
    """One step that came back."""

    features: StepFeatures
    seconds: float


class StepWatch(Stock):
    """The part of a scheduler that is ours. ``watched`` takes the steps."""

    def __init__(
        self, *args: Any, watched: list[WatchedStep], clock: Clock = time.monotonic, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._watched = watched
        self._clock = clock
        self._steps = StepsInFlight()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        now_s = self._clock()
        output = super().schedule(*args, **kwargs)
        # ``num_computed_tokens`` counts the step's tokens already.
        tokens = output.total_num_scheduled_tokens
        computed = sum(self.requests[name].num_computed_tokens for name in output.num_scheduled_tokens)
        features = StepFeatures(tokens, len(output.num_scheduled_tokens), computed - tokens)
        self._steps.begin(output, features, 0.0, now_s)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        ended = self._steps.end(args[0] if args else kwargs["scheduler_output"], self._clock())
        if ended is not None:
            flight, seconds = ended
            self._watched.append(WatchedStep(flight.features, seconds))
        return super().update_from_output(*args, **kwargs)


class SyncStepWatch(StepWatch, Scheduler):
    """For engines that schedule a step when the one before has ended."""


class AsyncStepWatch(StepWatch, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""


def watched_scheduler(vllm_config: Any, **arguments: Any) -> Scheduler:
    """The scheduler for an engine, asynchronous where the engine is."""
    is_async = vllm_config.scheduler_config.async_scheduling
    kind: Any = AsyncStepWatch if is_async else SyncStepWatch
    return kind(vllm_config=vllm_config, **arguments)
