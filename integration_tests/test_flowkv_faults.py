"""FlowKV between real vLLM servers over real NIXL, when things go wrong (fault cases of the field)."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import os
import random
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from engine_pair import USAGE, Pair, ask, eventually, failed_cleanly, token_ids, tokens

from penstock.benchmarks.processes import Server, wait_until_ready
from penstock.benchmarks.scrape import samples
from penstock.benchmarks.servers import Engine, engine_server
from penstock.benchmarks.tiny_model import ensure_model
from penstock.routers.returns import refused_body

pytestmark = pytest.mark.engine

LEASE_S = 20.0
PICKUP_S = 45.0
FLOWKV = {
    "penstock": {
        "flowkv": {
            "pickup_s": PICKUP_S,
            "lease_s": LEASE_S,
            "heartbeat_s": 1.5,
            "handshake_timeout_s": 10.0,
        }
    }
}
QUICK = ("--additional-config", json.dumps(FLOWKV))
RECOMPUTE = ("--kv-transfer-config.kv_load_failure_policy", "recompute")


def engine(role: str, name: str, logs, *more: str, **fields) -> Server:
    spec = Engine(
        model=str(ensure_model()),
        role=role,
        connector="flowkv",
        name=name,
        arguments=(*QUICK, *more),
        **fields,
    )
    return engine_server(spec, logs)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def servers(logs) -> Iterator[dict[str, Server]]:
    started = {
        "prefill": engine("prefill", "prefill", logs),
        "decode": engine("decode", "decode", logs),
        "recompute": engine("decode", "recompute", logs, *RECOMPUTE, "--max-num-seqs", "1"),
    }
    try:
        wait_until_ready([server.start() for server in started.values()])
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture
def pair(servers) -> Pair:
    return Pair(str(ensure_model()), servers["prefill"], servers["decode"])


@pytest.fixture
def recomputing(servers) -> Pair:
    return Pair(str(ensure_model()), servers["prefill"], servers["recompute"])


def test_hand_off_moves_the_prompt_and_leaves_nothing_behind(pair):
    before = samples(pair.decode.url)["vllm:flowkv_num_descriptors_count"]
    for seed, length in enumerate((1, 31, 32, 33, 500, 4000)):
        prompt = tokens(100 + seed, length)
        assert token_ids(pair.decode_with(prompt, pair.prefill_params(prompt))) == pair.reference(prompt)
    eventually(
        "every transfer is counted",
        lambda: samples(pair.decode.url)["vllm:flowkv_num_descriptors_count"] == before + 6,
    )
    pair.await_idle(pair.prefill)
    pair.await_idle(pair.decode)


def test_a_prefix_that_the_decode_server_has_is_not_moved_again(pair):
    prompt = tokens(7, 640)
    longer = [*prompt, *tokens(8, 320)]
    pair.decode_with(prompt, pair.prefill_params(prompt)).raise_for_status()
    eventually(
        "first transfer counted", lambda: samples(pair.decode.url)["vllm:flowkv_bytes_transferred_sum"] > 0
    )
    before = samples(pair.decode.url)["vllm:flowkv_bytes_transferred_sum"]
    assert token_ids(pair.decode_with(longer, pair.prefill_params(longer))) == pair.reference(longer)
    block = 32 * 4 * 2 * 2 * 64 * 4
    eventually(
        "only the new blocks moved",
        lambda: samples(pair.decode.url)["vllm:flowkv_bytes_transferred_sum"] == before + 10 * block,
    )


def test_several_answers_to_one_prompt_share_one_hand_off(pair):
    prompt = tokens(11, 700)
    answer = pair.decode_with(prompt, pair.prefill_params(prompt), n=3, temperature=1, top_k=1)
    answer.raise_for_status()
    expected = pair.reference(prompt)
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == [expected] * 3
    pair.await_idle(pair.decode)


def test_f4_client_gone_between_the_two_frees_the_blocks_and_its_hand_off_is_void(pair, recomputing):
    expired = "vllm:flowkv_num_expired_leases_total"
    before = samples(pair.prefill.url)[expired]
    prompt = tokens(12, 900)
    params = pair.prefill_params(prompt)
    eventually("the blocks are held", lambda: samples(pair.prefill.url)[USAGE] > 0)
    pair.await_idle(pair.prefill, PICKUP_S + 10)
    eventually("the expiry is counted", lambda: samples(pair.prefill.url)[expired] > before)
    assert failed_cleanly(pair.decode_with(prompt, params))
    assert token_ids(recomputing.decode_with(prompt, params)) == pair.reference(prompt)
    pair.await_idle(pair.decode)
    pair.await_idle(recomputing.decode)


@pytest.mark.parametrize("seed", range(4))
def test_f12_garbage_in_the_hand_off_never_stops_the_engine(pair, seed):
    prompt = tokens(20 + seed, 200)
    good = pair.prefill_params(prompt)
    expected = pair.reference(prompt)
    rng = random.Random(seed)
    for _ in range(12):
        answer = pair.decode_with(prompt, spoiled(good, rng))
        assert failed_cleanly(answer) or token_ids(answer) == expected
    fresh = pair.prefill_params(prompt)
    assert token_ids(pair.decode_with(prompt, fresh)) == expected
    pair.await_idle(pair.decode)


def spoiled(good: dict[str, object], rng: random.Random) -> dict[str, object]:
    """The hand-off with one thing wrong: missing, of another type, out of range, foreign or oversized."""
    params = copy.deepcopy(good)
    key = rng.choice([k for k in params if k.startswith("remote") or k in ("block_size", "tp_size")])
    match rng.randrange(5):
        case 0:
            del params[key]
        case 1:
            params[key] = rng.choice([None, [], {}, -1, 1e30, "x" * 5000, [[0, 0]], [["a", 1]], True])
        case 2:
            params["remote_runs"] = [[2**31, 7]]
        case 3:
            params["remote_lease"] = f"{rng.getrandbits(128):032x}"
        case 4:
            params["remote_runs"] = [[i, 1] for i in range(100_000)]
    return params


def test_f13_one_hand_off_for_several_prompts_serves_only_its_own(pair):
    first, second, third = tokens(30, 300), tokens(31, 300), tokens(32, 77)
    params = pair.prefill_params(first)
    answer = ask(pair.decode, pair.body([first, second, third], kv_transfer_params=params))
    if not failed_cleanly(answer):
        choices = [
            choice["token_ids"] for choice in answer.json()["choices"] if choice["finish_reason"] != "error"
        ]
        expected = [pair.reference(prompt) for prompt in (first, second, third)]
        assert all(choice in expected for choice in choices)
    assert token_ids(pair.decode_with(first, pair.prefill_params(first))) == pair.reference(first)
    pair.await_idle(pair.decode)
    pair.await_idle(pair.prefill, LEASE_S + 10)


def test_f3_a_request_that_the_decode_server_rejects_frees_the_blocks(pair):
    prompt = tokens(33, 500)
    params = pair.prefill_params(prompt)
    assert pair.decode_with(prompt, params, max_tokens=100_000).status_code == 400
    pair.await_idle(pair.prefill, LEASE_S / 2)


def test_f4_the_proxy_s_return_of_a_hand_off_frees_the_blocks_before_the_lease_ends(pair):
    params = pair.prefill_params(tokens(36, 500))
    assert samples(pair.prefill.url)[USAGE] > 0
    assert ask(pair.decode, refused_body(params)).status_code == 404
    pair.await_idle(pair.prefill, LEASE_S / 2)


@pytest.mark.parametrize("delay_ms", [0, 5, 20, 80, 300])
def test_abort_at_any_stage_leaves_no_block_behind(pair, delay_ms):
    prompt = tokens(40 + delay_ms, 3000)
    params = pair.prefill_params(prompt)
    body = pair.body(prompt, kv_transfer_params=params, max_tokens=2000, ignore_eos=True)
    patience = httpx.Timeout(30, read=delay_ms / 1e3 + 1e-3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{pair.decode.url}/v1/completions", json=body, timeout=patience)
    pair.await_idle(pair.decode)
    pair.await_idle(pair.prefill, LEASE_S + 10)


def test_two_hundred_requests_at_once_with_shared_prefixes_raise_no_false_alarm(pair):
    prefixes = [tokens(300 + i, 320) for i in range(8)]
    prompts = [[*prefixes[i % 8], *tokens(400 + i % 25, 20 + i % 7)] for i in range(200)]
    expected = {tuple(p): pair.reference(p) for p in prompts}

    def one(prompt: list[int]) -> bool:
        return token_ids(pair.decode_with(prompt, pair.prefill_params(prompt))) == expected[tuple(prompt)]

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        assert all(pool.map(one, prompts))
    found = samples(pair.decode.url)
    assert found["vllm:flowkv_num_digest_mismatches_total"] == 0
    pair.await_idle(pair.prefill)
    pair.await_idle(pair.decode)


def test_kill_9_of_prefill_in_mid_transfer_then_a_restarted_one_serves(servers, logs, pair, recomputing):
    """Right tokens or a clear error whenever prefill dies; then a new one, with a new identity, works."""
    prompts = [tokens(600 + i, 5000) for i in range(4)]
    expected = [pair.reference(p) for p in prompts]
    handed = [pair.prefill_params(p) for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        strict = [pool.submit(pair.decode_with, prompts[i], handed[i]) for i in (0, 1)]
        soft = [pool.submit(recomputing.decode_with, prompts[i], handed[i]) for i in (2, 3)]
        os.killpg(pair.prefill.pid, signal.SIGKILL)
        for job, tokens_expected in zip(strict, expected[:2], strict=True):
            assert failed_cleanly(job.result()) or token_ids(job.result()) == tokens_expected
        assert [token_ids(job.result()) for job in soft] == expected[2:]
    late = pair.decode_with(prompts[3], handed[3])
    assert failed_cleanly(late) or token_ids(late) == expected[3]
    assert token_ids(recomputing.decode_with(prompts[1], handed[1])) == expected[1]
    pair.await_idle(pair.decode)
    pair.await_idle(recomputing.decode)
    pair.prefill.stop()
    servers["prefill"] = successor = engine("prefill", "successor", logs)
    wait_until_ready([successor.start()])
    again = Pair(pair.model, successor, pair.decode)
    prompt = tokens(620, 700)
    assert token_ids(again.decode_with(prompt, again.prefill_params(prompt))) == again.reference(prompt)


def test_queued_past_the_lease_then_killed(pair, recomputing):
    """F7: a decode server renews the leases of requests that it has not started. F1: dead, no longer.

    The last one here: it leaves a server dead, the one that runs one request at a time.
    """
    prompts = [tokens(500 + i, 2000) for i in range(5)]
    expected = pair.reference(prompts[0])
    handed = [pair.prefill_params(p) for p in prompts]
    doomed = recomputing.decode
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        url = f"{doomed.url}/v1/completions"
        body = recomputing.body(tokens(550, 50), max_tokens=8000, ignore_eos=True, stream=True)
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", url, json=body) as busy,
            # Takes the one seat when the first has said its 8000 tokens.
            client.stream("POST", url, json=body),
        ):
            lines = busy.iter_lines()  # httpx hangs up when the iterator is dropped
            next(lines)
            jobs = [pool.submit(recomputing.decode_with, p, h) for p, h in zip(prompts, handed, strict=True)]
            waiting = "vllm:num_requests_waiting"
            eventually("five requests wait", lambda: samples(doomed.url)[waiting] >= 5)
            time.sleep(LEASE_S + 5)
            assert samples(doomed.url)[waiting] >= 5
        assert token_ids(jobs[0].result()) == expected
        os.killpg(doomed.pid, signal.SIGKILL)
        for job in jobs[1:]:
            assert job.exception() or job.result().status_code in (200, 500)
    pair.await_idle(pair.prefill, LEASE_S + 10)
    prompt = tokens(510, 300)
    assert token_ids(pair.decode_with(prompt, pair.prefill_params(prompt))) == pair.reference(prompt)
