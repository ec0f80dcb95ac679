"""Request scheduling in the set-ups that users have: a FlowKV pair behind the proxy, and ``LLM``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from engine_pair import eventually, tokens

from penstock.benchmarks.processes import Server
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, Pair, serving_pair

BLOCK = 32


@pytest.fixture(scope="module")
def fair_pair(engine: Engine, logs: Path) -> Iterator[Pair]:
    """FlowKV and DLPM on both sides of a pair."""
    fair = msgspec.structs.replace(engine, name="fair", arguments=("--request-scheduler", "dlpm"))
    with serving_pair(fair, "flowkv", logs) as pair:
        yield pair


def answered(url: str, model: str, prompt: list[int], **more: Any) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json={**body, **more}, timeout=120)
    answer.raise_for_status()
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def had(server: Server, what: str, client: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    series = f'penstock_client_{what}_tokens{{client="{client}",'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


def test_each_side_of_a_pair_charges_what_it_computes_and_nothing_that_it_loads(
    fair_pair, plain_server, model
):
    prompts = [tokens(800 + number, 300 + 40 * number) for number in range(4)]
    for prompt in prompts:
        found = answered(fair_pair.url, model, prompt, vllm_xargs={"client_id": "ada"})
        assert found == answered(plain_server.url, model, prompt)
    eventually("output is counted", lambda: had(fair_pair.decode, "output", "ada") > 0)
    computed = sum(map(len, prompts))
    assert had(fair_pair.prefill, "extend", "ada") == computed
    assert had(fair_pair.prefill, "output", "ada") == len(prompts)
    # The last token of a prompt is computed by whoever samples after it.
    assert had(fair_pair.decode, "extend", "ada") <= BLOCK * len(prompts)
    assert 7 * len(prompts) <= had(fair_pair.decode, "output", "ada") <= 8 * len(prompts)
    transfers = samples(fair_pair.decode.url)["vllm:flowkv_xfer_time_seconds_count"]
    assert transfers == len(prompts)


LLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    llm = LLM(
        model=sys.argv[1], dtype="float32", max_model_len=2048, enforce_eager=True, max_num_seqs=2,
        scheduler_cls="penstock.plugins.vllm.request_scheduler.make_scheduler",
        additional_config={"penstock": {"scheduler": {"policy": "vtc", "weights": {"gold": 4}}}},
    )
    clients = ["gold", "iron", "gold", "iron"]
    params = [
        SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, extra_args={"client_id": client})
        for client in clients
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in json.loads(sys.argv[2])]
    outs = llm.generate(prompts, params)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.check_integrity()
    rows = scheduler.waiting.order.clients()
    print("RESULT", json.dumps({
        "scheduler": type(scheduler).__name__,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "had": {row.client: [row.extend_tokens, row.output_tokens] for row in rows},
    }))

if __name__ == "__main__":
    main()
"""


def test_llm_takes_the_scheduler_and_its_configuration_as_arguments(plain_server, model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LLM_SCRIPT)
    prompts = [tokens(850 + number, 60 + 10 * number) for number in range(4)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The scheduler in this process, where it can be asked.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, str(script), model, json.dumps(prompts)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["scheduler"] in ("SyncRequestScheduler", "AsyncRequestScheduler")
    assert found["tokens"] == [answered(plain_server.url, model, p, ignore_eos=True) for p in prompts]
    assert found["had"]["gold"] == [60 + 80, 16]
    assert found["had"]["iron"] == [70 + 90, 16]
