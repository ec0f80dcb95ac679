"""``--schedule-policy dlpm``, ``vtc`` and ``slo`` on servers of two ranks: answers stay stock's, clients get
their shares, and both ranks have counted the same.

A rank that decided otherwise would hang the server, or answer with another request's tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from engine_pair import eventually
from sglang_order import change, order_of_service, prompt
from sglang_server import CHUNK, POOL_TOKENS, Refused, Serve, ask, generate, series

from penstock.benchmarks.processes import Server

CLIENTS = 5
CROWD = 150
SEATS = 16


def serving(serve: Serve, ranks: str, policy: str, **section: Any) -> Any:
    cores = sorted(os.sched_getaffinity(0))
    return serve(
        *(ranks, "2", "--penstock-config", json.dumps({"scheduler": {"policy": policy, **section}})),
        *("--max-total-tokens", str(POOL_TOKENS // 5), "--max-running-requests", str(SEATS)),
        *("--enable-metrics", "--enable-metrics-for-all-schedulers"),
        name=f"sglang-{policy}-ranks",
        # SGLang gives each rank a NUMA node of its own, unless it is told cores.
        SGLANG_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[-1]}",
        # SGLang's own knob for tests: every so many passes it retracts, as if memory had run out.
        SGLANG_TEST_RETRACT="1",
        SGLANG_TEST_RETRACT_INTERVAL="30",
    )


@pytest.fixture(scope="module")
def fair(serve: Serve) -> Iterator[Server]:
    with serving(serve, "--tp-size", "dlpm", quantum_tokens=100) as server:
        yield server


def crowd() -> list[list[int]]:
    """Prompts of four families, some of several chunks."""
    shared = [prompt(400 + family, 100) for family in range(4)]
    return [[*shared[n % 4], *prompt(n, 2 * CHUNK if n % 20 == 0 else 5 + n % 40)] for n in range(CROWD)]


def by_rank(server: Server, beginning: str) -> list[dict[str, float]]:
    """What each rank shows of the series that begin so, without what says which rank it is."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for line in ask(server, "/metrics").splitlines():
        if line.startswith(beginning):
            sample, _, value = line.rpartition(" ")
            name, _, rest = sample.partition("{")
            labels = rest.rstrip("}").split(",")
            rank = tuple(label for label in labels if label.startswith(("tp_rank", "pp_rank")))
            kept = ",".join(label for label in labels if label not in rank)
            found.setdefault(rank, {})[f"{name}{{{kept}"] = float(value)
    return list(found.values())


def expect_ranks_to_agree(server: Server, beginning: str) -> None:
    """Both ranks show the series that begin so, with the same values."""

    def agree() -> bool:
        shown = by_rank(server, beginning)
        return len(shown) == 2 and len(shown[0]) > 0 and shown[0] == shown[1]

    eventually("both ranks have counted the same", agree)


def name_of(number: int) -> str:
    """None begins another: an abort is of all names that begin so."""
    return f"crowd {number:03}"


def stand_a_crowd(server: Server, greedy: Any, said: Any) -> None:
    """Everybody is answered as transformers answers, but for those whose clients left."""
    prompts = crowd()
    tokens = [4 + number % 24 for number in range(CROWD)]
    gone = set(range(7, CROWD, 15))

    def answered(number: int) -> list[int] | None:
        try:
            row, rid = prompts[number], name_of(number)
            answer = generate(server, row, tokens[number], rid=rid, custom_params=said(number))
        except Refused:
            return None
        reason = answer["meta_info"]["finish_reason"]["type"]
        return None if reason == "abort" else answer["output_ids"]

    with ThreadPoolExecutor(CROWD) as pool:
        answers: list[Future[list[int] | None]] = [pool.submit(answered, n) for n in range(CROWD)]
        for number in gone:
            ask(server, "/abort_request", {"rid": name_of(number)})
    for number, future in enumerate(answers):
        found = future.result()
        assert found is not None or number in gone
        assert found is None or len(found) == tokens[number]
        if found is not None and number % 6 == 0:
            assert found == greedy(prompts[number], tokens[number])
    assert sum(series(server, "sglang:num_retracted_requests_total").values()) > 0


def test_a_crowd_of_clients_is_answered_and_charged_alike_on_both_ranks(fair: Server, greedy):
    stand_a_crowd(fair, greedy, lambda number: {"client_id": f"client {number % CLIENTS}"})
    expect_ranks_to_agree(fair, "sglang:penstock_client")
    # The first rank shows them by engine as well.
    extend = series(fair, "penstock_client_extend_tokens")
    assert len(extend) >= CLIENTS
    assert all(value > 0 for value in extend.values())


def test_who_floods_waits_behind_who_does_not(fair: Server):
    assert change(fair, pp_max_micro_batch_size=1)
    # A quantum pays for two prompts of the flood; both of the other's are served before its third.
    assert order_of_service(fair, [*["flood"] * 6, *["light"] * 2], 3500) == [0, 1, 6, 7, 2, 3, 4, 5]
    assert change(fair, pp_max_micro_batch_size=SEATS)


def test_a_change_at_run_time_reaches_both_ranks(fair: Server):
    assert change(fair, **{"penstock.quantum_tokens": 5000, "penstock.weights.client 0": 3})
    said = [{"client_id": f"client {number % 2}"} for number in range(12)]
    for number, one in enumerate(said):
        assert len(generate(fair, prompt(300 + number, 30), 4, custom_params=one)["output_ids"]) == 4
    expect_ranks_to_agree(fair, "sglang:penstock_client")


def test_stages_of_a_pipeline_go_by_one_clock(serve: Serve, greedy):
    with serving(serve, "--pp-size", "vtc") as server:
        stand_a_crowd(server, greedy, lambda number: {"client_id": f"client {number % CLIENTS}"})
        expect_ranks_to_agree(server, "sglang:penstock_client")


def test_plans_are_made_and_step_times_learned_alike_on_both_ranks(serve: Serve, greedy):
    targets = [(500, 20), (5_000, 100), (60_000, 1_000), None, None]

    def said(number: int) -> dict[str, int]:
        target = targets[number % len(targets)]
        return {} if target is None else {"ttft_slo_ms": target[0], "tpot_slo_ms": target[1]}

    with serving(serve, "--tp-size", "slo") as server:
        stand_a_crowd(server, greedy, said)
        expect_ranks_to_agree(server, "sglang:penstock_slo")
        (plans,) = series(server, "penstock_slo_plans").values()
        (passive,) = series(server, "penstock_slo_passive_plans").values()
        (measured_s,) = series(server, "penstock_slo_measured_seconds").values()
        assert plans > passive
        assert measured_s > 0
