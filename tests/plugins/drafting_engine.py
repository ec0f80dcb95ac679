"""vLLM's real scheduler with workers that draft and verify, without a model, on a clock of its own."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from stepped_scheduler import BLOCK, Settings, Stepper, token
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from penstock.benchmarks.tiny_model import ensure_model

DRAFT_TOKENS = 4
WRONG = 5


DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_max": 2},
    "draft_model": {"model": str(ensure_model())},
}


@cache
def _template(drafter: str) -> VllmConfig:
    arguments = EngineArgs(
        model=str(ensure_model()),
        dtype="bfloat16",
        block_size=BLOCK,
        max_model_len=1024,
        speculative_config={
            "method": drafter,
            "num_speculative_tokens": DRAFT_TOKENS,
            **DRAFTERS[drafter],
        },
    )
    return arguments.create_engine_config()


class DraftingSettings(Settings):
    """An engine with n-gram drafts."""

    drafter = "ngram"

    def config(self, **more: Any) -> VllmConfig:
        plain = super().config(**more)
        config = copy.deepcopy(_template(self.drafter))
        config.scheduler_config = plain.scheduler_config
        config.cache_config = plain.cache_config
        config.additional_config = plain.additional_config
        return config


class DraftModelSettings(DraftingSettings):
    """An engine with a draft model."""

    drafter = "draft_model"


@dataclass
class Clock:
    """Time as the engine makes it: a step's seconds by its tokens and by its drafter's passes."""

    base_s: float = 0.02
    token_s: float = 1e-5
    pass_s: float = 0.0
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_step(self, tokens: int, passes: int) -> None:
        self.now_s += self.base_s + self.token_s * tokens + self.pass_s * passes


@dataclass
class Heard:
    """What a scheduler should have learned: draft tokens that it ordered, and those that were right."""

    drafted: int = 0
    accepted: int = 0
    by_request: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        self.by_request.setdefault(name, []).append(drafted)


class DraftingStepper(Stepper):
    """``rate_of(request_id)`` is the chance that a draft token is right."""

    def __init__(self, scheduler: Any, rate_of: Any, clock: Clock, depth: int = 1, seed: int = 0) -> None:
        super().__init__(scheduler, depth)
        self.rate_of = rate_of
        self.clock = clock
        self.rng = random.Random(seed)
        self.length: dict[str, int] = {}
        self.heard = Heard()
        self.depths: list[int] = []
        """Passes that the drafter was asked for, by step."""
        self.overlaps = depth > 1
        self.most_tokens = scheduler.num_spec_tokens

    def receive(self) -> None:
        output, result = self.in_flight.popleft()
        depth = output.num_spec_tokens_to_schedule
        self.depths.append(depth)
        self.clock.pass_step(output.total_num_scheduled_tokens, max(1, depth))
        self.scheduler.update_from_output(output, result)
        if not self.overlaps:
            self.scheduler.update_draft_token_ids(self._draft(result.req_ids, depth))

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        sampled = [self._verify(name, output) for name in ids]
        index = {name: i for i, name in enumerate(ids)}
        return ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=sampled)

    def _verify(self, name: str, output: SchedulerOutput) -> list[int]:
        live = self.scheduler.requests[name]
        if live.is_prefill_chunk:
            return []
        start = self.length.setdefault(name, live.num_prompt_tokens)
        drafted = output.scheduled_spec_decode_tokens.get(name, [])
        accepted = 0
        for place, guess in enumerate(drafted):
            right = token(name, start + place)
            unseen = self.overlaps and guess == -1
            if not (self.rng.random() < self.rate_of(name) if unseen else guess == right):
                break
            accepted += 1
        if drafted:
            self.heard.add(name, len(drafted), accepted)
        self.length[name] = start + accepted + 1
        return [token(name, start + place) for place in range(accepted + 1)]

    def _draft(self, names: list[str], depth: int) -> DraftTokenIds:
        return DraftTokenIds(names, [self._guess(name, min(depth, self.most_tokens)) for name in names])

    def _guess(self, name: str, tokens: int) -> list[int]:
        start = self.length.get(name, 0)
        guesses = []
        for place in range(tokens):
            right = self.rng.random() < self.rate_of(name)
            guesses.append(token(name, start + place) if right else WRONG)
        return guesses
