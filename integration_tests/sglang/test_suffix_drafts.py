"""``--speculative-algorithm SUFFIX`` on a real server: the answers of no speculation, in fewer passes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from engine_pair import eventually
from sglang_server import CHUNK, Serve, all_at_once, ask, command, generate, series

from penstock.benchmarks.processes import Server

TOKENS = 40
WIDTH = 5
FLAGS = ("--speculative-algorithm", "suffix", "--speculative-num-draft-tokens", str(WIDTH))
GRAMMAR = "(yes|no){3}"
Greedy = Callable[[Sequence[int], int], list[int]]


def prompt(seed: int, length: int) -> list[int]:
    return [10 + seed, *(10 + (seed * 131 + i * 7) % 500 for i in range(length - 1))]


PROMPTS = [prompt(seed, length) for seed, length in enumerate((3, 60, CHUNK + 1, 2 * CHUNK + 5, 90, 17))]


@pytest.fixture(scope="module", params=["trees", "chains, no overlap, pages"])
def server(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Server]:
    trees = request.param == "trees"
    how = [] if trees else ["--disable-overlap-schedule", "--page-size", "4", "--schedule-policy", "dlpm"]
    # SGLang's own test of retraction: every so many passes a request is thrown out, and comes again.
    retracting = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}
    with serve(*FLAGS, *how, "--enable-metrics", name=f"sglang-suffix-{len(how)}", **retracting) as server:
        info = ask(server, "/server_info")
        assert info["disable_overlap_schedule"] is not trees
        assert info["speculative_eagle_topk"] == (4 if trees else 1)
        yield server


def passes(answer: dict) -> int:
    return int(answer["meta_info"]["spec_verify_ct"])


def waves(server: Server, greedy: Greedy) -> list[int]:
    """Passes that the prompts take at once, and once more; answers are transformers' both times."""
    wanted = [greedy(row, TOKENS) for row in PROMPTS]
    taken = []
    for _ in range(2):
        answers = all_at_once([partial(generate, server, row, TOKENS) for row in PROMPTS])
        assert [answer["output_ids"] for answer in answers] == wanted
        taken.append(sum(map(passes, answers)))
    print(f"{server.name}: {len(PROMPTS) * TOKENS} tokens in {taken[0]} and {taken[1]} passes of a request")
    return taken


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="SGLang compiles its n-grams")
def test_stock_n_grams_run_on_the_reference_platform_as_well(serve: Serve, greedy: Greedy):
    flags = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(WIDTH))
    with serve(*flags, name="sglang-ngram") as server:
        first, again = waves(server, greedy)
        assert again < first


def test_concurrent_answers_are_transformers_and_what_was_said_before_is_drafted(
    server: Server, greedy: Greedy
):
    first, again = waves(server, greedy)
    # Told the same again, all but the first tokens of each are drafted, four a pass.
    assert again < min(first, 0.5 * len(PROMPTS) * TOKENS)


def test_what_was_drafted_is_counted_in_both_names(server: Server):
    for _ in range(2):
        generate(server, prompt(50, 20), TOKENS)
    counts = {}
    for prefix in ("", "sglang:"):
        for name in ("allocated", "accepted", "wasted"):
            (counts[prefix, name],) = series(server, f"{prefix}penstock_draft_tokens_{name}").values()
        assert counts[prefix, "allocated"] >= counts[prefix, "accepted"] > TOKENS / 2
        assert counts[prefix, "wasted"] <= counts[prefix, "allocated"]
    # The waves before were interrupted.
    assert sum(series(server, "sglang:num_retracted_requests_total").values()) > 0


def test_requests_that_sample_are_verified_beside_greedy_ones(server: Server, greedy: Greedy):
    how = [{}, {"top_p": 0.8}, {"top_k": 20}, {"top_k": 50, "top_p": 0.9}]
    calls = [partial(generate, server, row, TOKENS) for row in PROMPTS]
    calls += [
        partial(generate, server, row, TOKENS, temperature=1.0, **limits)
        for row, limits in zip(PROMPTS, how, strict=False)
    ]
    wanted = [greedy(row, TOKENS) for row in PROMPTS]
    for _ in range(2):
        answers = [answer["output_ids"] for answer in all_at_once(calls)]
        assert answers[: len(PROMPTS)] == wanted
        sampled = answers[len(PROMPTS) :]
        assert [len(answer) for answer in sampled] == [TOKENS] * len(how)
        assert all(said != best for said, best in zip(sampled, wanted, strict=False))
    # One token is all that can be drawn, and what was said is drafted: so SGLang samples greedily.
    certain = generate(server, PROMPTS[1], TOKENS, temperature=1.0, top_p=1e-6)
    assert certain["output_ids"] == wanted[1]
    assert passes(certain) < TOKENS / 2


def test_what_was_said_is_forgotten_with_the_caches(server: Server):
    def taken() -> int:
        return passes(generate(server, prompt(77, 30), TOKENS))

    first, again = taken(), taken()
    assert again < first
    ask(server, "/flush_cache", {})
    assert taken() == first


def test_a_request_that_is_aborted_leaves_the_others_as_they_are(server: Server, greedy):
    with ThreadPoolExecutor() as pool:
        gone = pool.submit(generate, server, prompt(5, 40), 15000, rid="gone")
        eventually("it runs", lambda: ask(server, "/v1/loads")["loads"][0]["num_running_reqs"] == 1)
        kept = pool.submit(generate, server, PROMPTS[1], TOKENS)
        ask(server, "/abort_request", {"rid": "gone"})
        assert gone.result()["meta_info"]["finish_reason"]["type"] == "abort"
        assert kept.result()["output_ids"] == greedy(PROMPTS[1], TOKENS)


def test_a_stop_a_grammar_and_logprobs_are_kept(server: Server, greedy):
    row = PROMPTS[1]
    said = greedy(row, TOKENS)
    stopped = generate(server, row, TOKENS, stop_token_ids=[said[7]], ignore_eos=False)
    assert stopped["output_ids"] == said[: said.index(said[7]) + 1]
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answer = ask(server, "/generate", {"input_ids": row, "sampling_params": sampling, "return_logprob": True})
    assert [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]] == said
    assert re.fullmatch(GRAMMAR, generate(server, row, TOKENS, regex=GRAMMAR, ignore_eos=False)["text"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--penstock-config", '{"suffix": {"depth": 3}}'], "suffix.depth: unknown key"),
        (["--schedule-policy", "slo"], "slo contradicts --speculative-algorithm"),
    ],
)
def test_a_wrong_combination_ends_the_start_with_one_line(model: str, words: list[str], reason: str):
    done = subprocess.run(
        command(model, 1, *FLAGS, *words), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("penstock:")]
    assert reason in line
