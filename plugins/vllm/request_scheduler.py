"""vLLM's scheduler with the waiting order of a policy: ``--scheduler-cls`` names ``make_scheduler``.

Nothing of ``Scheduler.schedule`` is replaced. A policy decides who waits in which order, and is told what was
computed for whom; how a step is filled, when a request is preempted and what a step carries is vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.plugins.configuration import ConfigurationError, scheduler_config
from penstock.plugins.features import asked_for, require
from penstock.plugins.vllm.askings import Askings
from penstock.plugins.vllm.behind_model import BehindTheModel
from penstock.plugins.vllm.cached_prefix import CachedPrefix
from penstock.plugins.vllm.charged_queue import ChargedQueue
from penstock.plugins.vllm.charging import Charges
from penstock.plugins.vllm.client_stats import ClientStats
from penstock.plugins.vllm.features import REQUEST_SCHEDULER, SLO_SCHEDULER
from penstock.plugins.vllm.installation import upstream
from penstock.plugins.vllm.later import Later
from penstock.plugins.vllm.slo_scheduling import AsyncSLOScheduler, SyncSLOScheduler
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.policies import waiting_order
from penstock.schedulers.waiting import Clock, HitTokens, WaitingOrder

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

OrderFactory = Callable[[SchedulerConfig, Clock, HitTokens], WaitingOrder]


def make_scheduler(vllm_config: Any, **arguments: Any) -> Scheduler:
    """The scheduler for an engine, asynchronous where the engine is.

    ``arguments`` are those that vLLM's engine core passes. A simulation adds ``clock``, its own time, and a
    test ``order_of``, its own order.

    Raises:
        FeatureError: this vLLM lacks a name that request scheduling stands on.
        ConfigurationError: ``additional_config`` is wrong, or contradicts another setting.
    """
    front_end_exports = REQUEST_SCHEDULER.name in asked_for()
    require(REQUEST_SCHEDULER, upstream())
    require_supported(vllm_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    if scheduler_config(vllm_config.additional_config).policy == "slo":
        require(SLO_SCHEDULER, upstream())
        require_chunked_prefill(vllm_config)
        kind: Any = AsyncSLOScheduler if is_async else SyncSLOScheduler
    else:
        kind = AsyncRequestScheduler if is_async else SyncRequestScheduler
    return kind(vllm_config=vllm_config, front_end_exports=front_end_exports, **arguments)


def require_supported(vllm_config: Any) -> None:
    """Refuse settings that contradict a policy of ours.

    Raises:
        ConfigurationError: naming the setting.
    """
    policy = vllm_config.scheduler_config.policy
    if policy != "fcfs":
        raise ConfigurationError(f"--scheduling-policy: given {policy} beside a request scheduler; leave it")
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise ConfigurationError("scheduler: diffusion models need vLLM's own scheduler")


def require_chunked_prefill(vllm_config: Any) -> None:
    """Refuse to plan chunks where prompts cannot be cut.

    Raises:
        ConfigurationError: chunked prefill is off.
    """
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ConfigurationError("scheduler.policy: slo plans chunks of prompts; enable chunked prefill")


class RequestScheduling(BehindTheModel):
    """The part of a scheduler that is ours; mixed in before a scheduler of vLLM's.

    What arrivals, ends, admissions and generated tokens change is put off until the device computes, and so
    are the look-ups for the next pick. A step whose line is short does the rest of it first.

    ``clock`` gives seconds and may be virtual: the order, the charges and the intervals of the statistics
    read no other. ``front_end_exports`` says that the process at the other end takes our statistics.
    """

    def __init__(
        self,
        *args: Any,
        clock: Clock = time.monotonic,
        order_of: OrderFactory = waiting_order,
        front_end_exports: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.config = scheduler_config(self.vllm_config.additional_config)
        self.clock = clock
        self._cached = CachedPrefix(self)
        order = order_of(self.config, clock, self._cached_prefix)
        self._later = Later()
        self._is_prepared = False
        self.charges = Charges(order, clock, Askings(self.config).of, self._later)
        self.waiting: ChargedQueue = ChargedQueue(order, self.charges, self._later, self._begin_picks)
        self._client_stats = ClientStats(
            self.config, order, clock, settle=self._charge_all_output, export=front_end_exports
        )
        self.control_drafts(self.config.speculation, clock, self.charges.asking_of)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """One step in the policy's order, charged for."""
        if not self._is_prepared:
            self._catch_up()
            self._prepare()
        self.charges.begin_step()
        self.waiting.begin_step()
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.__dict__.pop("_reserve_prefill_lookahead", None)
            self._is_prepared = False
        self.charges.settle(output.num_scheduled_tokens, self.requests)
        return output

    def _prepare(self) -> None:
        self.charges.charge_turn(self.running)
        order = self.waiting.order
        order.begin_step()
        order.foresee()
        self._client_stats.refresh()
        self._is_prepared = True

    def _begin_picks(self) -> None:
        """vLLM is done with those that run and looks at the queue for the first time in this step."""
        if self.waiting.is_short:
            self._catch_up()
        # Until now vLLM asked it for each that runs, hundreds in every step: its own method answered.
        self._reserve_prefill_lookahead = self._offer

    def _offer(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # The last call before a waiting request is admitted, and the only one with its number of tokens.
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        self.charges.offer(request, num_computed_tokens, tokens)
        return tokens

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        idle = not self.running and not self.has_unfinished_requests()
        if idle:
            self._catch_up()
        if stats is not None:
            self._client_stats.add_to(stats, idle=idle)
            self.add_draft_counts(stats)
        return stats

    def _update_request_as_session(self, session: Request, *args: Any, **kwargs: Any) -> None:
        # The output of a turn becomes prompt of the next one, computed already.
        self._later.do()
        self.charges.charge_output_of(session, then=0)
        super()._update_request_as_session(session, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        # Every request ends here, whatever it was doing.
        result = super()._free_request(request, *args, **kwargs)
        self.charges.close(request)
        if not self.running:
            # No step may come to do it behind.
            self._catch_up()
        return result

    def _charge_all_output(self) -> None:
        self._later.do()
        self.charges.charge_output(self.running)

    def _cached_prefix(self, request_id: str) -> int:
        request = self.waiting.get(request_id)
        bill = self.charges.of(request)
        bill.cached_tokens = self._cached.tokens_of(request, bill.cached_tokens)
        return bill.cached_tokens

    def check_integrity(self) -> None:
        """Assert that queue, order, bills and vLLM's own tables agree."""
        self._catch_up()
        self.waiting.check_integrity()
        self.charges.check_integrity(self.requests)


class SyncRequestScheduler(RequestScheduling, Scheduler):
    """For engines that schedule a step when the one before has ended."""


class AsyncRequestScheduler(RequestScheduling, AsyncScheduler):
    """For engines that schedule a step while the one before runs."""
