"""``sglang.Engine`` takes no options of plugins: ``PENSTOCK_CONFIG`` asks for a policy there, and for sparse
attention, whose settings of SGLang's it brings along."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.plugins.askings import ForgivingReader
from penstock.schedulers.config import SchedulerConfig

PROMPT = list(range(20, 60))
TOKENS = 6
ASKED = {
    "scheduler": {"policy": "vtc"},
    # Every page, so that the tokens are those of dense attention.
    "sparse_attention": {
        "least_tokens": 16,
        "dense_layers": 0,
        "budget": 1.0,
        "most_share": 1.0,
        "log_steps": 4,
    },
}

# SGLang starts its processes anew, and they import the program.
PROGRAM = """
import json, sys, time

def had(client):
    from prometheus_client import CollectorRegistry, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    labels = {"engine": "0", "client": client}
    return registry.get_sample_value("penstock_client_output_tokens", labels)

def main():
    from sglang import Engine
    engine = Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", max_total_tokens=4000, sleep_on_idle=True,
        log_level="info", enable_metrics=True,
    )
    def ask(client):
        sampling = {"temperature": 0, "max_new_tokens": %d, "ignore_eos": True}
        sampling["custom_params"] = {"client_id": client}
        return engine.generate(input_ids=%r, sampling_params=sampling)
    try:
        ask(5)
    except ValueError as error:
        refused = str(error)
    ids = ask("alice")["output_ids"]
    until = time.monotonic() + 60
    while had("alice") != len(ids) and time.monotonic() < until:
        time.sleep(0.05)
    print(json.dumps({"ids": ids, "refused": refused, "had": had("alice")}))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def test_a_program_asks_by_the_variable(model: str, greedy, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM % (TOKENS, PROMPT))
    done = subprocess.run(
        [sys.executable, str(program), model],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PENSTOCK_CONFIG": json.dumps(ASKED)},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == greedy(PROMPT, TOKENS)
    assert found["had"] == TOKENS, "the client's name came to the scheduler"
    assert "client_id: given 5" in found["refused"]
    assert "penstock: waiting requests are ordered by vtc" in done.stdout + done.stderr
    assert "penstock: sparse attention: read 100.0 % of pages in" in done.stdout + done.stderr


def test_a_grpc_request_names_its_client_as_others_do():
    """SGLang's servicer for gRPC hands ``custom_params`` on to the scheduler."""
    servicer = pytest.importorskip("smg_grpc_servicer.sglang.servicer")
    from smg_grpc_proto import sglang_scheduler_pb2 as messages

    given = messages.SamplingParams(max_new_tokens=1, n=1)
    given.custom_params.update({"client_id": "alice", "weight": 2})
    made = servicer.SGLangSchedulerServicer._convert_sampling_params(object(), given)
    reader = ForgivingReader(SchedulerConfig(policy="dlpm"), logging.getLogger("test"))
    asking = reader.read("r", made.custom_params)
    assert (asking.client, asking.weight) == ("alice", 2.0)
