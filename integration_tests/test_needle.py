"""The needle on stock vLLM, dense and sparse: what the model finds through torch the engine finds, too.

The sparse servers have room for two prompts, so that blocks change hands all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tiny_adapter import write_adapter

from penstock.benchmarks.asks import Ask, ask_together
from penstock.benchmarks.needle.answers import ServerScore, contexts, prompt_text, scores
from penstock.benchmarks.needle.checkpoint import shipped
from penstock.benchmarks.needle.model import NeedleShape
from penstock.benchmarks.needle.part import SERVING
from penstock.benchmarks.needle.served import sparse_engine
from penstock.benchmarks.needle.task import TASKS, make_prompt
from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import by_label, samples
from penstock.benchmarks.servers import Engine, Pair, engine_server, serving, serving_pair

LENGTH = 4097
"""One token more than whole blocks have, for ``ServerScore``."""
PROMPTS = 4
SEED = 3
"""Of prompts that the model answers with dense attention, every one."""
LAYERS = NeedleShape().layers
ADAPTERS = {"soft": 0.01, "loud": 1.0}
"""Names and sizes; the first changes no answer."""


@pytest.fixture(scope="module")
def needle(engine: Engine) -> Engine:
    return msgspec.structs.replace(engine, model=str(shipped()), name="needle")


@pytest.fixture(scope="module")
def sparse(needle: Engine) -> Engine:
    config = msgspec.structs.replace(SERVING, calibration_share=0.2)
    tight = msgspec.structs.replace(needle, kv_blocks=2 * 128 + 2, max_model_len=LENGTH + 31)
    return sparse_engine(tight, config)


@pytest.fixture(scope="module")
def dense_server(needle: Engine, logs: Path) -> Iterator[Server]:
    server = engine_server(needle, logs)
    with serving([server]):
        yield server


@pytest.fixture(scope="module")
def sparse_server(sparse: Engine, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [
        f"{name}={write_adapter(folder / name, 0, NeedleShape(), size=size)}"
        for name, size in ADAPTERS.items()
    ]
    lora = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", *adapters)
    server = engine_server(msgspec.structs.replace(sparse, arguments=(*sparse.arguments, *lora)), logs)
    with serving([server]):
        yield server


@pytest.fixture(scope="module")
def sparse_pair(sparse: Engine, logs: Path) -> Iterator[Pair]:
    # Each half is named after its role.
    with serving_pair(msgspec.structs.replace(sparse, name=None), "flowkv", logs) as pair:
        yield pair


@pytest.mark.parametrize("task", TASKS)
def test_both_servers_find_what_they_are_asked_for_and_sparse_loses_less_than_a_prompt(
    dense_server, sparse_server, needle, task
):
    dense, sparse = (
        scores(task, LENGTH, PROMPTS, SEED, ServerScore(server.url, needle.model, decoded=True))
        for server in (dense_server, sparse_server)
    )
    assert sum(dense) / len(dense) >= 0.95
    # P is a share of the mass, not of answers: a `tracking` prompt loses parts of its own here and there.
    assert sum(sparse) > sum(dense) - 1


def test_every_token_of_an_answer_came_out_of_a_sparse_step_and_metrics_say_so(sparse_server, needle):
    before = samples(sparse_server.url)
    (prompts,) = contexts("tracking", LENGTH, PROMPTS, SEED + 3)
    assert ServerScore(sparse_server.url, needle.model, decoded=True)(prompts) == [1.0] * len(prompts)
    found = samples(sparse_server.url)

    def added(name: str) -> float:
        # Reasons that never came up have no series.
        return found.get(f"penstock_sparse_{name}", 0.0) - before.get(f"penstock_sparse_{name}", 0.0)

    steps = LAYERS * sum(len(prompt.answer) for prompt in prompts)
    assert added("selections") + added("dense_selections") == steps
    assert added("selections") > 0.8 * steps
    assert 0.02 < added("pages_read") / added("pages") < 0.8
    # A fresh context; the last, partial block of each question has no summary.
    assert added("index_blocks") >= LAYERS * (LENGTH // 32)
    assert added("index_seconds") > 0
    mass = by_label(sparse_server.url, "penstock_sparse_attained_mass", "quantile")
    assert mass["0.5"] >= SERVING.mass
    assert mass["0.1"] >= SERVING.mass - 0.05
    assert set(by_label(sparse_server.url, "penstock_sparse_pages_read", "layer")) == {"0", "1", "2"}
    assert found["penstock_sparse_index_bytes"] < 0.1 * found["penstock_sparse_cache_bytes"]


def test_preempted_requests_still_find_their_needles(sparse_server, needle):
    before = samples(sparse_server.url)["vllm:num_preemptions_total"]
    # Two fill the cache, and all grow into another block while they answer.
    prompts = [make_prompt("multiquery", LENGTH - 3, SEED + 10 + number) for number in range(4)]
    asks = [
        Ask(name=str(number), prompt=prompt_text(prompt.tokens), max_tokens=len(prompt.answer))
        for number, prompt in enumerate(prompts)
    ]
    answers = ask_together(sparse_server.url, needle.model, asks, at_once=4)
    assert samples(sparse_server.url)["vllm:num_preemptions_total"] > before
    found = [prompt.score(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    assert found == [1.0] * 4


def test_adapters_have_blocks_and_summaries_of_their_own(sparse_server, needle):
    (prompts,) = contexts("crowded", LENGTH, PROMPTS, SEED + 2)
    base, soft, loud = (
        ServerScore(sparse_server.url, model, decoded=True) for model in (needle.model, *ADAPTERS)
    )
    # The loud one's keys stand where the others' stood, and theirs where its.
    for prompt in prompts[:3]:
        assert soft([prompt]) == [1.0]
        assert loud([prompt]) == [0.0]
        assert base([prompt]) == [1.0]


@pytest.mark.parametrize("task", ["multiquery", "crowded", "tracking"])
def test_needles_are_found_in_kv_that_flowkv_brought(sparse_pair, needle, task):
    asked = list(contexts(task, LENGTH, 2 * PROMPTS, SEED + 3))
    before = samples(sparse_pair.decode.url)
    score = ServerScore(sparse_pair.url, needle.model)
    found = [one for prompts in asked for one in score(prompts)]
    assert found == [1.0] * len(found)
    after = samples(sparse_pair.decode.url)

    def added(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert added("vllm:flowkv_xfer_time_seconds_count") == len(found)
    tokens = sum(len(prompt.answer) for prompts in asked for prompt in prompts)
    # The prefill server says the first one.
    assert added("penstock_sparse_selections") >= 0.5 * LAYERS * (tokens - len(found))
    assert added("penstock_sparse_index_blocks") >= LAYERS * len(asked) * (LENGTH // 32)
