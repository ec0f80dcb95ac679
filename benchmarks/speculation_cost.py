"""What draft lengths cost the scheduler in processor time, and what a suffix proposal costs and brings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from penstock.benchmarks.draft_texts import KINDS, texts
from penstock.plugins.vllm.draft_budget import DraftBudget
from penstock.schedulers.asking import Asking
from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.drafts import Besides, Drafts
from penstock.schedulers.slo.profiles import find_profile
from penstock.schedulers.slo.step_time import StepTimeModel
from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.drafter import SuffixDrafter

RUNNING = (16, 64, 256)
DRAFT_TOKENS = 5
SHORT_STEP_S = 0.010


def time_allocation(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """One row a number of running requests: microseconds of processor time in a step, means."""
    return [_time_allocation(running, steps, seed) for running in RUNNING]


def _time_allocation(running: int, steps: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    now = [0.0]
    model = StepTimeModel(find_profile(SpeculationConfig().profile))
    budget = DraftBudget(
        Drafts(SpeculationConfig(), DRAFT_TOKENS, model),
        lambda: now[0],
        lambda request: Asking(f"c{int(request.request_id) % 8}", tpot_slo_ms=None),
    )
    requests = [_request(str(number)) for number in range(running)]
    cut, learn = [], []
    for _ in range(steps):
        for request in requests:
            request.spec_token_ids = [7] * rng.randint(1, DRAFT_TOKENS)
        begin = time.thread_time_ns()
        budget.cut(requests, 8192, waits=False)
        cut.append(time.thread_time_ns() - begin)
        output = _output(requests)
        result = _result(output, rng)
        now[0] += 0.01
        begin = time.thread_time_ns()
        budget.scheduled(output)
        budget.executed(output, result)
        learn.append(time.thread_time_ns() - begin)
    cut_us, learn_us = _mean_us(cut), _mean_us(learn)
    return {
        "case": "allocation",
        "running": running,
        "us_to_choose": _time_choice(budget, running, steps),
        "us_to_allocate": cut_us,
        "us_to_learn": learn_us,
        "share_of_10ms": round((cut_us + learn_us) / 1e6 / SHORT_STEP_S, 4),
    }


def _time_choice(budget: DraftBudget, running: int, steps: int) -> float:
    """The part of an allocation that is no reading of requests: estimates, times and lengths, in arrays."""
    rows, available = np.arange(running), np.full(running, DRAFT_TOKENS)
    no_pace = np.full(running, np.inf)
    besides = Besides(running, 0, 8192, 8192, running, 1000 * running)
    times = []
    for _ in range(steps):
        begin = time.thread_time_ns()
        budget.drafts.choose(rows, available, no_pace, no_pace, besides)
        times.append(time.thread_time_ns() - begin)
    return _mean_us(times)


def _request(name: str) -> Any:
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=1000,
        num_tokens=1001,
        num_output_tokens=1,
        is_prefill_chunk=False,
        spec_token_ids=[],
    )


def _output(requests: list[Any]) -> Any:
    drafts = {one.request_id: one.spec_token_ids for one in requests if one.spec_token_ids}
    tokens = {one.request_id: 1 + len(one.spec_token_ids) for one in requests}
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens=drafts,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_invalid_spec_tokens=None,
    )


def _result(output: Any, rng: random.Random) -> Any:
    drafts = output.scheduled_spec_decode_tokens
    names = list(output.num_scheduled_tokens)
    sampled = [[7] * rng.randint(1, 1 + len(drafts.get(name, ()))) for name in names]
    return SimpleNamespace(
        sampled_token_ids=sampled, req_id_to_index={name: index for index, name in enumerate(names)}
    )


def _mean_us(times_ns: list[int]) -> float:
    return round(sum(times_ns) / len(times_ns) / 1e3, 1)


Propose = Callable[[str, list[int], int], list[int]]
"""Draft of a request's whole text, of which so many tokens are new."""


def suffix_proposer() -> Propose:
    """Ours, one drafter for all texts."""
    drafter = SuffixDrafter(SuffixConfig())

    def propose(name: str, text: list[int], new: int) -> list[int]:
        drafter.begin_step()
        if name not in drafter:
            drafter.open(name, text[: len(text) - new])
        drafter.extend(name, text[len(text) - new :])
        return drafter.propose(name, DRAFT_TOKENS).tokens

    return propose


def ngram_proposer(longest: int) -> Propose:
    """vLLM's own, as its model runner calls it for one row."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    proposer = NgramProposer(_config(longest))
    tokens, length = np.zeros((1, longest), dtype=np.int32), np.zeros(1, dtype=np.int32)

    # Compiled where it is first called with drafts.
    proposer.propose(DRAFT_TOKENS, [[1]], np.full(1, 9, dtype=np.int32), np.ones_like(tokens))

    def propose(_: str, text: list[int], new: int) -> list[int]:
        tokens[0, : len(text)] = text
        length[0] = len(text)
        drafts: list[list[int]] = proposer.propose(DRAFT_TOKENS, [text[-new:]], length, tokens)
        return drafts[0]

    return propose


def _config(longest: int) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=DRAFT_TOKENS
        ),
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


def measure_proposals(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """One row a kind of text and drafter: what was accepted, and microseconds a proposal with its upkeep."""
    rows = []
    for kind in KINDS:
        for name, make in (("suffix", suffix_proposer), ("vllm ngram", lambda: ngram_proposer(1024))):
            rows.append(
                {"case": "proposals", "text": kind, "drafter": name, **_replay(make(), kind, number, seed)}
            )
    return rows


def _replay(propose: Propose, kind: str, number: int, seed: int) -> dict[str, Any]:
    steps = output_tokens = drafted = accepted = 0
    spent_ns = 0
    for index, (prompt, output) in enumerate(texts(kind, number, seed)):
        done, new = 1, 1
        while done < len(output):
            begin = time.thread_time_ns()
            draft = propose(f"r{index}", prompt + output[:done], new)
            spent_ns += time.thread_time_ns() - begin
            right = next(
                (k for k, token in enumerate(draft) if output[done + k : done + k + 1] != [token]), len(draft)
            )
            drafted, accepted, steps = drafted + len(draft), accepted + right, steps + 1
            new = min(right + 1, len(output) - done)
            done += new
        output_tokens += len(output)
    return {
        "tokens_a_step": round(output_tokens / steps, 3),
        "drafted": drafted,
        "accepted_share": round(accepted / drafted, 3) if drafted else None,
        "us_per_proposal": round(spent_ns / steps / 1e3, 1),
    }
