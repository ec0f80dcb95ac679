"""The needle on stock vLLM: what the trained model finds through torch it finds through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.benchmarks.needle.answers import ServerScore, accuracy
from penstock.benchmarks.needle.checkpoint import shipped
from penstock.benchmarks.needle.task import TASKS
from penstock.benchmarks.servers import Engine, engine_server, serving

LENGTH = 4096


@pytest.fixture(scope="module")
def score(engine: Engine, logs: Path) -> Iterator[ServerScore]:
    needle = msgspec.structs.replace(engine, model=str(shipped()), name="needle")
    server = engine_server(needle, logs)
    with serving([server]):
        yield ServerScore(server.url, needle.model)


@pytest.mark.parametrize("task", TASKS)
def test_dense_attention_finds_what_it_is_asked_for(score, task):
    assert accuracy(task, LENGTH, 4 if task == "single" else 2, 7, score) >= 0.95
