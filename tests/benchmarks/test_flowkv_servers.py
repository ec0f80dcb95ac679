"""Hand-over between servers, and throughput ratios, without an engine."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from penstock.benchmarks import flowkv_digest, flowkv_off, flowkv_serving
from penstock.benchmarks.flowkv_serving import OURS, STOCK, HandOver, HandOverError
from penstock.benchmarks.scrape import Transfers

PARAMS = {"do_remote_prefill": True, "remote_host": "there"}


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does: parameters to a prefill, a stream of tokens to who brings them."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.send_response(self.server.status)
        self.end_headers()
        if not body.get("stream"):
            self.wfile.write(json.dumps({"kv_transfer_params": PARAMS}).encode())
            return
        for ids in self.server.tokens:
            self.wfile.write(b"data: " + json.dumps({"choices": [{"token_ids": ids}]}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def engine():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    server.bodies, server.tokens, server.status = [], [[], [5, 6], [7]], 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_a_hand_over_brings_the_prefill_servers_parameters_to_the_decode_server(engine):
    took = flowkv_serving.hand_over(url(engine), url(engine), "m", [9, 9, 9])
    prefill, decode = engine.bodies
    assert (prefill["max_tokens"], prefill["kv_transfer_params"]["do_remote_decode"]) == (1, True)
    assert (decode["prompt"], decode["kv_transfer_params"]) == ([9, 9, 9], PARAMS)
    assert took.token_ids == (5, 6, 7)
    assert 0 < took.hand_over_s < took.first_token_s


def test_an_answer_without_a_token_is_an_error(engine):
    engine.tokens = [[]]
    with pytest.raises(HandOverError, match="without a token"):
        flowkv_serving.hand_over(url(engine), url(engine), "m", [1])


def test_a_refusal_is_an_error_with_its_text(engine):
    engine.status = 400
    with pytest.raises(HandOverError, match=r"answered 400: .*remote_host"):
        flowkv_serving.hand_over(url(engine), url(engine), "m", [1])


def test_each_length_has_a_warm_up_first_and_no_two_prompts_are_alike():
    asked = flowkv_serving.prompts((16, 32), 5, seed=1, vocabulary=50)
    assert [len(p) for p in asked[:2]] == [16, 32]
    assert sorted(len(p) for p in asked[2:]) == [16] * 5 + [32] * 5
    assert len({tuple(p) for p in asked}) == len(asked)
    assert {i for p in asked for i in p} <= set(range(flowkv_serving.SPECIAL_IDS, 50))


def test_prompts_keep_to_the_tokens_that_the_model_knows(tmp_path):
    from penstock.benchmarks.tiny_model import TinyLlama, write_model

    write_model(tmp_path, TinyLlama(vocabulary=400))
    config = json.loads((tmp_path / "config.json").read_text())
    assert flowkv_serving.vocabulary(str(tmp_path)) == config["vocab_size"] <= 400


def test_serving_claims_compare_prompt_with_prompt():
    def took(*seconds, last=1):
        return [HandOver(s, 2 * s, (1, last)) for s in seconds]

    samples = {(OURS, 64): took(1.0, 3.0, 9.0), (STOCK, 64): took(2.0, 6.0, 3.0)}
    values = {c.name.split(": ")[1]: c.value for c in flowkv_serving.claims_of(samples, [64])}
    assert values == {
        "hand-over, FlowKV to NixlConnector": 0.5,
        "TTFT, FlowKV to NixlConnector": 0.5,
        "answers equal": 3,
    }
    samples[OURS, 64] = took(1.0, 3.0, 9.0, last=2)
    assert not flowkv_serving.claims_of(samples, [64])[-1].holds
    moved = {OURS: Transfers(count=2, descriptors=4), STOCK: Transfers()}
    rows = flowkv_serving.rows_of(samples, [64], moved)
    assert [(r["connector"], r["descriptors each"], r["tokens equal"]) for r in rows] == [
        (OURS, 2.0, 0),
        (STOCK, None, 0),
    ]


def test_throughput_ratios_are_taken_round_by_round():
    found = flowkv_off.Rounds([100.0, 50.0, 200.0], [100.0, 51.0, 199.0])
    assert found.ratios == [1.0, 50 / 51, 200 / 199]
    assert found.noise >= 0.01


def test_noise_grows_with_the_spread():
    wild = flowkv_off.Rounds([80.0, 120.0, 100.0, 140.0], [100.0] * 4)
    assert wild.noise > 0.2


def test_the_server_without_plugins_differs_in_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr("penstock.benchmarks.servers.console_script", lambda name: name)
    servers = [
        flowkv_off.plain_server("m", name, tmp_path) for name in (flowkv_off.INSTALLED, flowkv_off.WITHOUT)
    ]
    installed, without = (
        {k: v for k, v in s.environment.items() if not k.startswith("VLLM_NIXL")} for s in servers
    )
    assert without == installed | flowkv_off.NO_PLUGIN
    commands = [[a for a in s.command if a != str(s.port.number)] for s in servers]
    assert commands[0] == commands[1]
    assert "--kv-transfer-config" not in commands[0]
    for server in servers:
        server.stop()


def test_the_prefill_bound_counts_the_tiny_models_own_weights(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    from penstock.benchmarks.tiny_model import TinyLlama, write_model

    write_model(tmp_path, TinyLlama())
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    projections = sum(t.size for name, t in tensors.items() if "_proj" in name)
    assert flowkv_digest.tiny().weights == projections
