"""Draft lengths for each request in vLLM's scheduler, whoever drafts and whatever the waiting order is.

Before a step is scheduled, requests hold the drafts that the workers made for them, or, where scheduling is
asynchronous, places for drafts to come. What is not worth its time is cut off there; vLLM schedules, verifies
and rolls back the rest as always, so that answers are those without speculation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.features import require
from penstock.plugins.vllm.draft_budget import DraftBudget
from penstock.plugins.vllm.features import DRAFT_CONTROL
from penstock.plugins.vllm.installation import upstream
from penstock.schedulers.asking import Asking
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.drafts import Drafts
from penstock.schedulers.slo.plan import PASSIVE, Plan
from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Stock
    from vllm.v1.request import Request
else:
    Stock = object


DRAFT_HEADS = ("eagle", "eagle3", "mtp")


class DraftControlling(Stock):
    """What comes right before vLLM's own scheduler. Does nothing until ``control_drafts``."""

    drafts: DraftBudget | None = None
    plan: Plan = PASSIVE
    """Of the next step; its draft lengths stand where it is active."""

    def control_drafts(
        self,
        config: SpeculationConfig | None,
        clock: Clock,
        asking_of: Callable[[Request], Asking],
        model: StepTimeModel | None = None,
    ) -> None:
        """Control drafts if ``config`` asks for it. ``model`` is one that somebody else tells of steps.

        Raises:
            ConfigurationError: draft lengths are asked for and nothing drafts.
            FeatureError: this vLLM lacks a name that draft control stands on.
        """
        if config is None:
            return
        if not self.num_spec_tokens:
            raise ConfigurationError("scheduler.speculation: nothing drafts; give --speculative-config, too")
        require(DRAFT_CONTROL, upstream())
        own = model or StepTimeModel(find_profile(config.profile))
        drafts = Drafts(config, self.num_spec_tokens, own, in_passes=makes_passes(self.vllm_config))
        self.drafts = DraftBudget(
            drafts,
            clock,
            asking_of,
            tell_model=model is None,
            passes_end_later=bool(self.vllm_config.use_v2_model_runner),
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.drafts is None:
            return super().schedule(*args, **kwargs)
        if self.plan.active:
            self.drafts.keep(self.running, self.plan)
        else:
            waits = bool(self.waiting) and len(self.running) < self.max_num_running_reqs
            self.drafts.cut(self.running, self.max_num_scheduled_tokens, waits=waits)
        output = super().schedule(*args, **kwargs)
        self.drafts.scheduled(output)
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # Workers draft as much at the end of the step; places for drafts to come are as many.
        if self.drafts is not None:
            self.drafts.limit_passes(scheduler_output)
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self.drafts is not None:
            self.drafts.executed(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def add_draft_counts(self, stats: Any) -> None:
        """Put what was drafted beside the other statistics of ours, where they are due."""
        carried = getattr(stats, "kv_connector_stats", None) or {}
        if self.drafts is not None and PAYLOAD_KEY in carried:
            carried[PAYLOAD_KEY]["drafts"] = self.drafts.counts()

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.drafts is not None:
            self.drafts.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)


def makes_passes(vllm_config: Any) -> bool:
    """Whether drafts cost a pass a token, and the drafter makes as few as a step tells it to.

    vLLM's first model runner tells all drafters; those that look up need no passes, those that draft all
    tokens at once make one, and some refuse another number than the configured one. Its second tells draft
    heads alone. Ranks of data parallelism must make equally many, and each has a scheduler of its own.
    """
    speculative = vllm_config.speculative_config
    method = speculative.method
    if speculative.parallel_drafting or vllm_config.parallel_config.data_parallel_size > 1:
        return False
    if vllm_config.use_v2_model_runner:
        return method in DRAFT_HEADS and not speculative.use_multi_module_mtp()
    return method in DRAFT_HEADS or method == "draft_model"
