"""The schedulers of prefill and decode servers under our policies: who is computed first, who gets memory, a
seat, and memory back, and what is charged.

SGLang's real scheduler is stepped, with transfers that end at once (``sglang_stepped_roles.py``)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "sglang_stepped_roles.py"
PROMPT, OUTPUT = 100, 20
# Each request that has memory keeps 32 tokens more free: fifteen prompts of a hundred tokens fit.
SHAPE = {"kv_tokens": 2000, "more": {"num_reserved_decode_tokens": 32}}
FIT = 15


def asks(client: str, number: int, at: int = 0, prompt: int = PROMPT, output: int = OUTPUT) -> list[Any]:
    return [[at, f"{client}-{index}", prompt, output] for index in range(number)]


def nobody_s(seed: int) -> list[Any]:
    draw = random.Random(seed)
    return [[n // 4, f"x{n}", draw.randrange(1, 300), draw.randrange(1, 40)] for n in range(60)]


def mixed(seed: int) -> dict[str, Any]:
    """Requests of three clients and of nobody, some given up in whatever state they are, some retracted, some
    late to meet their prefill server."""
    draw = random.Random(seed)
    rows = [
        [draw.randrange(40), f"{draw.choice('abc')}-{n:02}" if n % 4 else f"x{n:02}", *sizes(draw)]
        for n in range(80)
    ]
    names = [row[1] for row in rows]
    return {
        "asks": sorted(rows),
        "aborts": [[draw.randrange(60), name] for name in draw.sample(names, 30)],
        "retract_at": [n for n in range(80) if n % 3 == 0],
        "late": {name: draw.randrange(40, 60) for name in draw.sample(names, 10)},
        "seats": 8,
    }


def sizes(draw: random.Random) -> tuple[int, int]:
    return draw.randrange(1, 300), draw.randrange(1, 40)


RUNS: dict[str, dict[str, Any]] = {
    "a flood, then another": {"asks": [*asks("flood", 60), *asks("light", 2, at=1)]},
    "a flood and another at once": {"asks": [*asks("flood", 60), *asks("light", 3)]},
    "seats": {"asks": [*asks("flood", 14), *asks("light", 1, at=2)], "seats": 4},
    "retraction": {
        "asks": [*asks("flood", 10), *asks("light", 2, at=1)],
        "retract_at": list(range(3, 40, 3)),
    },
    "nobody's": {"asks": nobody_s(1), "retract_at": [10, 11, 30], "seats": 12},
    "given up while out": {
        "asks": asks("a", 2),
        "retract_at": [5],
        "aborts": [[6, "a-0"], [6, "a-1"]],
    },
}
STOCK = ["a flood, then another", "seats", "nobody's"]
DLPM = {"policy": "dlpm", "quantum_tokens": 200, "first_output_tokens": 10.0}
OURS: dict[str, dict[str, Any]] = {
    f"{name}, {policy}": {**run, "section": section}
    for policy, section in (("dlpm", DLPM), ("vtc", {"policy": "vtc"}))
    for name, run in {**RUNS, **{f"mixed {seed}": mixed(seed) for seed in range(6)}}.items()
}
CHUNKS = {"kv_tokens": 20_000, "chunked_prefill_size": 256}
PREFILLS: dict[str, dict[str, Any]] = {
    "prompts": {"asks": [*asks("flood", 20, prompt=300), *asks("light", 2, at=2, prompt=90)]},
    "nobody's prompts": {"asks": nobody_s(2)},
    "prompts given up": {
        "asks": [*asks("a", 8, prompt=600), *asks("b", 4, at=1)],
        "aborts": [[1, "a-0"], [1, "a-6"], [2, "b-1"], [4, "a-3"]],
    },
}
OUR_PREFILLS: dict[str, dict[str, Any]] = {
    f"{name}, {section['policy']}": {**run, "section": section}
    for section in (DLPM, {"policy": "vtc"})
    for name, run in PREFILLS.items()
}
TARGETS = {
    "section": {"policy": "slo", "slo": {"profile": "a100-7b"}},
    "asks": [
        *asks("long", 6, prompt=1500),
        *([at, f"talk-{at}", 60, OUTPUT, 400.0] for at in range(2, 8)),
    ],
    "aborts": [[4, "long-5"]],
    "round_s": 0.05,
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    processes = [
        {"role": "decode", "policy": None, "shape": SHAPE, "runs": [RUNS[name] for name in STOCK]},
        {"role": "decode", "policy": "dlpm", "shape": SHAPE, "runs": list(OURS.values())},
        {"role": "prefill", "policy": None, "shape": CHUNKS, "runs": [PREFILLS["nobody's prompts"]]},
        {"role": "prefill", "policy": "dlpm", "shape": CHUNKS, "runs": list(OUR_PREFILLS.values())},
        {"role": "prefill", "policy": "slo", "shape": CHUNKS, "runs": [TARGETS]},
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input=json.dumps(processes),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names = [STOCK, OURS, ["nobody's prompts"], OUR_PREFILLS, ["targets"]]
    written = json.loads(done.stdout.splitlines()[-1])
    return {
        name: run
        for group, found in zip(names, written, strict=True)
        for name, run in zip(group, found, strict=True)
    }


def before(order: list[str], rid: str, client: str = "flood") -> int:
    """How many requests of a client come before one."""
    return sum(name.startswith(client) for name in order[: order.index(rid)])


both = pytest.mark.parametrize("policy", ["dlpm", "vtc"])


@both
def test_the_next_memory_is_a_light_client_s_and_not_the_flood_s_that_came_before(runs, policy):
    found = runs[f"a flood, then another, {policy}"]
    assert before(runs["a flood, then another"]["ended"], "light-0") == 60
    for rid in ("light-0", "light-1"):
        assert before(found["memory"], rid) <= FIT + 2
        assert before(found["ended"], rid) <= 2 * FIT
    assert [rid for rid in found["memory"] if rid.startswith("flood")] == [f"flood-{n}" for n in range(60)]


@both
def test_who_is_next_is_asked_when_the_one_before_has_been_charged(runs, policy):
    """Both came before the first pass: a flood does not get all memory that is free at that time."""
    assert before(runs[f"a flood and another at once, {policy}"]["memory"], "light-2") <= 8


@both
def test_a_seat_goes_to_the_client_that_holds_the_least(runs, policy):
    """All the flood's have memory; four run at once."""
    found = runs[f"seats, {policy}"]
    assert before(runs["seats"]["seats"], "light-0") == 14
    assert before(found["seats"], "light-0") < 9
    assert [rid for rid in found["seats"] if rid.startswith("flood")] == [f"flood-{n}" for n in range(14)]


@both
def test_who_holds_the_most_is_retracted_and_all_end(runs, policy):
    found = runs[f"retraction, {policy}"]
    assert {rid.partition("-")[0] for rid in found["back"]} == {"flood"}
    assert sorted(found["ended"]) == sorted(row[1] for row in RUNS["retraction"]["asks"])


@both
def test_without_clients_everything_is_as_in_stock(runs, policy):
    stock, found = runs["nobody's"], runs[f"nobody's, {policy}"]
    assert stock["back"]
    assert {name: found[name] for name in stock} == stock


@both
@pytest.mark.parametrize("name", [*RUNS, *(f"mixed {seed}" for seed in range(6))])
def test_nothing_is_left_and_what_was_done_is_charged_once(runs, policy, name):
    found, given = runs[f"{name}, {policy}"], OURS[f"{name}, {policy}"]
    assert found["left"] == found["expected"] == 0
    assert len(found["memory"]) == len(set(found["memory"]))
    aborted = {rid for _, rid in given.get("aborts", ())}
    wanted: dict[str, list[int]] = {}
    for _, rid, prompt, output in given["asks"]:
        extend = wanted.setdefault(rid.partition("-")[0] if "-" in rid else "", [0, 0])
        extend[0] += prompt if rid in found["memory"] else 0
        if rid not in aborted:
            assert rid in found["ended"]
            extend[1] += output
    for client, (extend_tokens, output_tokens) in wanted.items():
        assert found["service"][client][0] == extend_tokens
        assert found["service"][client][1] >= output_tokens
        if not aborted:
            assert found["service"][client][1] == output_tokens


@both
def test_a_prefill_server_computes_a_light_client_s_prompts_before_the_flood_s(runs, policy):
    found = runs[f"prompts, {policy}"]
    assert before(found["computed"], "light-1") < 8
    assert [rid for rid in found["computed"] if rid.startswith("flood")] == [f"flood-{n}" for n in range(20)]


@both
def test_prompts_without_clients_are_computed_as_in_stock(runs, policy):
    stock, found = runs["nobody's prompts"], runs[f"nobody's prompts, {policy}"]
    assert {name: found[name] for name in stock} == stock


@both
@pytest.mark.parametrize("name", PREFILLS)
def test_a_prefill_server_charges_prompts_once_and_nothing_of_answers(runs, policy, name):
    found, given = runs[f"{name}, {policy}"], PREFILLS[name]
    assert found["left"] == found["expected"] == 0
    aborted = {rid for _, rid in given.get("aborts", ())}
    assert sorted({*found["ended"], *aborted}) == sorted(row[1] for row in given["asks"])
    wanted: dict[str, int] = {}
    for _, rid, prompt, _ in given["asks"]:
        client = rid.partition("-")[0] if "-" in rid else ""
        wanted[client] = wanted.get(client, 0) + (prompt if rid not in aborted else 0)
    for client, tokens in wanted.items():
        extend, output = found["service"][client]
        assert output == 0
        assert extend >= tokens if aborted else extend == tokens


def test_prompts_with_targets_are_computed_in_time_on_a_prefill_server(runs):
    found = runs["targets"]
    assert before(found["computed"], "talk-7", "long") < 5
    assert found["left"] == 0
    (tier,) = [row for row in found["slo"]["tiers"].values() if row[0]]
    assert tier[:2] == [6, 6]
