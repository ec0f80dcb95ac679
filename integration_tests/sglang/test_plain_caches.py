"""A model whose cache sparse attention and FlowKV cannot work on is refused before it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang import plain_caches, transfer_backend

SHAPE = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GEMMA = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **WINDOWS}
MLA = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **LATENT}
STEP = {"architectures": ["Step3p5ForCausalLM"], "model_type": "llama", **WINDOWS}
STATES = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
}


def checkpoint(folder: Path, model: dict[str, Any]) -> str:
    """A model of which there is a configuration, and nothing to load."""
    (folder / "config.json").write_text(json.dumps({**SHAPE, **model}), encoding="utf-8")
    return str(folder)


def settings(folder: Path, model: dict[str, Any], **named: Any) -> ServerArgs:
    path = checkpoint(folder, model)
    return ServerArgs(model_path=path, device="cpu", attention_backend="torch_native", **named)


def resolve(given: ServerArgs) -> None:
    plain_caches.resolve_once(ServerArgs.resolve_once, given, "--thing")


@pytest.mark.parametrize(
    ("model", "named"),
    [(PLAIN, {}), (GEMMA, {}), (STEP, {"disable_hybrid_swa_memory": True})],
    ids=["plain", "windows that SGLang keeps in one pool", "windows that were asked to be"],
)
def test_a_model_of_one_plain_pool_is_let_through(tmp_path, model, named):
    given = settings(tmp_path, model, page_size=16, **named)
    resolve(given)
    given.resolve_once()


@pytest.mark.parametrize(
    ("model", "named", "reason"),
    [
        (MLA, {"page_size": 16}, "a model with MLA, allowed: MHA and GQA"),
        (STEP, {"page_size": 16}, "sliding windows, allowed: .* --disable-hybrid-swa-memory"),
        (STATES, {"disable_radix_cache": True}, r"a model with states \(Mamba, linear attention\), allowed"),
    ],
    ids=["MLA", "a pool of windows", "states"],
)
def test_another_cache_is_refused_by_what_it_is(tmp_path, model, named, reason):
    with pytest.raises(ConfigurationError, match=f"^--thing: given {tmp_path}, .*{reason}"):
        resolve(settings(tmp_path, model, **named))


def test_flowkv_refuses_for_itself_alone(tmp_path):
    transfer = {"disaggregation_mode": "decode", "page_size": 16}
    nixl = settings(tmp_path, MLA, disaggregation_transfer_backend="nixl", **transfer)
    transfer_backend.resolve_once(ServerArgs.resolve_once, nixl)
    ours = settings(tmp_path, MLA, disaggregation_transfer_backend="flowkv", **transfer)
    with pytest.raises(ConfigurationError, match=r"^--disaggregation-transfer-backend flowkv: .*MLA"):
        transfer_backend.resolve_once(ServerArgs.resolve_once, ours)


COMMAND_LINE = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
prepare_server_args(sys.argv[1:]).resolve_once()
print("went on")
"""


def test_a_command_line_ends_with_one_line(tmp_path):
    words = ["--model-path", checkpoint(tmp_path, MLA), "--device", "cpu", "--attention-backend", "tactic"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINE, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert (done.returncode, "went on" in done.stdout) == (2, False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penstock: error:")]
    assert "--attention-backend tactic: given" in line
    assert "a model with MLA" in line
    assert "Traceback" not in done.stderr
