"""Carry a worker's own statistics to the scheduler, and on with the scheduler's to the front end.

Why: ``ModelRunnerOutput`` has fields for statistics of connectors and of CUDA graphs; an attention backend
has none, and no hook in the scheduler's process. Here they are an attribute of the output, which workers in
other processes pickle with it, and go on in ``SchedulerStats`` (``stat_logging``). Of several ranks the
engine hears one, whose KV heads are a sample of all. Outputs that are not there yet when a step returns,
as asynchronous scheduling makes them, carry nothing.

Remove when: ``ModelRunnerOutput`` has an open field for statistics, and ``SchedulerStats`` one for what is
in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from penstock.patches.attribute import AttributePatch
from penstock.patches.vllm.stat_logging import PAYLOAD_KEY

CARRIED = "penstock_stats"
INTERVAL_S = 1.0

Collect = Callable[[], dict[str, Any] | None]


def carrying(
    collect: Collect, clock: Callable[[], float] = time.monotonic
) -> tuple[AttributePatch, AttributePatch]:
    """Patches of the worker, and of the scheduler.

    What ``collect`` gives in a worker, plain values by the name of a part, is in the scheduler's statistics
    once in ``INTERVAL_S``, and when the engine falls idle, since it makes none until its next request.
    """

    def attach(original: Any) -> Any:
        @wraps(original)
        def sample_tokens(self: Any, grammar_output: Any) -> Any:
            output = original(self, grammar_output)
            # The output of a step without requests is one object for all of them.
            if getattr(output, "req_ids", None):
                setattr(output, CARRIED, collect())
            return output

        return sample_tokens

    def pass_on(original: Any) -> Any:
        passed_s: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

        @wraps(original)
        def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
            found = original(self, scheduler_output, model_runner_output)
            carried = getattr(model_runner_output, CARRIED, None)
            now = clock()
            late = now - passed_s.get(self, -INTERVAL_S) >= INTERVAL_S
            if carried and (late or not self.get_num_unfinished_requests()):
                passed_s[self] = now
                for outputs in found.values():
                    if outputs.scheduler_stats is not None:
                        _add(outputs.scheduler_stats, carried)
            return found

        return update_from_output

    return (
        AttributePatch(
            target="vllm.v1.worker.gpu_worker:Worker.sample_tokens",
            signature="(self, grammar_output)",
            replace=attach,
            wraps=True,
        ),
        AttributePatch(
            target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            signature="(self, scheduler_output, model_runner_output)",
            replace=pass_on,
            wraps=True,
        ),
    )


def _add(stats: Any, parts: dict[str, Any]) -> None:
    """Put parts beside those that a scheduler of ours has put there."""
    stats_of_others = stats.kv_connector_stats or {}
    payload = {**stats_of_others.get(PAYLOAD_KEY, {}), **parts}
    stats.kv_connector_stats = {**stats_of_others, PAYLOAD_KEY: payload}
