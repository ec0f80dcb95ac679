"""SGLang's scheduler with the waiting order of a policy.

Nothing of ``Scheduler.get_new_batch_prefill`` is replaced: a policy says who is next when SGLang asks, and
hears what each batch computes for whom. How a batch is filled, what runs and what is retracted is SGLang's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.mem_cache.common import match_kv_cache

from penstock.plugins.askings import ForgivingReader
from penstock.plugins.sglang.hooks import confirm
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.passes import Passes, PassList
from penstock.plugins.sglang.settings import (
    STOCK_POLICY,
    inherited,
    require_supported,
    scheduler_config,
)
from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.policies import waiting_order
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

NOTHING_SAID: Mapping[str, Any] = {}


class OrderedPolicy(SchedulePolicy):
    """A ``SchedulePolicy`` over a ``WaitingOrder``. To the rest of SGLang it is ``fcfs``, which matches no
    prefix before a request is admitted."""

    def __init__(self, scheduler: Any, config: SchedulerConfig, clock: Clock = time.monotonic) -> None:
        super().__init__(
            STOCK_POLICY,
            scheduler.tree_cache,
            scheduler.enable_hierarchical_cache,
            scheduler.enable_priority_scheduling,
            scheduler.schedule_low_priority_values_first,
        )
        self._scheduler = scheduler
        self._reader = ForgivingReader(config, upstream().logger)
        self.passes = Passes(waiting_order(config, clock, self._hit_tokens), clock, self._asking)
        self._adders: dict[type, type] = {}
        # As SGLang asks it: not every kind of cache has the attribute.
        self._caches = not getattr(self.tree_cache, "disable", True)

    def calc_priority(self, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> None:
        """A pass begins: the scheduler's next walk of its list takes requests in the policy's order."""
        super().calc_priority(waiting_queue, *args, **kwargs)
        self.passes.begin(waiting_queue)
        self._scheduler.waiting_queue = PassList(waiting_queue, self.passes.picks)

    def charging(self, adder: type) -> type:
        """``adder``, with every chunk that it takes on charged to its client."""
        if adder not in self._adders:
            self._adders[adder] = _charging(adder, self.passes.compute)
        return self._adders[adder]

    def _hit_tokens(self, request_id: str) -> int:
        if not self._caches:
            return 0
        request = self.passes.request(request_id)
        # As SGLang's own lpm looks a prefix up; it counts as a use of the prefix.
        match_kv_cache(request, self.tree_cache)
        return int(request.num_matched_prefix_tokens)

    def _asking(self, request: Req) -> Asking:
        given = request.sampling_params.custom_params
        return self._reader.read(request.rid, given if isinstance(given, Mapping) else NOTHING_SAID)


def init_schedule_policy(original: Callable[[Any], None], scheduler: Any) -> None:
    """Around ``Scheduler.init_schedule_policy``.

    Raises:
        ConfigurationError: settings that were given from Python contradict the policy.
        FeatureError: SGLang did not apply the other hooks.
    """
    from penstock.plugins.sglang.features import SCHEDULER_HOOKS

    config = scheduler_config(inherited())
    assert config is not None
    confirm(SCHEDULER_HOOKS)
    require_supported(scheduler.server_args, config)
    scheduler.schedule_policy = STOCK_POLICY
    original(scheduler)
    scheduler.schedule_policy = config.policy
    scheduler.policy = OrderedPolicy(scheduler, config)
    upstream().logger.info("penstock: waiting requests are ordered by %s", config.policy)


def get_prefill_adder_class(original: Callable[[Any], type], scheduler: Any) -> type:
    """Around ``Scheduler.get_prefill_adder_class``."""
    policy: OrderedPolicy = scheduler.policy
    return policy.charging(original(scheduler))


def _charging(adder: type, compute: Callable[[Req], None]) -> type:
    class ChargingAdder(adder):
        def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> Any:
            return self._charged(req, partial(super().add_one_req, req, *args, **kwargs))

        def add_chunked_req(self, req: Req) -> Any:
            return self._charged(req, partial(super().add_chunked_req, req))

        def _charged(self, req: Req, add: Callable[[], Any]) -> Any:
            taken = len(self.can_run_list)
            result = add()
            if len(self.can_run_list) > taken:
                compute(req)
            return result

    return ChargingAdder
