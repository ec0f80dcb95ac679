"""Drafts of requests: from their own text, from their group's, within bounds, never of what is unlikely."""

from __future__ import annotations

import random

import pytest
from substring_counts import followers, longest_followed

from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.drafter import MOST_GROUPS, SuffixDrafter
from penstock.schedulers.suffix.shared import SharedTexts, Voice

SENTENCE = [11, 12, 13, 14, 15, 16, 17, 18]


def drafter(**settings):
    return SuffixDrafter(SuffixConfig(**settings))


def test_what_the_prompt_says_is_drafted():
    one = drafter()
    one.open("r", [*SENTENCE, 1, 2, 3])
    one.extend("r", [11, 12, 13])
    assert one.propose("r", 4).tokens == [14, 15, 16, 17]


def test_what_another_request_of_the_group_said_is_drafted_and_other_groups_hear_nothing():
    one = drafter()
    for name, group in (("a", "g"), ("b", "g"), ("c", "other")):
        one.open(name, [1, 2, 3], group)
    one.extend("a", SENTENCE)
    one.close("a")
    for name in ("b", "c"):
        one.extend(name, SENTENCE[:4])
    assert one.propose("b", 3).tokens == [15, 16, 17]
    assert one.propose("c", 3).tokens == []


def test_nothing_is_drafted_where_nothing_was_seen_before():
    one = drafter()
    one.open("r", list(range(100)))
    one.extend("r", [200, 201])
    assert one.propose("r", 4).tokens == []


def test_a_request_that_repeats_is_drafted_beyond_its_own_end():
    one = drafter()
    one.open("r", [5])
    one.extend("r", [1, 2, 3] * 4)
    assert one.propose("r", 8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def test_survival_falls_and_stays_above_the_least_probability():
    rng = random.Random(0)
    one = drafter(least_probability=0.3)
    one.open("r", [rng.choice((1, 1, 1, 2)) for _ in range(300)])
    seen = 0
    for _ in range(100):
        one.extend("r", [rng.choice((1, 1, 1, 2))])
        proposal = one.propose("r", 6)
        assert len(proposal.tokens) == len(proposal.survival)
        assert list(proposal.survival) == sorted(proposal.survival, reverse=True)
        assert all(0.3 <= value <= 1 for value in proposal.survival)
        seen += len(proposal.tokens)
    assert seen


def test_probabilities_become_those_with_which_drafts_come_true():
    rng = random.Random(1)
    one = drafter(least_probability=0.0)
    one.open("r", [1])
    said = came = 0.0
    for number in range(3000):
        token = rng.choice((1, 2))
        if number > 500:
            proposal = one.propose("r", 1)
            said += sum(proposal.survival)
            came += proposal.tokens == [token]
        one.extend("r", [token])
    assert abs(said / came - 1) < 0.15


def test_a_long_prompt_is_indexed_over_several_steps():
    one = drafter(indexed_per_step=10, shared_tokens=0)
    prompt = [*range(100, 160), 1, 2, 3, 4]
    one.open("r", prompt)
    one.extend("r", [1, 2, 3])
    assert one.propose("r", 1).tokens == []
    for _ in range(8):
        one.begin_step()
        one.extend("r", [])
    assert one.propose("r", 1).tokens == [4]
    one.check_integrity()


@pytest.mark.parametrize("seed", range(30))
def test_a_group_proposes_from_either_half_what_brute_force_finds_in_it(seed):
    rng = random.Random(seed)
    depth, half = rng.choice((3, 6)), rng.choice((7, 20))
    group = SharedTexts(depth, 2 * half)
    voices = [Voice() for _ in range(3)]
    young, old = [[] for _ in voices], [[] for _ in voices]
    for _ in range(70):
        which = rng.randrange(3)
        if sum(map(len, young)) >= half:
            old, young = young, [[] for _ in voices]
        token = rng.randrange(3)
        group.append(voices[which], token)
        young[which].append(token)
        for index, half_texts in enumerate((young, old)):
            # What a voice said before a half began is not matched in it.
            text = young[which] if index == 0 else old[which] + young[which]
            found = group.drafts(voices[which], 1, 1)[index]
            suffix = longest_followed(half_texts, text, depth - 1)
            counts = followers(half_texts, suffix) if suffix else {}
            assert bool(found.tokens) == bool(counts)
            if counts:
                assert found.matched == [len(suffix)]
                assert counts[found.tokens[0]] == max(counts.values())
        group.check_integrity()
    assert group.tokens <= 2 * half


def test_the_memory_of_a_group_is_bounded_and_keeps_the_newest():
    one = drafter(shared_tokens=400)
    for number in range(50):
        one.open(f"r{number}", [1])
        one.extend(f"r{number}", [1000 * number + i for i in range(40)])
        one.close(f"r{number}")
        one.check_integrity()
    one.open("old", [1])
    one.extend("old", [1000, 1001, 1002])
    assert one.propose("old", 2).tokens == []
    one.open("new", [1])
    one.extend("new", [48_000, 48_001, 48_002])
    assert one.propose("new", 2).tokens == [48_003, 48_004]


def test_groups_without_end_do_not_take_memory_without_end():
    one = drafter()
    for number in range(3 * MOST_GROUPS):
        one.open(f"r{number}", [1], group=f"g{number}")
        one.extend(f"r{number}", [1, 2, 3])
        one.close(f"r{number}")
    assert len(one._groups) <= MOST_GROUPS + 1
    assert len(one) == 0


def test_a_request_is_opened_once():
    one = drafter()
    one.open("r", [1])
    with pytest.raises(ValueError, match="open already"):
        one.open("r", [1])


def test_a_match_that_is_longer_than_its_context_is_refused():
    with pytest.raises(ValueError, match="least_match_tokens"):
        SuffixConfig(least_match_tokens=9, context_tokens=8)
