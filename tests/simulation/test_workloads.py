"""Workloads have the lengths, the sharing and the clients that they promise."""

from __future__ import annotations

import gzip
import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest
from scripted_engine import OneAtATime

from penstock.simulation.arrivals import at_rate, gamma_arrivals, read_azure, window
from penstock.simulation.closed_loops import Chat, Several, TreeOfThought
from penstock.simulation.engine import Simulation
from penstock.simulation.records import Ask, Piece
from penstock.simulation.traces import TraceRequest, generate_mooncake
from penstock.simulation.workloads import (
    Keys,
    chunk_pieces,
    flood,
    judge,
    long_document_qa,
    mooncake_prefixes,
    together,
)


def finished(workload):
    return Simulation(OneAtATime(), workload, lambda load: 1e-3).run().served


def test_long_document_qa_shares_the_document_and_nothing_else():
    asks = together([long_document_qa("a", documents=3, questions=4)], seed=0).asks
    assert Counter(one.prompt[0].tokens for one in asks) == {21_449: 12}
    assert sorted(Counter(one.prompt[0] for one in asks).values()) == [4, 4, 4]
    assert len({one.prompt[1] for one in asks}) == 12
    assert {one.output_tokens for one in asks} == {15}
    assert [one.priority for one in asks] == list(range(12))


def test_misbehaving_as_in_the_papers_second_scenario_adds_tokens_to_every_document():
    asks = together(
        [long_document_qa("a", documents=2, questions=1, scale=0.1, more_tokens=600)], seed=0
    ).asks
    assert {one.prompt[0].tokens for one in asks} == {2145 + 600}


def test_a_judge_asks_every_dimension_of_every_article():
    asks = together([judge("a", articles=2, dimensions=16)], seed=0).asks
    assert len(asks) == 32
    assert {one.prompt_tokens for one in asks} == {2701}
    assert len({one.prompt[0] for one in asks}) == 2


def test_one_clients_stream_does_not_depend_on_the_others():
    alone = together([judge("a", articles=2, dimensions=4, rate=3.0)], seed=1).asks
    beside = together(
        [judge("a", articles=2, dimensions=4, rate=3.0), judge("b", articles=2, dimensions=4)], seed=1
    ).asks
    assert [one for one in beside if one.client == "a"] == list(alone)


def test_requests_that_come_at_once_are_mixed_and_each_clients_keep_their_order():
    asks = together([judge(name, articles=5, dimensions=4) for name in "ab"], seed=0).asks
    assert sum(one.client != other.client for one, other in pairwise(asks)) > 5
    for name in "ab":
        assert [one.priority for one in asks if one.client == name] == list(range(20))


def test_clients_share_no_content():
    asks = together([judge("a", articles=2, dimensions=4), judge("b", articles=2, dimensions=4)], seed=1).asks
    a, b = ({piece for one in asks if one.client == name for piece in one.prompt} for name in "ab")
    assert not a & b


def test_the_flood_sends_six_times_as_much_on_two_prefixes():
    asks = together(flood(60), seed=0).asks
    sent = Counter(one.client for one in asks)
    assert sent == {"flood": 3600, "victim-0": 600, "victim-1": 600, "victim-2": 600}
    prefixes = {client: len({one.prompt[0] for one in asks if one.client == client}) for client in sent}
    assert prefixes == {"flood": 2, "victim-0": 60, "victim-1": 60, "victim-2": 60}
    last = max(one.arrival_s for one in asks)
    assert 50 < last < 75


@pytest.mark.parametrize(("branches", "requests"), [(4, 340), (2, 30)])
def test_a_tree_of_thought_has_as_many_requests_as_the_paper_says(branches, requests):
    tree = TreeOfThought(name="t", trees=2, branches=branches, keys=Keys(), thought_tokens=2)
    assert len(finished(tree)) == 2 * requests


def test_prompts_of_four_branches_are_546_tokens_in_the_mean():
    served = finished(TreeOfThought(name="t", trees=1, branches=4, keys=Keys(), thought_tokens=2))
    assert statistics.fmean(one.prompt_tokens for one in served) == pytest.approx(546, abs=1)


def test_a_thought_has_256_tokens_unless_told_otherwise():
    tree = TreeOfThought(name="t", trees=1, branches=2, keys=Keys())
    assert {one.output_tokens for one in tree.begin()} == {256}


def test_a_thought_comes_when_its_parent_is_complete_and_goes_on_with_its_answer():
    served = {
        one.ask.workflow: one for one in finished(TreeOfThought(name="t", trees=1, branches=2, keys=Keys()))
    }
    for place, one in served.items():
        if len(place) == 2:
            assert one.ask.arrival_s == 0.0
            continue
        parent = served[place[:-1]]
        assert one.ask.arrival_s == parent.finished_s
        assert one.ask.prompt == (*parent.ask.prompt, Piece(parent.ask.answer, 128))


def test_a_chat_waits_for_its_answer_and_sends_the_whole_conversation():
    chat = Chat(name="c", conversations=2, turns=3, keys=Keys(), system_tokens=40, pause_s=2.0)
    served = {one.ask.workflow: one for one in finished(chat)}
    assert sorted(served) == [(n, turn) for n in range(2) for turn in range(3)]
    for (number, turn), one in served.items():
        assert one.prompt_tokens == 40 + 56 + turn * (142 + 56)
        if turn:
            before = served[number, turn - 1]
            assert one.ask.arrival_s > before.finished_s
            assert one.ask.prompt[:-1] == (*before.ask.prompt, Piece(before.ask.answer, 142))


def test_closed_loops_side_by_side_keep_to_themselves():
    keys = Keys()
    both = Several(
        (
            TreeOfThought(name="t", trees=1, branches=2, keys=keys),
            Chat(name="c", conversations=3, turns=4, keys=keys),
        )
    )
    assert Counter(one.ask.client for one in finished(both)) == {"t": 30, "c": 12}


def test_mooncake_conversations_have_one_client_and_zipf_says_how_many():
    asks = list(mooncake_prefixes(generate_mooncake(0), 0, clients=5, requests=2000, rate=10.0).begin())
    owner = {}
    for one in asks:
        for piece in one.prompt[1:-1]:
            assert owner.setdefault(piece.key, one.client) == one.client
    sent = Counter(one.client for one in asks)
    assert sent["client-0"] > sent["client-1"] > sent["client-4"]
    assert len(sent) == 5


def test_chunks_of_a_trace_add_up_to_its_length():
    row = TraceRequest(1200, 10, (7, 8, 9))
    assert chunk_pieces(row) == (Piece(7, 512), Piece(8, 512), Piece(9, 176))
    assert chunk_pieces(row, 4) == (Piece(7, 128), Piece(8, 128), Piece(9, 44))


@pytest.mark.parametrize("cv", [0.0, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation(cv):
    times = gamma_arrivals(20.0, 20_000, random.Random(0), cv=cv)
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert times[-1] == pytest.approx(1000, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_an_azure_trace_is_read_cut_and_rescaled(tmp_path):
    file = tmp_path / "azure.csv.gz"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{46 + n}.6805900,{100 + n},{n + 1}" for n in range(5)]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    trace = read_azure(file)
    assert [round(one.arrival_s, 6) for one in trace] == [0, 1, 2, 3, 4]
    cut = window(trace, 2, 3)
    assert [(round(one.arrival_s, 6), one.input_tokens) for one in cut] == [(0, 102), (1, 103), (2, 104)]
    assert [one.arrival_s for one in at_rate(cut, 4.0)] == pytest.approx([0, 0.25, 0.5])
    with pytest.raises(ValueError, match="of 5"):
        window(trace, 3, 3)


def test_a_line_that_is_no_request_is_named(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,2\nyesterday,1,2\n")
    with pytest.raises(ValueError, match="line 3"):
        read_azure(file)


def test_a_request_without_tokens_is_refused():
    with pytest.raises(ValueError, match="'x'"):
        Ask(request_id="x", arrival_s=0.0, prompt=(), output_tokens=1)


def test_equal_seeds_give_equal_workloads_and_others_differ():
    one, two, other = (together(flood(2), seed).asks for seed in (3, 3, 4))
    assert list(one) == list(two)
    assert [a.arrival_s for a in one] != [a.arrival_s for a in other]
