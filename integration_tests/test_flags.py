"""The one flag on the real command and in the offline engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from penstock.benchmarks.servers import Engine, console_script, engine_server, serving

NIXL = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})


def refused(command: list[str]) -> str:
    """The one line with which a command ends."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_contradiction_stops_the_command_in_one_line(model):
    line = refused(
        [console_script("vllm"), "serve", model, "--kv-connector", "flowkv", "--kv-transfer-config", NIXL]
    )
    assert line.endswith(
        "--kv-connector flowkv contradicts --kv-transfer-config, where kv_connector is NixlConnector"
    )


RENAMED = """
import sys
from vllm.entrypoints.cli.main import main
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue as Queue
Queue.pop_left_n = Queue.popleft_n
del Queue.popleft_n
sys.argv = ["vllm", "serve", sys.argv[1], "--kv-connector", "flowkv"]
main()
"""


def test_renamed_upstream_symbol_stops_start_up_in_one_line(model):
    line = refused([sys.executable, "-c", RENAMED, model])
    assert "flowkv cannot be applied to vllm" in line
    assert line.endswith("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.popleft_n: not found")


OFFLINE = """
import sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    config = KVTransferConfig(kv_connector="flowkv", kv_role="kv_both")
    llm = LLM(model=sys.argv[1], kv_transfer_config=config, enforce_eager=True, max_model_len=512,
              num_gpu_blocks_override=64, block_size=32)
    (answer,) = llm.generate("The gate opens", SamplingParams(max_tokens=4, temperature=0))
    print("tokens:", len(answer.outputs[0].token_ids))
"""


def test_offline_engine_takes_the_name(engine: Engine, tmp_path: Path):
    server = engine_server(engine, tmp_path)  # for its environment only
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    done = subprocess.run(
        [sys.executable, str(script), engine.model],
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
        env={**os.environ, **server.environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "tokens: 4" in done.stdout.splitlines()
    assert "flowkv is active" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def yaml_server(engine: Engine, logs: Path):
    config = logs / "serve.yaml"
    config.write_text("kv-connector: flowkv\nkv-role: kv_both\nflowkv-lease-s: 20\n")
    variant = msgspec.structs.replace(engine, name="yaml", arguments=("--config", str(config)))
    server = engine_server(variant, logs)
    with serving([server]):
        yield server


def test_server_configured_by_yaml_shows_what_is_active_in_every_process(yaml_server):
    with urllib.request.urlopen(f"{yaml_server.url}/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    (row,) = [
        line
        for line in metrics.splitlines()
        if line.startswith("penstock_feature_info{") and "flowkv" in line
    ]
    assert 'engine="vllm"' in row
    assert 'state="active"' in row
    assert row.endswith(" 1.0")
    log = yaml_server.log.read_text()
    for process in ("EngineCore", "Worker"):
        assert any(process in line and "flowkv is active" in line for line in log.splitlines()), process
    assert "Using BLHNC KV cache layout." in log
