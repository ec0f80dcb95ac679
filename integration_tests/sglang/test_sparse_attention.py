"""``--attention-backend tactic`` on real servers, which have room for few requests: pages change hands all
the time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from engine_pair import eventually
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang_pair import PAGE, SglangPair, all_back, prompt, serving_sglang_pair
from sglang_server import Serve, all_at_once, ask, command, generate, queried, series

from penstock.benchmarks.needle.answers import contexts
from penstock.benchmarks.needle.checkpoint import shipped
from penstock.benchmarks.needle.model import NeedleShape
from penstock.benchmarks.needle.part import SERVING
from penstock.benchmarks.processes import Server

LEAST_TOKENS = 400
TOKENS = 24
POOL = 4096
EVERYTHING = {
    "least_tokens": LEAST_TOKENS,
    "dense_layers": 1,
    "budget": 1.0,
    "most_share": 1.0,
    "calibration_share": 0.2,
}
"""Every page is chosen, and read by our own kernel: the tokens must be those of dense attention."""
SPARSE_LAYERS = {"1", "2", "3"}

NEEDLE_TOKENS = 4097
NEEDLE_LAYERS = NeedleShape().layers
NEEDLE_POOL = 2 * NEEDLE_TOKENS + 200
NEEDLE = msgspec.structs.replace(SERVING, calibration_share=0.2)


def asked(section: dict[str, object], pool: int) -> tuple[str, ...]:
    config = json.dumps({"sparse_attention": section})
    flags = ("--attention-backend", "tactic", "--penstock-config", config, "--enable-metrics")
    return (*flags, "--max-total-tokens", str(pool))


@pytest.fixture(scope="module")
def server(serve: Serve) -> Iterator[Server]:
    # It expects few tokens of a request, and so admits more than will have room in the end.
    eager = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
    with serve(*asked(EVERYTHING, POOL), name="sglang-tactic", **eager) as server:
        yield server


def sparse(server: Server, name: str) -> float:
    """The sum of a series of ours over its labels."""
    return sum(series(server, f"penstock_sparse_{name}").values())


def added(server: Server, name: str, before: float) -> float:
    """How much a series grew, once what was asked is told: SGLang publishes when it falls idle."""
    eventually(f"{name} is told", lambda: sparse(server, name) > before)
    return sparse(server, name) - before


def test_below_the_activation_length_nothing_is_sparse_and_tokens_are_dense_ones(server: Server, greedy):
    rows = [prompt(n, n) for n in (1, PAGE, 100, LEAST_TOKENS - TOKENS - 1)]
    answers = all_at_once([partial(generate, server, row, TOKENS) for row in rows])
    assert [answer["output_ids"] for answer in answers] == [greedy(row, TOKENS) for row in rows]
    assert sparse(server, "selections") == 0
    info = ask(server, "/server_info")
    assert (info["attention_backend"], info["decode_attention_backend"]) == ("torch_native", "tactic")
    assert info["page_size"] == 16, "as none was given"


def test_tokens_of_sparse_steps_are_dense_ones_cold_and_behind_a_shared_prefix(server: Server, greedy):
    shared = prompt(7, 333)
    rows = [[*shared, *prompt(n, n)] for n in (10, 70, 200, 500)]
    wanted = [greedy(row, TOKENS) for row in rows]
    cached = []
    for _wave in range(2):
        answers = all_at_once([partial(generate, server, row, TOKENS) for row in rows])
        assert [answer["output_ids"] for answer in answers] == wanted
        cached.append(sum(answer["meta_info"]["cached_tokens"] for answer in answers))
    assert cached[1] > sum(map(len, rows)) - PAGE * len(rows) - 1, "the second wave is cached"
    assert added(server, "selections", 0) > 0
    assert sparse(server, "pages_read") == sparse(server, "pages")
    before = sparse(server, "index_blocks")
    generate(server, rows[0], TOKENS)
    eventually("the last step is told", lambda: sparse(server, "selections") % len(SPARSE_LAYERS) == 0)
    assert sparse(server, "index_blocks") - before <= 3 * len(SPARSE_LAYERS), (
        "a shared page keeps its summary"
    )


def test_retracted_requests_go_on_with_dense_tokens(server: Server, greedy):
    rows, tokens = [prompt(30 + number, 400) for number in range(8)], 160
    answers = all_at_once([partial(generate, server, row, tokens) for row in rows])
    assert sum(series(server, "sglang:num_retracted_requests_total").values()) > 0
    assert [answer["output_ids"] for answer in answers] == [greedy(row, tokens) for row in rows]


def test_metrics_are_ours_by_engine_and_sglang_s_by_its_own_labels(server: Server):
    masses = {'engine="0",quantile="0.1"', 'engine="0",quantile="0.5"'}
    # What reads every page is not measured.
    missing = {name for name in queried("sparse-attention") if not series(server, name)}
    assert missing <= {"penstock_sparse_attained_mass"}
    assert set(series(server, "penstock_sparse_attained_mass")) <= masses
    (labels,) = series(server, "sglang:penstock_sparse_selections")
    assert "model_name=" in labels
    assert sparse(server, "index_bytes") < 0.3 * sparse(server, "cache_bytes")


@pytest.fixture(scope="module")
def pair(logs: Path) -> Iterator[SglangPair]:
    """Both halves choose pages of the trained needle; decode has room for two prompts."""
    if not hasattr(CommonKVManager, "build_receiver_registration_message"):
        pytest.skip("FlowKV needs SGLang 0.5.23")
    section = msgspec.to_builtins(NEEDLE)
    flags = asked(section, NEEDLE_POOL), ("--chunked-prefill-size", "2048")
    cached = "--disaggregation-decode-enable-radix-cache"
    with serving_sglang_pair(str(shipped()), logs, *flags[0], *flags[1], cached, name="needle") as pair:
        yield pair


@pytest.mark.parametrize("task", ["multiquery", "crowded", "tracking"])
def test_needles_are_found_in_kv_that_flowkv_brought(pair: SglangPair, task):
    """The second context takes the pages of the first, and questions of one share its pages."""
    before = {
        name: sparse(pair.decode, name) for name in ("selections", "index_blocks", "pages", "pages_read")
    }
    found, steps, many = [], 0, 0
    for prompts in contexts(task, NEEDLE_TOKENS, 8, seed=6):
        many += 1
        for one in prompts:
            # The prefill server says the first token, and no step follows the last.
            steps += len(one.answer) - 1
            found.append(one.score(pair.generate(one.tokens, len(one.answer))["output_ids"]))
    assert found == [1.0] * len(found)
    all_back(pair.prefill, pair.decode)
    selections = added(pair.decode, "selections", before["selections"])
    assert selections >= 0.5 * NEEDLE_LAYERS * steps
    assert added(pair.decode, "index_blocks", before["index_blocks"]) >= NEEDLE_LAYERS * many * (
        NEEDLE_TOKENS // PAGE
    )
    read, pages = (added(pair.decode, name, before[name]) for name in ("pages_read", "pages"))
    assert 0.02 < read / pages < 0.9


def test_the_mass_of_what_was_read_is_measured(pair: SglangPair):
    masses = series(pair.decode, "penstock_sparse_attained_mass")
    assert masses['engine="0",quantile="0.5"'] >= NEEDLE.mass
    assert masses['engine="0",quantile="0.1"'] >= NEEDLE.mass - 0.05
    assert sparse(pair.prefill, "selections") == 0


def test_what_cannot_be_ends_the_start_with_one_line(model: str):
    done = subprocess.run(
        command(model, 1, "--decode-attention-backend", "tactic", "--page-size", "1"),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penstock: error:")]
    assert "--page-size: given 1" in line
    assert "Traceback" not in done.stderr
