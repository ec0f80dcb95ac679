"""What the queues of a decode server ask a policy of ours, called around SGLang's own methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.disaggregation.decode import DecodePreallocQueue
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from penstock.plugins.sglang.decode_side import DecodeSide


def resume_retracted_reqs(
    original: Callable[..., list[Req]], queue: DecodePreallocQueue, *args: Any, **kwargs: Any
) -> list[Req]:
    """Around ``DecodePreallocQueue.resume_retracted_reqs``, with which a round of the queues begins."""
    side: DecodeSide = queue.scheduler.policy.decode_side
    return side.resume(queue, partial(original, queue, *args, **kwargs))


def update_handshake_waiters(
    original: Callable[..., None], queue: DecodePreallocQueue, *args: Any, **kwargs: Any
) -> None:
    """Around ``DecodePreallocQueue._update_handshake_waiters``, after which ``pop_preallocated`` gives
    memory."""
    original(queue, *args, **kwargs)
    side: DecodeSide = queue.scheduler.policy.decode_side
    side.line_up(queue)


def get_new_prebuilt_batch(
    original: Callable[..., ScheduleBatch | None], scheduler: Any, running_batch: ScheduleBatch
) -> ScheduleBatch | None:
    """Around ``SchedulerDisaggregationDecodeMixin.get_new_prebuilt_batch``."""
    side: DecodeSide = scheduler.policy.decode_side
    side.seat(running_batch.reqs)
    return original(scheduler, running_batch)
