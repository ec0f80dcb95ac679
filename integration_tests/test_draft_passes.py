"""A draft model on a real engine makes the passes that its scheduler asks for; tokens stay the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock.benchmarks.tiny_model import TinyLlama, ensure_model

DRAFT_TOKENS = 4
PROMPTS = [{"prompt_token_ids": list(range(10 + 7 * i, 40 + 7 * i))} for i in range(3)]
OUTPUT_TOKENS = 60
CONTROLLED = {"penstock": {"scheduler": {"policy": "fcfs", "speculation": {}}}}


@dataclass
class Passes:
    """What a drafter was asked for in each step, and how often its model ran."""

    asked: list[int] = field(default_factory=list)
    made: int = 0
    looks: int = 0

    def clock(self) -> float:
        """Seconds by which whoever looks twice has had a step of 5 ms, and a pass of the drafter takes 1 ms:
        what pays is not up to the machine."""
        self.looks += 1
        return 5e-3 * self.looks + 1e-3 * self.made


@pytest.fixture
def passes(monkeypatch) -> Iterator[Passes]:
    """Watches draft models of engines in this process."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from penstock.plugins.vllm.draft_control import DraftControlling

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = Passes()
    load, propose = DraftModelProposer.load_model, DraftModelProposer.propose
    control = DraftControlling.control_drafts

    def count(*_: Any) -> None:
        seen.made += 1

    def watched_load(self, *args, **kwargs):
        load(self, *args, **kwargs)
        self.model.register_forward_hook(count)

    def watched(self, num_speculative_tokens, *args, **kwargs):
        seen.asked.append(num_speculative_tokens)
        return propose(self, num_speculative_tokens, *args, **kwargs)

    def controlled(self, config, clock, *args, **kwargs):
        control(self, config, seen.clock, *args, **kwargs)

    monkeypatch.setattr(DraftControlling, "control_drafts", controlled)
    monkeypatch.setattr(DraftModelProposer, "load_model", watched_load)
    monkeypatch.setattr(DraftModelProposer, "propose", watched)
    return seen


@contextlib.contextmanager
def engine(**more: Any) -> Iterator[Any]:
    from vllm import LLM

    made = LLM(
        model=str(ensure_model()),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        **more,
    )
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, sampling, use_tqdm=False)]


def test_a_draft_model_that_is_never_right_makes_one_pass_and_one_that_is_right_makes_more(passes):
    with engine() as plain:
        expected = answers(plain)
    means = []
    for seed in (1, 0):
        drafter = {
            "method": "draft_model",
            "model": str(ensure_model(TinyLlama(seed=seed))),
            "num_speculative_tokens": DRAFT_TOKENS,
        }
        ours = {
            "scheduler_cls": "penstock.plugins.vllm.request_scheduler.make_scheduler",
            "additional_config": CONTROLLED,
        }
        with engine(speculative_config=drafter, **ours) as llm:
            answers(llm)
            passes.asked.clear()
            before = passes.made
            assert answers(llm) == expected
        made = passes.made - before
        assert made == sum(max(1, asked) for asked in passes.asked)
        means.append(made / len(passes.asked))
    never_right, right = means
    assert never_right < 1.5
    assert right > never_right
