"""Draft lengths for each request in vLLM's scheduler, whoever drafts and whatever the waiting order is.

Before a step is scheduled, requests hold the drafts that the workers made for them, or, where scheduling is
asynchronous, places for drafts to come. What is not worth its time is cut off there; vLLM schedules, verifies
and rolls back the rest as always, so that answers are those without speculation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.patches.vllm.stat_logging import PAYLOAD_KEY
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.features import require
from penstock.plugins.vllm.draft_budget import DraftBudget
from penstock.plugins.vllm.features import DRAFT_CONTROL
from penstock.plugins.vllm.installation import upstream

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class DraftControlling:
    """Mixed in before ``RequestScheduling``, whose configuration, clock and clients it reads; does nothing
    without ``speculation`` in the configuration.

    Raises:
        ConfigurationError: draft lengths are asked for and nothing drafts.
        FeatureError: this vLLM lacks a name that draft control stands on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drafts: DraftBudget | None = None
        config = self.config.speculation  # type: ignore[attr-defined]
        if config is None:
            return
        most: int = self.num_spec_tokens  # type: ignore[attr-defined]
        if not most:
            raise ConfigurationError("scheduler.speculation: nothing drafts; give --speculative-config, too")
        require(DRAFT_CONTROL, upstream())
        self.drafts = DraftBudget(config, most, self.clock, self.charges.asking_of)  # type: ignore[attr-defined]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.drafts is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        waits = bool(self.waiting) and len(self.running) < self.max_num_running_reqs  # type: ignore[attr-defined]
        self.drafts.cut(self.running, self.max_num_scheduled_tokens, waits=waits)  # type: ignore[attr-defined]
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.drafts.scheduled(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        if self.drafts is not None:
            self.drafts.executed(scheduler_output)
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self.drafts is not None:
            self.drafts.learn()
        return outputs

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        # Where update_from_output says what became of a draft; called for each one, statistics on or off.
        if self.drafts is not None:
            invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            self.drafts.verified(request_id, num_draft_tokens - invalid, num_accepted_tokens)
        return super().make_spec_decoding_stats(  # type: ignore[misc]
            spec_decoding_stats,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            num_invalid_spec_tokens=num_invalid_spec_tokens,
            request_id=request_id,
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        carried = getattr(stats, "kv_connector_stats", None) or {}
        if self.drafts is not None and PAYLOAD_KEY in carried:
            carried[PAYLOAD_KEY]["drafts"] = self.drafts.counts()
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.drafts is not None:
            self.drafts.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
