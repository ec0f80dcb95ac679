"""The needle with sparse attention: answers in this process, pairs of scores, and what the bench says."""

from __future__ import annotations

import msgspec
import pytest

torch = pytest.importorskip("torch")

from penstock.benchmarks.needle.checkpoint import load  # noqa: E402
from penstock.benchmarks.needle.decoding import (  # noqa: E402
    BLOCK_TOKENS,
    DENSE,
    Context,
    QuestPages,
    TacticPages,
)
from penstock.benchmarks.needle.pairs import Pairs, together  # noqa: E402
from penstock.benchmarks.needle.part import SERVING, NeedleOptions  # noqa: E402
from penstock.benchmarks.needle.peers import Case, answer, measure  # noqa: E402
from penstock.benchmarks.needle.task import make_prompts, shared_tokens  # noqa: E402
from penstock.kernels.sparse.attention import attained, logits  # noqa: E402
from penstock.kernels.sparse.calibration import Calibration  # noqa: E402

ACTIVE = msgspec.structs.replace(SERVING, least_tokens=256)
LENGTH = 640


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts("tracking", LENGTH, 3, 2)


@pytest.fixture
def context(model, prompts):
    return Context(model, prompts[0].tokens[: shared_tokens(prompts)], 32)


def greedy(model, prompt):
    """The answer by whole forward passes, no cache."""
    tokens = list(prompt.tokens)
    with torch.inference_mode():
        for _ in prompt.answer:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt.tokens) :]


def test_dense_answers_are_those_of_the_model_whatever_was_asked_before(model, prompts, context):
    expected = greedy(model, prompts[0])
    assert context.answer(prompts[0], DENSE) == expected
    assert context.answer(prompts[1], DENSE) != expected
    assert context.answer(prompts[0], DENSE) == expected


def test_tactic_reads_whole_pages_with_the_mass_and_each_question_anew(prompts, context):
    tactic = TacticPages(ACTIVE, Calibration(ACTIVE.core()))
    for prompt in prompts:
        assert prompt.score(context.answer(prompt, tactic)) == 1.0
    readings = tactic.readings
    assert readings.share() < 0.9
    assert sorted(readings.masses)[len(readings.masses) // 10] > 0.8
    alone = TacticPages(ACTIVE, Calibration(ACTIVE.core()))
    again = context.answer(prompts[1], alone)
    assert again == context.answer(prompts[1], tactic)


def test_a_question_s_blocks_are_summarised_again_for_the_next_one(prompts, context):
    tactic = TacticPages(ACTIVE, Calibration(ACTIVE.core()))
    context.answer(prompts[0], tactic)
    (index, *_) = (decode.index for decode in tactic._layers)
    first = context.shared // BLOCK_TOKENS
    assert not len(index.missing(torch.arange(first)))
    with torch.inference_mode():
        tactic.begin(context)
    assert index.missing(torch.arange(index.blocks)).tolist() == list(range(first, index.blocks))


def test_readings_are_of_what_was_read(prompts, context):
    quest = QuestPages(ACTIVE.core(), 0.25, 16)
    seen = []

    def watched(layer, query, keys, values):
        output = quest(layer, query, keys, values)
        tokens = quest._quest.select(quest._indexes[layer], query, keys, 0.25).tokens
        seen.append((tokens.float().mean().item(), attained(logits(query, keys), tokens).sum().item()))
        return output

    watched.begin = quest.begin
    context.answer(prompts[0], watched)
    assert quest.readings.share() == pytest.approx(sum(share for share, _ in seen) / len(seen))
    assert quest.readings.share() == pytest.approx(0.25, abs=0.03)
    assert sum(quest.readings.masses) == pytest.approx(sum(mass for _, mass in seen), rel=1e-4)


def test_pairs_count_both_directions_and_bound_what_is_lost():
    pairs = Pairs([1.0, 1.0, 0.5, 1.0], [1.0, 0.5, 1.0, 1.0])
    assert (pairs.lost, pairs.worse, pairs.better) == (0.0, 1, 1)
    # One of four: 1 - p solves sum of the binomial's first two terms = 0.05.
    most = pairs.most_lost()
    assert (1 - most) ** 4 + 4 * most * (1 - most) ** 3 == pytest.approx(0.05)
    none = Pairs([1.0] * 59, [1.0] * 59)
    assert none.most_lost() == pytest.approx(1 - 0.05 ** (1 / 59))
    assert Pairs([1.0], [0.0]).most_lost() == 1.0
    assert together([pairs, none]).cells()["prompts"] == 63


def test_peers_read_what_tactic_reads_and_teach_it_nothing(monkeypatch, prompts, context):
    monkeypatch.setattr("penstock.benchmarks.needle.peers.SERVING", ACTIVE)
    calibration, alone = (Calibration(ACTIVE.core()) for _ in range(2))
    case = Case("tracking", LENGTH, ACTIVE.mass)
    answer(case, context, prompts[:1], calibration)
    assert sorted(case.peers) == ["budget", "budget, 16", "quest", "quest, 16"]
    for way in case.peers.values():
        assert len(way.scores) == 1
        assert way.readings.share() == pytest.approx(case.tactic.readings.share(), abs=0.05)
    tactic = TacticPages(ACTIVE, alone)
    context.answer(prompts[0], tactic)
    assert [alone.ask(layer) for layer in range(3)] == [calibration.ask(layer) for layer in range(3)]


def test_the_part_has_a_row_for_each_task_and_mass_and_claims_what_was_lost(monkeypatch):
    monkeypatch.setattr("penstock.benchmarks.needle.peers.TASKS", ("multikey",))
    monkeypatch.setattr("penstock.benchmarks.needle.peers.MASSES", (0.9, 0.3))
    found = measure(NeedleOptions(prompts=1, lengths=(2100,)), lambda text: None)
    assert [(row["task"], row["P"]) for row in found.rows] == [("multikey", 0.9), ("multikey", 0.3)]
    most, least = found.rows
    assert most["read"] > least["read"]
    claims = {claim.name: claim for claim in found.claims}
    assert claims["multikey, P = 0.9: share of answers lost"].value <= 0
    assert len(claims) == 1 + 2
