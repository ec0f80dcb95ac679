"""Ranks decide the same: SGLang's real scheduler twice, in processes whose clocks and hashes differ, told the
same requests and times."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "sglang_stepped.py"
RANKS = (1, 2)
TARGETS = [(200.0, 20.0), (800.0, 50.0), (3000.0, 100.0), (60000.0, 250.0), (None, None)]


def crowd(seed: int, number: int = 80) -> list[list[Any]]:
    """Requests of a dozen clients, more than can run at a time; one in ten has a long prompt."""
    draw = random.Random(seed)
    at_s, asks = 0.0, []
    for index in range(number):
        at_s += draw.expovariate(1 / 0.02)
        prompt = draw.randint(20, 900) if draw.random() > 0.1 else draw.randint(2000, 4000)
        client = draw.choice(["ann", "bob", "eve", *(f"guest {n}" for n in range(9))])
        output = 1 + int(draw.expovariate(1 / 40))
        asks.append([f"{client}-{index}", at_s, prompt, output, *draw.choice(TARGETS)])
    return asks


SHAPE = {"kv_tokens": 12_000, "chunked_prefill_size": 1024, "max_running_requests": 24}
SLO = {"policy": "slo", "slo": {"profile": "a100-7b"}}
RUNS = {
    name: {"section": section, "shape": shape, "asks": crowd(3), "families": 5, "shared_clock": True}
    for name, section, shape in (
        # Ageing that outweighs most prefixes, and clients that are soon forgotten: time decides much.
        ("dlpm", {"policy": "dlpm", "quantum_tokens": 500, "ageing_tokens_per_s": 3000}, SHAPE),
        ("vtc", {"policy": "vtc", "client_idle_s": 0.05, "newcomers_per_refill": 2}, SHAPE),
        ("slo", SLO, {**SHAPE, "mixed_chunk": True}),
    )
}
for name in ("dlpm", "vtc"):
    RUNS[name]["retract_every"] = 10
# What one rank decides that reads the time whenever it wants to know.
ALONE = {"slo, alone": {**RUNS["slo"], "shared_clock": False, "unstamped": True}}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    asked = [{**RUNS, **ALONE}, RUNS]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            text=True,
        )
        for seed in RANKS
    ]
    for one, runs in zip(started, asked, strict=True):
        one.stdin.write(json.dumps(list(runs.values())))
        one.stdin.close()
        one.stdin = None
    found = []
    for one, runs in zip(started, asked, strict=True):
        out, err = one.communicate(timeout=400)
        assert one.returncode == 0, err[-4000:]
        found.append(dict(zip(runs, json.loads(out.splitlines()[-1]), strict=True)))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_ranks_decide_the_same_in_every_pass(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert len(first["decided"]) > len(RUNS[name]["asks"])
    passes = enumerate(zip(first["decided"], second["decided"], strict=False))
    assert next((place for place, (one, other) in passes if one != other), None) is None
    assert first == second


def test_times_that_ranks_share_say_what_a_clock_does(ranks):
    """A step is over when the next pass begins, so nothing is learned or noted otherwise."""
    shared, alone = ranks[0]["slo"], ranks[0]["slo, alone"]
    assert shared["decided"] == alone["decided"]
    assert shared["counted"] == alone["counted"]
