"""The queues of a decode server in the order of a policy.

What a decode server has to give is memory for keys and values: stock gives it in order of arrival, before the
prefill server begins. Here a ``WaitingOrder`` says who is next, and hears what the last one cost before it
does. Who has memory goes on as soon as its prompt is there; where it must wait once more, for a seat in the
running batch or for memory that was taken from it, the client that holds the least by its share is first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from penstock.plugins.sglang.passes import Passes

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest
    from sglang.srt.managers.schedule_batch import Req

TAKING_WALK = 2
"""SGLang goes over its queue for requests that failed, then to give memory, then to drop who left."""


class DecodeSide:
    """What the scheduler of a decode server asks, about requests of ``passes``."""

    def __init__(self, scheduler: Any, passes: Passes) -> None:
        self._scheduler = scheduler
        self._passes = passes

    def line_up(self, queue: DecodePreallocQueue) -> None:
        """SGLang is about to give memory to those of its queue who have met their prefill server."""
        ended: list[DecodeRequest] = []
        ready: dict[Req, DecodeRequest] = {}
        for one in queue.queue:
            if one.req.finished():
                ended.append(one)
            elif one.waiting_for_input:
                ready[one.req] = one
        self._passes.begin(list(ready))
        self._forget_lost(queue, len(ready))
        if ready:
            queue.queue = MemoryLine(queue.queue, ended, ready, self._passes)

    def resume(self, queue: DecodePreallocQueue, resume: Callable[[], list[Req]]) -> list[Req]:
        """Give memory back to requests that lost it."""
        if not queue.retracted_queue:
            return resume()
        self._passes.settle()
        for request in queue.retracted_queue:
            self._passes.pause(request)
        holding = [one.req for one in queue.transfer_queue.queue]
        holding += [*self._scheduler.running_batch.reqs, *self._scheduler.waiting_queue]
        queue.retracted_queue = self._least_first(holding, queue.retracted_queue)
        resumed = resume()
        for request in resumed:
            self._passes.resume(request)
        return resumed

    def seat(self, running: Iterable[Req]) -> None:
        """SGLang is about to let requests whose prompts have come into the running batch."""
        waiting = self._scheduler.waiting_queue
        if len(waiting) > 1:
            waiting = sorted(waiting, key=self._passes.was_retracted, reverse=True)
            self._scheduler.waiting_queue = self._least_first(list(running), waiting)

    def _least_first(self, holding: list[Req], requests: list[Req]) -> list[Req]:
        """Requests whose client holds the least beside them come first; those of one client as they are."""
        keys = self._passes.held_before([*holding, *requests])[len(holding) :]
        return [request for _, request in sorted(zip(keys, requests, strict=True), key=itemgetter(0))]

    def _forget_lost(self, queue: DecodePreallocQueue, ready: int) -> None:
        """Requests that SGLang gave up without ending them: one that is aborted while its memory is taken
        from it, for example."""
        scheduler = self._scheduler
        batches = [batch.reqs for batch, _ in getattr(scheduler, "result_queue", ())]
        lists = [queue.retracted_queue, queue.held_rebootstrap_reqs, scheduler.waiting_queue]
        lists += [scheduler.running_batch.reqs, *batches]
        moving = queue.transfer_queue.queue
        if len(self._passes) > ready + len(moving) + sum(map(len, lists)):
            self._passes.keep({one.req for one in (*queue.queue, *moving)}.union(*lists))


class MemoryLine(list["DecodeRequest"]):
    """A decode server's queue for one round of giving memory: the walk that gives it takes those who are
    ``ready`` in the order of ``passes``, and leaves the queue in the order of that walk, so that places that
    SGLang remembers are those of later walks. The queue begins with those who have ``ended``."""

    def __init__(
        self,
        queue: list[DecodeRequest],
        ended: list[DecodeRequest],
        ready: Mapping[Req, DecodeRequest],
        passes: Passes,
    ) -> None:
        super().__init__(queue)
        self._ended = ended
        self._ready = ready
        self._passes = passes
        self._walks = 0
        if ended:
            self._begin_with(ended)

    def __iter__(self) -> Iterator[DecodeRequest]:
        self._walks += 1
        return self._take() if self._walks == TAKING_WALK else super().__iter__()

    def _take(self) -> Iterator[DecodeRequest]:
        walked = list(self._ended)
        try:
            yield from self._ended
            for request in self._passes.picks():
                walked.append(one := self._ready[request])
                try:
                    yield one
                finally:
                    self._charge(one)
        finally:
            self._begin_with(walked)

    def _begin_with(self, first: list[DecodeRequest]) -> None:
        """The others stay in their order behind these."""
        moved = {id(one) for one in first}
        self[:] = [*first, *(one for one in self[:] if id(one) not in moved)]

    def _charge(self, one: DecodeRequest) -> None:
        """Memory was given if the request has a place for what its prefill server says of it."""
        if one.metadata_buffer_index >= 0:
            request = one.req
            self._passes.admit(request, request.kv.cache_protected_len, len(request.origin_input_ids))
