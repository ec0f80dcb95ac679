"""What the policies of ours have in common where SGLang's scheduler meets them."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import SchedulePolicy

from penstock.plugins.askings import ForgivingReader
from penstock.plugins.sglang import runtime_changes
from penstock.plugins.sglang.installation import upstream
from penstock.plugins.sglang.passes import PassList
from penstock.plugins.sglang.publishing import MakeGauges, Publisher, Source
from penstock.plugins.sglang.scheduler_metrics import publisher_of
from penstock.plugins.sglang.settings import STOCK_POLICY
from penstock.schedulers.asking import CLIENT_ID, Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.waiting import Clock

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

NOTHING_SAID: Mapping[str, Any] = {}


class PassPolicy(SchedulePolicy):
    """A ``SchedulePolicy`` that a scheduler asks and tells more than SGLang's own. To the rest of SGLang it
    is ``fcfs``, which matches no prefix before a request is admitted."""

    def __init__(self, scheduler: Any, config: SchedulerConfig, clock: Clock = time.monotonic) -> None:
        super().__init__(
            STOCK_POLICY,
            scheduler.tree_cache,
            scheduler.enable_hierarchical_cache,
            scheduler.enable_priority_scheduling,
            scheduler.schedule_low_priority_values_first,
        )
        self.scheduler = scheduler
        self.config = config
        self.clock = clock
        self._reader = ForgivingReader(config, upstream().logger)
        # A table of keys says who asks; what a request says of itself does not count then.
        self._routing_key_names = config.trust_headers and not config.clients
        self._adders: dict[type, type] = {}
        self._publisher: Publisher | None = None

    def publish(self, source: Source, make_gauges: MakeGauges) -> None:
        """Show what ``source`` counts, from now on."""
        self._publisher = publisher_of(self.scheduler, source, make_gauges, self.clock, self.settle)

    def settle(self) -> None:
        """What is shown is about to be read."""

    @abstractmethod
    def begin(self, waiting: list[Req]) -> Callable[[], Iterator[Req]] | None:
        """A pass begins: how to walk the list of waiting requests once; None: from its start to its end."""

    @abstractmethod
    def adding(self, adder: type) -> type:
        """A ``PrefillAdder`` class, with what this policy does beside."""

    def calc_priority(self, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> None:
        """A pass begins: the scheduler's next walk of its list takes requests in the policy's order."""
        super().calc_priority(waiting_queue, *args, **kwargs)
        picks = self.begin(waiting_queue)
        if picks is not None:
            self.scheduler.waiting_queue = PassList(waiting_queue, picks)

    def adder_class(self, adder: type) -> type:
        """``adding`` of the class that SGLang chose, the same one each time."""
        if adder not in self._adders:
            self._adders[adder] = self.adding(adder)
        return self._adders[adder]

    def asking(self, request: Req) -> Asking:
        """Who asks, and how soon."""
        given = request.sampling_params.custom_params
        said: Mapping[str, Any] = given if isinstance(given, Mapping) else NOTHING_SAID
        if self._routing_key_names and request.routing_key and said.get(CLIENT_ID) is None:
            said = {**said, CLIENT_ID: request.routing_key}
        return self._reader.read(request.rid, said)

    def defers_prefill(self, running_batch: ScheduleBatch) -> bool:
        """Whether the pass that begins leaves all prompts alone."""
        return False

    def launched(self, batch: ScheduleBatch, result: Any, began_s: float) -> None:
        """A batch was handed to the model; ``result`` comes back with it."""

    def came_back(self, batch: ScheduleBatch, result: Any) -> None:
        """The tokens of a batch are with their requests."""
        if self._publisher is not None:
            self._publisher.passed()

    def idle(self) -> None:
        """There is nothing to do."""
        if self._publisher is not None:
            self._publisher.idle()

    @abstractmethod
    def retraction_keys(self, requests: list[Req]) -> Sequence[float]:
        """Whom to throw out when memory runs out, those of the highest key first; ``requests`` are in the
        order in which SGLang would keep them, which stays where keys are equal."""

    def changed(self, values: Mapping[str, float]) -> SchedulerConfig:
        """The configuration with changes at run time.

        Raises:
            ConfigurationError: a key cannot be changed, or not to its value.
        """
        return runtime_changes.changed(self.config, values)

    def change(self, values: Mapping[str, float]) -> None:
        """Make changes that were judged."""
        self.config = self.changed(values)
        self._reader = ForgivingReader(self.config, upstream().logger)
