"""SGLang's scheduler with the waiting order of a policy that knows clients.

Nothing of ``Scheduler.get_new_batch_prefill`` is replaced: a policy says who is next when SGLang asks, and
hears what each batch computes for whom. How a batch is filled and what runs is SGLang's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.mem_cache.common import match_kv_cache

from penstock.patches.client_gauges import client_gauges
from penstock.plugins.sglang.decode_side import DecodeSide
from penstock.plugins.sglang.passes import Passes
from penstock.plugins.sglang.policy import PassPolicy
from penstock.plugins.sglang.runtime_changes import QUANTUM, weights_in
from penstock.plugins.sglang.shared_clock import SharedClock
from penstock.schedulers.client_service import snapshot
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.policies import waiting_order
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


RANKS_LOOK_UPS = 4
"""Waiting requests whose cached prefix ranks look up anew in a pass, at most. One that is alone bounds the
time for that, which each of them would measure differently."""


class OrderedPolicy(PassPolicy):
    """A ``PassPolicy`` over a ``WaitingOrder``."""

    def __init__(self, scheduler: Any, config: SchedulerConfig, clock: Clock = time.monotonic) -> None:
        super().__init__(scheduler, config, clock)
        if isinstance(clock, SharedClock):
            most = min(RANKS_LOOK_UPS, config.hit_refreshes_per_step)
            config = msgspec.structs.replace(config, hit_refreshes_per_step=most)
        order = waiting_order(config, clock, self._hit_tokens)
        self.passes = Passes(order, clock, self.asking, self._generates)
        self.decode_side = DecodeSide(scheduler, self.passes)
        # As SGLang asks it: not every kind of cache has the attribute.
        self._caches = not getattr(self.tree_cache, "disable", True)
        self.publish(self, client_gauges)

    def begin(self, waiting: list[Req]) -> Callable[[], Iterator[Req]]:
        self.passes.begin(waiting)
        if self.scheduler.disaggregation_mode == DisaggregationMode.NULL:
            self.passes.forget_lost()
        return self.passes.picks

    def adding(self, adder: type) -> type:
        """``adder``, with every chunk that it takes on charged to its client."""
        return _charging(adder, self.passes.compute)

    def retraction_keys(self, requests: list[Req]) -> Sequence[float]:
        """The client that holds the most by its share gives first, until another one holds more."""
        return self.passes.held(requests)

    def settle(self) -> None:
        """Charge what was generated up to now."""
        self.passes.settle()

    def payload(self) -> dict[str, Any]:
        """What each client has had, as the series show it."""
        return snapshot(self.passes.order, self.config.shown_clients).as_dict(self.config.policy)

    def line(self) -> str:
        """The same for the log."""
        return snapshot(self.passes.order, self.config.shown_clients).line(self.config.policy)

    def change(self, values: Mapping[str, float]) -> None:
        super().change(values)
        if QUANTUM in values:
            self.passes.order.set_quantum(self.config.quantum_tokens)
        for client, weight in weights_in(values).items():
            self.passes.reweigh(client, weight)

    def _generates(self) -> bool:
        """Whether answers are this server's: a prefill server leaves even the first token to decode."""
        return bool(self.scheduler.disaggregation_mode != DisaggregationMode.PREFILL)

    def _hit_tokens(self, request_id: str) -> int:
        # A decode server matches and locks a prefix when it gives memory, and looks for none before.
        if not self._caches or self.scheduler.disaggregation_mode == DisaggregationMode.DECODE:
            return 0
        request = self.passes.request(request_id)
        # As SGLang's own lpm looks a prefix up; it counts as a use of the prefix.
        match_kv_cache(request, self.tree_cache)
        return int(request.num_matched_prefix_tokens)


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
