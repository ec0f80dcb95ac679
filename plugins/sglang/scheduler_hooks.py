"""What SGLang's scheduler asks and tells a policy of ours, called around its own methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import SetInternalStateReqOutput

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.features import require
from penstock.plugins.sglang.features import SHARED_CLOCK, scheduler_feature
from penstock.plugins.sglang.hooks import apply_now, confirm
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.policy import PassPolicy
from penstock.plugins.sglang.request_scheduler import OrderedPolicy
from penstock.plugins.sglang.runtime_changes import PREFIX
from penstock.plugins.sglang.settings import (
    STOCK_POLICY,
    has_ranks,
    inherited,
    require_supported,
    scheduler_config,
)
from penstock.plugins.sglang.shared_clock import SELDOM_S, SharedClock
from penstock.plugins.sglang.slo_policy import PlannedPolicy
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

_policies: list[PassPolicy] = []
"""The one of this process, once it has a scheduler: batches do not know theirs."""


def init_schedule_policy(original: Callable[[Any], None], scheduler: Any) -> None:
    """Around ``Scheduler.init_schedule_policy``.

    Raises:
        ConfigurationError: settings that were given from Python contradict the policy.
        FeatureError: SGLang did not apply the other hooks, or ranks cannot share a clock.
    """
    config = scheduler_config(inherited())
    assert config is not None
    confirm(scheduler_feature(config).hooks)
    require_supported(scheduler.server_args, config)
    clock = _shared_clock(config) if has_ranks(scheduler.server_args) else time.monotonic
    scheduler.schedule_policy = STOCK_POLICY
    original(scheduler)
    install_policy(scheduler, config, clock)
    upstream().logger.info("penstock: waiting requests are ordered by %s", config.policy)


def install_policy(
    scheduler: Any,
    config: SchedulerConfig,
    clock: Clock = time.monotonic,
    model: StepTimeModel | None = None,
) -> None:
    """Give a scheduler the policy of ``config``. A simulation passes its own ``clock``, and perhaps the
    ``model`` of step times that ``slo`` begins with."""
    scheduler.schedule_policy = config.policy
    if config.policy == "slo":
        scheduler.policy = PlannedPolicy(scheduler, config, clock, model)
    else:
        scheduler.policy = OrderedPolicy(scheduler, config, clock)
    _policies[:] = [scheduler.policy]


def _shared_clock(config: SchedulerConfig) -> SharedClock:
    require(SHARED_CLOCK, upstream())
    apply_now()
    confirm(SHARED_CLOCK.hooks)
    # An order wants to know when requests come, a plan when each step ends.
    return SharedClock(0.0 if config.policy == "slo" else SELDOM_S)


def broadcast_requests(
    original: Callable[..., list[Any]], receiver: Any, requests: list[Any] | None, *args: Any
) -> list[Any]:
    """Around ``SchedulerRequestReceiver._broadcast_reqs_across_ranks``, where there are several."""
    return _clock_of_ranks().send_along(lambda sent: original(receiver, sent, *args), requests)


def send_to_next_stage(
    original: Callable[..., Any], scheduler: Any, requests: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Around ``SchedulerPPMixin._pp_send_pyobj_to_next_stage``, which a server that does everything calls for
    the requests of a pass alone."""
    return original(scheduler, _clock_of_ranks().stamped(requests), *args, **kwargs)


def _clock_of_ranks() -> SharedClock:
    (policy,) = _policies
    assert isinstance(policy.clock, SharedClock)
    return policy.clock


def get_prefill_adder_class(original: Callable[[Any], type], scheduler: Any) -> type:
    """Around ``Scheduler.get_prefill_adder_class``."""
    policy: PassPolicy = scheduler.policy
    return policy.adder_class(original(scheduler))


def process_batch_result(
    original: Callable[..., Any], scheduler: Any, batch: ScheduleBatch, result: Any, *args: Any
) -> Any:
    """Around ``Scheduler.process_batch_result``."""
    found = original(scheduler, batch, result, *args)
    scheduler.policy.came_back(batch, result)
    return found


def on_idle(original: Callable[[Any], Any], scheduler: Any) -> Any:
    """Around ``Scheduler.on_idle``, which may sleep until a request comes."""
    scheduler.policy.idle()
    return original(scheduler)


def get_new_batch_prefill(
    original: Callable[..., Any],
    scheduler: Any,
    prefill_delayer_single_pass: Any,
    running_batch: ScheduleBatch,
) -> tuple[ScheduleBatch | None, ScheduleBatch]:
    """Around ``Scheduler._get_new_batch_prefill_raw``, which SGLang calls unless it has reasons of its own to
    leave prompts alone."""
    if scheduler.policy.defers_prefill(running_batch):
        return None, running_batch
    found: tuple[ScheduleBatch | None, ScheduleBatch] = original(
        scheduler,
        prefill_delayer_single_pass=prefill_delayer_single_pass,
        running_batch=running_batch,
    )
    return found


def run_batch(original: Callable[..., Any], scheduler: Any, batch: ScheduleBatch, *args: Any) -> Any:
    """Around ``Scheduler.run_batch``."""
    began_s = scheduler.policy.clock()
    result = original(scheduler, batch, *args)
    scheduler.policy.launched(batch, result, began_s)
    return result


def retraction_order(original: Callable[[list[Req]], list[int]], requests: list[Req]) -> list[int]:
    """Around ``ScheduleBatch._get_decode_retraction_order``: places, the last of which is thrown out first.
    Requests of one client keep SGLang's order."""
    places = original(requests)
    if _policies:
        (policy,) = _policies
        keys = policy.retraction_keys([requests[place] for place in places])
        places = [place for _, place in sorted(zip(keys, places, strict=True), key=itemgetter(0))]
    return places


def set_internal_state(original: Callable[[Any, Any], Any], controller: Any, request: Any) -> Any:
    """Around ``SchedulerInternalStateController.set_internal_state``: all changes are made, or none."""
    given = request.server_args
    ours = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    if not ours:
        return original(controller, request)
    policy: PassPolicy = controller.scheduler.policy
    logger = upstream().logger
    try:
        policy.changed(ours)
    except ConfigurationError as error:
        logger.warning("penstock: %s", error)
        return SetInternalStateReqOutput(updated=False)
    rest = {key: value for key, value in given.items() if key not in ours}
    if rest:
        request.server_args = rest
        answer = original(controller, request)
        if not answer.updated:
            return answer
    policy.change(ours)
    logger.info("penstock: from now on %s", ", ".join(f"{key} is {value:g}" for key, value in ours.items()))
    return SetInternalStateReqOutput(updated=True)
