"""Drafts that branch, against every continuation that the texts allow, ranked by brute force."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from substring_counts import followers, longest_followed

from penstock.schedulers.suffix.automaton import SuffixAutomaton, Text
from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.drafter import SuffixDrafter
from penstock.schedulers.suffix.match import end_of
from penstock.schedulers.suffix.tree import END, Place, grow
from penstock.schedulers.suffix.trust import Trust

LONGEST = 6
TOKENS = st.lists(st.integers(1, 3), min_size=4, max_size=20)


def place(text):
    automaton, growing = SuffixAutomaton(LONGEST + 1), Text()
    for token in text:
        automaton.append(growing, token)
    return Place(automaton, end_of(automaton, growing), Trust())


def ranked(texts, most):
    """Probabilities of all continuations of up to ``most`` tokens, by what follows the longest suffix that
    something followed, of the text that is likelier to be right."""
    best = {}
    for text in texts:
        reached = {(): 1.0}
        for _ in range(most):
            longer = {}
            for path, probability in reached.items():
                suffix = longest_followed([text], [*text, *path], LONGEST)
                if not suffix:
                    continue
                counts = followers([text], suffix)
                for token, times in counts.items():
                    share = times / sum(counts.values())
                    longer[*path, token] = probability * Trust().probability(share, len(suffix))
            for path, probability in longer.items():
                best[path] = max(probability, best.get(path, 0.0))
            reached = longer
    return best


def path_of(tree, node):
    return () if node == END else (*path_of(tree, tree.parents[node]), tree.tokens[node])


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=2), st.integers(1, 5))
def test_a_tree_holds_the_likeliest_continuations_likeliest_first(texts, most):
    tree = grow([place(text) for text in texts], most, branches=3)
    wanted = ranked(texts, most)
    assert tree.survival == pytest.approx(sorted(wanted.values(), reverse=True)[:most])
    paths = [path_of(tree, node) for node in range(len(tree))]
    assert [wanted[path] for path in paths] == pytest.approx(tree.survival)
    assert len(set(paths)) == len(paths)
    assert all(parent < node for node, parent in enumerate(tree.parents))


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=2), st.integers(1, 2))
def test_no_node_has_more_than_its_branches(texts, branches):
    tree = grow([place(text) for text in texts], 12, branches)
    assert max(map(tree.parents.count, tree.parents), default=0) <= branches
    if branches == 1:
        assert tree.parents == list(range(-1, len(tree) - 1))


def test_what_was_answered_in_two_ways_is_drafted_in_two_ways():
    one = SuffixDrafter(SuffixConfig())
    for name, then in (("a", [5, 6]), ("b", [5, 6]), ("c", [7, 8])):
        one.open(name, [9])
        one.extend(name, [1, 2, 3, *then])
    one.open("d", [9])
    one.extend("d", [1, 2, 3])
    tree = one.propose_tree("d", 4, 2)
    assert {path_of(tree, node) for node in range(4)} == {(5,), (5, 6), (7,), (7, 8)}
    assert tree.tokens[0] == 5
    chain = one.propose_tree("d", 4, 1)
    assert chain.tokens == one.propose("d", 4).tokens == [5, 6]


def test_probabilities_of_branches_become_those_with_which_they_come_true():
    rng = random.Random(2)
    one = SuffixDrafter(SuffixConfig())
    one.open("r", [1])
    said = came = 0.0
    for number in range(3000):
        token = rng.choice((1, 2))
        if number > 500:
            tree = one.propose_tree("r", 2, 2)
            first = [node for node, parent in enumerate(tree.parents) if parent == END]
            said += sum(tree.survival[node] for node in first)
            came += any(tree.tokens[node] == token for node in first)
        one.extend("r", [token])
    assert said == pytest.approx(came, rel=0.05)
