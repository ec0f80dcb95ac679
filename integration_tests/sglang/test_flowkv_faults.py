"""A server of a FlowKV pair dies, or is not what the other one is: no page is lost and the rest answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_pair import eventually
from sglang_pair import PAGE, SglangPair, all_back, kill, pair_of, prompt, queued
from sglang_server import CHUNK, Refused, ask, generate

from penstock.benchmarks.processes import Server
from penstock.benchmarks.servers import proxy_server, serving

TOKENS = 6
SOON = '{"flowkv": {"pickup_s": 4, "transfer_timeout_s": 5, "handshake_timeout_s": 5}}'


@pytest.fixture(scope="module")
def pair(model: str, logs: Path) -> Iterator[SglangPair]:
    pair = pair_of(model, logs, "--penstock-config", SOON, name="faulty")
    with serving([pair.prefill]):
        yield pair


@contextmanager
def decode_of(pair: SglangPair, model: str, logs: Path, name: str, *arguments: str) -> Iterator[SglangPair]:
    """The pair with a decode server of its own."""
    other = pair_of(model, logs, "--penstock-config", SOON, *arguments, name=name)
    now = SglangPair(pair.prefill, other.decode, pair.bootstrap, other.others_bootstrap)
    with serving([now.decode]):
        yield now


@contextmanager
def in_front_of(pair: SglangPair, logs: Path, name: str) -> Iterator[Server]:
    """Penstock's proxy."""
    with serving([server := proxy_server([pair.prefill], [pair.decode], logs, name=name)]):
        yield server


def posted(pool: ThreadPoolExecutor, server: Server, body: dict[str, Any]) -> Future[Any]:
    """The answer to come, or the refusal as an exception."""
    return pool.submit(ask, server, "/generate", body)


def test_pages_that_a_dead_decode_server_never_read_come_back(
    pair: SglangPair, model: str, logs: Path, greedy
):
    row = prompt(1, 2 * CHUNK + 3)
    with ThreadPoolExecutor(3) as pool:
        with (
            decode_of(pair, model, logs, "dying-decode") as now,
            in_front_of(now, logs, "proxy-of-dying-decode") as proxy,
        ):
            assert now.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)
            now.prefill.pause()
            body = now.body(prompt(2, 2 * CHUNK + 3), TOKENS)
            posted(pool, now.decode, body)
            proxied = pool.submit(generate, proxy, prompt(6, 2 * CHUNK + 3), TOKENS)
            eventually("decode has pages for both", lambda: queued(now.decode, "decode_transfer") == 2)
            now.decode.pause()
            now.prefill.resume()
            left = posted(pool, now.prefill, body)
            eventually("prefill has promised its pages", lambda: queued(now.prefill, "prefill_inflight") == 2)
            kill(now.decode)
            with pytest.raises(Refused, match=r"502.*a decode server broke off"):
                proxied.result()
        with pytest.raises(Refused, match="decode did not read a chunk in time"):
            left.result()
        all_back(pair.prefill)


def test_a_decode_server_with_another_page_size_is_refused_by_name(pair: SglangPair, model: str, logs: Path):
    with decode_of(pair, model, logs, "other-pages", "--page-size", str(2 * PAGE)) as now:
        with pytest.raises(Refused, match=f"(?i)page.size.*{PAGE}.*{2 * PAGE}"):
            now.generate(prompt(3, 40), TOKENS)
        assert ask(now.decode, "/health") == ""


def test_a_dead_prefill_server_fails_its_requests_and_its_successor_serves(
    pair: SglangPair, model: str, logs: Path, greedy
):
    row = prompt(4, CHUNK + 1)
    with (
        ThreadPoolExecutor(2) as pool,
        decode_of(pair, model, logs, "orphaned-decode") as now,
        in_front_of(now, logs, "proxy-of-orphaned-decode") as proxy,
    ):
        assert now.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)
        now.prefill.pause()
        waiting = posted(pool, now.decode, now.body(prompt(5, CHUNK), TOKENS))
        proxied = pool.submit(generate, proxy, prompt(7, CHUNK), TOKENS)
        eventually("decode has pages for both", lambda: queued(now.decode, "decode_transfer") == 2)
        kill(now.prefill)
        with pytest.raises(Refused, match=r"502.*a prefill server broke off"):
            proxied.result()
        with pytest.raises(Refused, match="Lost connection with prefill"):
            waiting.result()
        all_back(now.decode)
        with serving([now.prefill]):
            assert now.generate(row, TOKENS)["output_ids"] == greedy(row, TOKENS)
            eventually("the proxy has found the successor", proxy.ready)
            assert generate(proxy, row, TOKENS)["output_ids"] == greedy(row, TOKENS)
            all_back(now.prefill, now.decode)
