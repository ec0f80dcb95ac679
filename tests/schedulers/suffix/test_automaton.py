"""Counts of a growing automaton, and drafts from it, against counting by brute force."""

from __future__ import annotations

import random

import pytest
from substring_counts import followers, longest_followed, occurrences

from penstock.schedulers.suffix.automaton import SuffixAutomaton, Text
from penstock.schedulers.suffix.match import NO_MATCH, advance, draft, end_of


def grown(seed):
    """Several texts, each of them ahead of the others now and then, in an automaton and as lists."""
    rng = random.Random(seed)
    automaton = SuffixAutomaton(rng.choice((2, 3, 5, 9)))
    texts = [[] for _ in range(rng.choice((1, 1, 2, 4)))]
    places = [Text() for _ in texts]
    letters = rng.choice((1, 2, 3, 8))
    for _ in range(rng.randrange(1, 60)):
        which = rng.randrange(len(texts))
        token = rng.randrange(letters)
        texts[which].append(token)
        automaton.append(places[which], token)
    return rng, automaton, texts, places, letters


@pytest.mark.parametrize("seed", range(120))
def test_every_short_string_is_counted_as_often_as_it_occurs(seed):
    rng, automaton, texts, _, letters = grown(seed)
    automaton.check_integrity()
    strings = [
        text[i : i + n] for text in texts for i in range(len(text)) for n in range(automaton.depth + 1)
    ]
    strings += [[rng.randrange(letters) for _ in range(rng.randint(1, automaton.depth))] for _ in range(20)]
    for string in strings:
        if string:
            assert automaton.count(string) == occurrences(texts, string)
    assert automaton.tokens == sum(map(len, texts))


@pytest.mark.parametrize("seed", range(120))
def test_each_draft_token_is_the_one_that_followed_the_longest_suffix_most_often(seed):
    rng, automaton, texts, places, _ = grown(seed)
    longest = automaton.depth - 1
    for text, place in zip(texts, places, strict=True):
        least = rng.randint(1, longest)
        found = draft(automaton, end_of(automaton, place), 5, least)
        so_far = list(text)
        for token, share, matched in zip(*found, strict=True):
            suffix = longest_followed(texts, so_far, longest)
            counts = followers(texts, suffix)
            assert matched == len(suffix) >= least
            assert counts[token] == max(counts.values())
            assert share == counts[token] / sum(counts.values())
            so_far.append(token)
        if len(found.tokens) < 5:
            assert len(longest_followed(texts, so_far, longest)) < least


@pytest.mark.parametrize("seed", range(60))
def test_a_text_that_is_not_in_the_automaton_is_matched_by_its_longest_known_suffix(seed):
    rng, automaton, texts, _, letters = grown(seed)
    longest, text, match = automaton.depth - 1, [], NO_MATCH
    for _ in range(40):
        text.append(rng.randrange(letters + 1))
        match = advance(automaton, match, text[-1], longest)
        known = [n for n in range(1, min(longest, len(text)) + 1) if occurrences(texts, text[-n:])]
        assert match.length == max(known, default=0)
        if match.length:
            assert match.state == automaton.shortened(automaton.find(text[-match.length :]), match.length)


def test_memory_is_linear_in_the_tokens():
    automaton, place, rng = SuffixAutomaton(9), Text(), random.Random(0)
    for _ in range(5000):
        automaton.append(place, rng.choice((1, 1, 1, 2, 3)))
    assert len(automaton) <= 2 * 5000
