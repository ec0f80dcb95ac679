"""What the bench of served sparse attention says of its pairs, its contexts, and the time of a server."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.benchmarks.asks import AskError
from penstock.benchmarks.decode_pairs import Between, Decoded, decode_in_turns, engine_cpu_s
from penstock.benchmarks.processes import Port, Server, wait_until_ready
from penstock.benchmarks.sparse_served import Case, claims, told_since, topic_tokens
from penstock.benchmarks.tiny_model import SPECIAL_TOKENS, TinyLlama, ensure_model

# A leader with a child that has burned two hundredths of a second; the leader itself burns a tenth.
GROUP = """
import subprocess, sys, time
burn = "import sys, time\\nwhile time.process_time() < 0.02: pass\\nprint(flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-S", "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
while time.process_time() < 0.1: pass
print("done", flush=True)
sys.stdin.read()
"""

# Answers a completion with as many tokens as the second argument says.
ANSWER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": [1] * int(sys.argv[2])}
        usage = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
        told = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
        body = json.dumps(told | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def answering(tmp_path: Path, name: str, tokens: int) -> Server:
    port = Port.reserve()
    command = [sys.executable, "-c", ANSWER, str(port.number), str(tokens)]
    return Server(name=name, command=command, port=port, log=tmp_path / f"{name}.log")


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_an_interval_is_the_narrowest_by_order_that_is_sure(values):
    found = Between.of(values)
    ordered, count = sorted(values), len(values)

    def confidence(rank: int) -> float:
        return 1 - 2 * sum(comb(count, left) for left in range(rank)) / 2**count

    # Rank k (from 1): the k-th smallest and the k-th largest.
    sure = [rank for rank in range(1, (count + 1) // 2 + 1) if confidence(rank) >= 0.95]
    best = max(sure, default=1)
    assert (found.low, found.high) == (ordered[best - 1], ordered[-best])
    assert found.low <= found.median <= found.high


def case(dense: float, sparse: float, tokens: int = 4096) -> Case:
    both = ([Decoded(speed, 1000 / speed)] * 6 for speed in (dense, sparse))
    return Case("flat", tokens, *both, told={})


def test_three_percent_slower_is_allowed_and_four_are_not():
    found = claims([case(100, 97.5), case(100, 96, 8192), case(10, 30, 16384)])
    assert [claim.holds for claim in found] == [True, True, False, False, True, True]
    assert [claim.value for claim in found][::2] == pytest.approx([0.975, 0.96, 3.0])


def test_a_row_has_ratios_above_one_where_sparse_is_faster_by_either_measure():
    row = case(10, 20).cells()
    assert (row["speed"], row["CPU"], row["CPU ms dense"]) == pytest.approx((2.0, 2.0, 100.0))


def test_a_longer_context_begins_with_a_shorter_one_and_has_runs_of_ordinary_tokens():
    long = topic_tokens(4000, seed=3)
    assert topic_tokens(1000, seed=3) == long[:1000]
    assert topic_tokens(1000, seed=4) != long[:1000]
    assert min(long) >= len(SPECIAL_TOKENS)
    changes = sum(a != b for a, b in pairwise(long))
    assert 4000 / 16 * 0.7 < changes < 4000 / 16 * 1.3


def test_counts_are_of_the_time_between_two_looks():
    before = {"selections": 10.0, "pages": 100.0, "pages_read": 90.0, "selection_seconds": 1.0}
    before |= {"dense: short context": 7.0, "dense: nothing saved": 2.0}
    after = {"selections": 20.0, "pages": 200.0, "pages_read": 120.0, "selection_seconds": 1.02}
    after |= {"dense: short context": 7.0, "dense: nothing saved": 5.0}
    found = told_since(before, after)
    assert found["read"] == 0.3
    assert found["each ms"] == pytest.approx(2.0)
    assert found["dense"] == "nothing saved 3"


def test_a_server_that_chose_nothing_says_so():
    found = told_since({}, {})
    assert (found["chosen"], found["read"], found["dense"]) == (0.0, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_time_of_a_server_is_that_of_its_group_but_its_leader():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", GROUP], start_new_session=True, **pipes) as leader:
        leader.stdout.readline()
        found = engine_cpu_s(leader.pid)
        assert engine_cpu_s(leader.pid + 1_000_000_000) == 0
        assert 0.02 <= found < 0.1
        leader.stdin.close()


def test_servers_that_took_turns_have_answered_and_go_on(tmp_path):
    servers = [answering(tmp_path, name, 4) for name in ("one", "two")]
    with servers[0], servers[1]:
        wait_until_ready(servers)
        found = decode_in_turns(servers, "m", [1, 2, 3], 4)
        assert len(found) == 2
        assert all(one.tokens_s > 0 for one in found)
        assert all(server.ready() for server in servers)


def test_a_short_answer_is_an_error_and_leaves_no_server_standing_still(tmp_path):
    servers = [answering(tmp_path, "whole", 4), answering(tmp_path, "short", 3)]
    with servers[0], servers[1]:
        wait_until_ready(servers)
        with pytest.raises(AskError, match="3 tokens came of 4"):
            decode_in_turns(servers, "m", [1, 2, 3], 4)
        assert all(server.ready() for server in servers)


def test_attention_is_as_wide_as_it_is_told_to_be(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy", reason="comes with an engine").load_file
    spec = TinyLlama(layers=1, spread=0.02, embedding_spread=1.0, attention_spread=4.0)
    weights = load_file(ensure_model(spec, cache=tmp_path) / "model.safetensors")
    rows = weights["model.embed_tokens.weight"][:200]
    normed = rows / np.sqrt((rows**2).mean(1, keepdims=True))
    queries, keys = (
        normed @ weights[f"model.layers.0.self_attn.{part}_proj.weight"].T[:, : spec.head_size]
        for part in ("q", "k")
    )
    logits = queries @ keys.T / spec.head_size**0.5
    assert np.std(logits) == pytest.approx(4.0, rel=0.15)
