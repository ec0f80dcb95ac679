"""The short proof for one engine version: doctor is content, and two stock servers hand a request over."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request

import pytest

from penstock.benchmarks.servers import console_script
from penstock.plugins.vllm.features import FEATURES

PROMPT = "Water enters the gate and turns the wheel below. " * 12


def complete(url: str, model: str) -> dict:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def test_doctor_finds_every_feature_ready():
    command = [console_script("penstock"), "doctor", "--json", "--require", "flowkv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["engine"]["version"] == os.environ.get("PENSTOCK_UPSTREAM", report["engine"]["version"])
    states = {feature["name"]: feature["state"] for feature in report["features"]}
    # vLLM 0.30 keeps the requests that a plan must know of in other places.
    missing = {"slo-scheduler"} if report["engine"]["version"].startswith("0.30.") else set()
    assert states == {name: "off" if name in missing else "ready" for name in FEATURES}
    assert {problem["feature"] for problem in report["problems"]} == missing


@pytest.mark.parametrize("start", [["vllm"], ["python", "-m", "vllm.entrypoints.cli.main"]], ids=" ".join)
def test_command_starts_whatever_the_distribution_is_called(start):
    command = [console_script(start[0]), *start[1:], "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("0.")


def test_request_prefilled_on_one_server_decodes_on_the_other(flowkv_pair, model):
    handed_over = complete(flowkv_pair.url, model)
    assert metric(flowkv_pair.decode.url, "flowkv_bytes_transferred_sum") > 0
    assert metric(flowkv_pair.decode.url, "flowkv_num_failed_transfers_total") == 0
    alone = complete(flowkv_pair.decode.url, model)
    assert handed_over["choices"][0]["text"] == alone["choices"][0]["text"]
    assert handed_over["usage"]["prompt_tokens"] > 64
