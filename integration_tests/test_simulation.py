"""The simulation against a real engine: the same trace, the same admissions, the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from stepped_engine import OVERLAP, Record, simulated, trace

ENGINE = Path(__file__).with_name("stepped_engine.py")
LONGEST_S = 600


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def overlap(request: pytest.FixtureRequest) -> bool:
    """Whether steps are chosen while the one before runs."""
    return bool(request.param)


@pytest.fixture(scope="module")
def real(model: str, overlap: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The trace through one engine, under each policy, in a process of its own."""
    result = tmp_path_factory.mktemp("stepped") / "steps.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(ENGINE), model, str(result), *([OVERLAP] if overlap else [])],
        env=environment,
        timeout=LONGEST_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    return {
        policy: Record(
            [[tuple(row) for row in rows] for rows in record["steps"]],
            record["preempted"],
            record["laid_out"],
        )
        for policy, record in found.items()
    }


@pytest.mark.parametrize("policy", ["fcfs", "dlpm"])
def test_a_real_engine_admits_in_the_same_order_and_computes_the_same_in_every_step(real, overlap, policy):
    expected, found = real[policy], simulated(policy, overlap)
    assert found.admissions == expected.admissions
    for number, (one, other) in enumerate(zip(found.steps, expected.steps, strict=True)):
        assert one == other, f"step {number}"
    assert found.preempted == expected.preempted


def test_most_plans_are_laid_out_while_a_real_engine_computes_the_step_before(real):
    assert real["slo"].laid_out > len(real["slo"].steps) / 2
    assert real["fcfs"].laid_out == real["dlpm"].laid_out == 0


def test_the_trace_tells_policies_apart_and_strains_the_engine(real):
    fcfs, dlpm = real["fcfs"], real["dlpm"]
    assert sorted(fcfs.admissions) == sorted(dlpm.admissions) == sorted(ask.request_id for ask in trace())
    assert fcfs.admissions != dlpm.admissions
    for record in (fcfs, dlpm):
        starts = {name: start for rows in reversed(record.steps) for name, start, _ in rows}
        assert any(start > 0 for start in starts.values()), "no prefix was cached"
        assert any(record.preempted), "nobody was preempted"
        chunks = Counter(name for rows in record.steps for name, _, tokens in rows if tokens > 1)
        assert max(chunks.values()) > 1, "no prompt was cut in chunks"
