"""FlowKV in the set-ups that users have: tensor parallelism, MultiConnector, a shared key, one process."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_pair import Pair, ask, failed_cleanly, token_ids, tokens

from penstock.benchmarks.processes import Server, wait_until_ready
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, engine_server
from penstock.benchmarks.tiny_model import ensure_model

pytestmark = pytest.mark.engine

REFUSED = "vllm:flowkv_num_failed_handshakes_total"


FEW_CORES = {"PYTHONPATH": str(Path(__file__).parent / "few_cores")}


def server(
    role: str,
    name: str,
    logs: Path,
    *arguments: str,
    connector: str | None = "flowkv",
    environment: dict[str, str] | None = None,
) -> Server:
    spec = Engine(
        model=str(ensure_model()),
        role=role,
        connector=connector,
        name=name,
        arguments=arguments,
        environment=environment or {},
    )
    return engine_server(spec, logs)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("setups")


@pytest.fixture(scope="module")
def parallel(logs) -> Iterator[Pair]:
    """Two ranks on each side, and a shared key for the control channel."""
    more = (
        "--tensor-parallel-size",
        "2",
        "--distributed-executor-backend",
        "mp",
        "--additional-config",
        json.dumps({"penstock": {"flowkv": {"shared_key": "known to both"}}}),
    )
    with (
        server("prefill", "tp-prefill", logs, *more, environment=FEW_CORES) as prefill,
        server("decode", "tp-decode", logs, *more, environment=FEW_CORES) as decode,
    ):
        wait_until_ready([prefill, decode], timeout_s=600)
        yield Pair(str(ensure_model()), prefill, decode)


def test_every_rank_pulls_from_its_peer(parallel):
    for seed, length in enumerate((5, 64, 1500)):
        prompt = tokens(700 + seed, length)
        assert token_ids(parallel.decode_with(prompt, parallel.prefill_params(prompt))) == parallel.reference(
            prompt
        )
    parallel.await_idle(parallel.prefill)
    parallel.await_idle(parallel.decode)
    assert samples(parallel.decode.url)["vllm:flowkv_num_descriptors_count"] == 6


def test_a_server_without_the_key_and_of_another_degree_is_refused(parallel, logs):
    with server("decode", "stranger", logs) as stranger:
        wait_until_ready([stranger])
        mixed = Pair(parallel.model, parallel.prefill, stranger)
        prompt = tokens(710, 200)
        assert failed_cleanly(mixed.decode_with(prompt, mixed.prefill_params(prompt)))
        log = stranger.log.read_text()
        assert "tensor_parallel_size is 1 here and 2 at the prefill server" in log
        assert token_ids(mixed.decode_with(prompt, None)) == parallel.reference(prompt)


def multi(role: str, storage: Path) -> tuple[str, ...]:
    children = [
        {"kv_connector": "flowkv", "kv_role": role},
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(storage)},
        },
    ]
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"connectors": children},
    }
    return "--kv-transfer-config", json.dumps(config)


def test_f18_flowkv_beside_another_connector(logs, tmp_path):
    """F18: as one child of vLLM's MultiConnector; each child does its part, what FlowKV moved is right."""
    with (
        server(
            "prefill", "multi-prefill", logs, *multi("kv_producer", tmp_path / "p"), connector=None
        ) as prefill,
        server(
            "decode", "multi-decode", logs, *multi("kv_consumer", tmp_path / "d"), connector=None
        ) as decode,
    ):
        wait_until_ready([prefill, decode])
        pair = Pair(str(ensure_model()), prefill, decode)
        for seed in range(3):
            prompt = tokens(720 + seed, 600)
            answer = pair.decode_with(prompt, pair.prefill_params(prompt))
            assert token_ids(answer) == pair.reference(prompt)
        pair.await_idle(prefill)
        pair.await_idle(decode)


@pytest.fixture(scope="module")
def crowded(logs) -> Iterator[Pair]:
    """Pools that hold about three prompts."""
    few = ("--num-gpu-blocks-override", "80", "--max-model-len", "2048")
    with (
        server("prefill", "crowded-prefill", logs, *few) as prefill,
        server("decode", "crowded-decode", logs, *few) as decode,
    ):
        wait_until_ready([prefill, decode])
        yield Pair(str(ensure_model()), prefill, decode)


def test_f17_pools_too_small_for_all_at_once_delay_and_never_lose(crowded):
    """F17: prompts wait for leased blocks, decodes wait or are preempted; every answer is right."""
    prompts = [tokens(740 + i, 500 + 37 * i) for i in range(12)]
    expected = [token_ids(ask(crowded.prefill, crowded.body(p, max_tokens=150))) for p in prompts]

    def one(prompt: list[int]) -> list[int]:
        return token_ids(crowded.decode_with(prompt, crowded.prefill_params(prompt), max_tokens=150))

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(one, prompts)) == expected
    crowded.await_idle(crowded.prefill)
    crowded.await_idle(crowded.decode)


ONE_PROCESS = """
import sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
llm = LLM(
    model=sys.argv[1], dtype="float32", max_model_len=2048, enforce_eager=True, block_size=32,
    kv_transfer_config=KVTransferConfig(kv_connector="flowkv", kv_role="kv_both"),
)
out = llm.generate({"prompt_token_ids": [5, 6, 7] * 30}, SamplingParams(max_tokens=4, temperature=0))
assert len(out[0].outputs[0].token_ids) == 4
print("generated")
"""


def test_llm_takes_the_connector_as_an_argument(tmp_path):
    script = tmp_path / "script.py"
    body = textwrap.indent(ONE_PROCESS.strip(), "    ")
    script.write_text(f"def main():\n{body}\n\n\nif __name__ == '__main__':\n    main()\n")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(ensure_model())],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "generated" in done.stdout, done.stderr[-3000:]
