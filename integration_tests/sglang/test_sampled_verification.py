"""Drafts of requests that sample: on the reference platform tokens have the target's probabilities, exactly.

Every probability is a multiple of a quarter, so that numbers in the middle of equal parts of [0, 1) stand for
all that could be drawn, and the law of what is said is counted rather than estimated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from penstock_refcpu.sampled_verification import (
    top_k_renorm_prob,
    top_p_renorm_prob,
    tree_speculative_sampling_target_only,
)
from penstock_refcpu.speculation import reconstruct_indices_from_tree_mask

from penstock.plugins.sglang.suffix_texts import lay_out
from penstock.schedulers.suffix.tree import DraftTree

LAST, VOCABULARY = 3, 4
QUARTERS, TWELFTHS = 4, 12
"""Equal parts: of what a child's share is a sum of, and of what is left when some children were refused."""
QUARTERED = [
    [q / 4 for q in quarters] for quarters in itertools.product(range(5), repeat=4) if sum(quarters) == 4
]
"""All distributions over the vocabulary in quarters."""
TREES = {
    "nothing": ([], []),
    "two beside each other": ([1, 2], [-1, -1]),
    "what was said last among them": ([LAST, 1], [-1, -1]),
    "a chain": ([1, 2], [-1, 0]),
    "branches further down": ([1, 0, 2], [-1, 0, 0]),
}
Targets = dict[tuple[int, ...], list[float]]


def targets(seed: int) -> Targets:
    """A model: the distribution of what follows each text of up to four tokens."""
    random = np.random.default_rng(seed)
    texts = [text for length in range(5) for text in itertools.product(range(VOCABULARY), repeat=length)]
    return {text: QUARTERED[random.integers(len(QUARTERED))] for text in texts}


def said(tree: DraftTree, model: Targets, width: int, *, chain: bool, **thresholds: float) -> Counter:
    """How often each text is said, over all numbers that may be drawn."""
    tokens, mask = np.empty(width, np.int64), np.empty((width, width), np.bool_)
    lay_out(LAST, tree, tokens, mask, chain=chain)
    coins = torch.tensor(list(itertools.product(range(QUARTERS), repeat=width - 1)))
    coins = coins.repeat_interleave(TWELFTHS, 0)
    rows = len(coins)
    final = (torch.arange(TWELFTHS) + 0.5).repeat(rows // TWELFTHS) / TWELFTHS
    # Leaves draw nothing but the last number.
    coins = torch.cat([(coins + 0.5) / QUARTERS, torch.zeros(rows, 1)], 1)
    index, child, sibling = (torch.zeros(1, width, dtype=torch.long) for _ in range(3))
    reconstruct_indices_from_tree_mask(
        torch.from_numpy(mask), torch.tensor([0]), torch.zeros(width), index, child, sibling, 1, width
    )
    probabilities = torch.tensor([model[tuple(tokens[row][1:])] for row in mask])
    predicts, lengths = torch.zeros(rows * width, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    accepted = torch.full((rows, width), -1, dtype=torch.int32)
    tree_speculative_sampling_target_only(
        predicts,
        accepted,
        lengths,
        torch.from_numpy(tokens).repeat(rows, 1),
        index + width * torch.arange(rows)[:, None],
        child.repeat(rows, 1),
        sibling.repeat(rows, 1),
        coins,
        final,
        probabilities.repeat(rows, 1, 1),
        torch.zeros(rows, width, VOCABULARY),
        **thresholds,
    )
    places = zip(accepted.tolist(), lengths.tolist(), strict=True)
    return Counter(tuple(predicts[row[: length + 1]].tolist()) for row, length in places)


@pytest.mark.parametrize(
    ("name", "chain"), [*((name, False) for name in TREES), ("nothing", True), ("a chain", True)]
)
def test_what_is_said_has_the_law_of_the_target(name, chain):
    tree = DraftTree(*TREES[name])
    for seed in range(3):
        model = targets(seed)
        counts = Counter[tuple[int, ...]]()
        for text, count in said(tree, model, width=4, chain=chain).items():
            counts.update({text[:length]: count for length in range(len(text) + 1)})
        for text, count in counts.items():
            following = [counts[*text, token] for token in range(VOCABULARY)]
            # All that begin so go on, or none does: the walk ended there.
            assert sum(following) in (0, count)
            if sum(following):
                assert [Fraction(said, count) for said in following] == [Fraction(q) for q in model[text]]


def test_thresholds_take_what_is_likely_enough_at_once():
    tree = DraftTree([1, 2], [-1, -1])
    model = {text: [0.25, 0.5, 0.25, 0.0] for text in targets(0)}

    def share(token: int, **thresholds: float) -> float:
        texts = said(tree, model, width=3, chain=False, **thresholds)
        return sum(count for text, count in texts.items() if text[0] == token) / texts.total()

    assert share(1) == 0.5
    assert share(1, threshold_single=0.5) == 1.0
    assert share(1, threshold_acc=0.5) == 1.0
    assert (share(1, threshold_acc=0.75), share(2, threshold_acc=0.75)) == (0.75, 0.25)


def test_renormed_probabilities_keep_what_is_likeliest():
    probs = torch.tensor([[0.5, 0.125, 0.25, 0.125]] * 3)
    assert top_k_renorm_prob(probs, torch.tensor([1, 2, 1 << 30])).tolist() == [
        [1.0, 0.0, 0.0, 0.0],
        pytest.approx([2 / 3, 0.0, 1 / 3, 0.0]),
        [0.5, 0.125, 0.25, 0.125],
    ]
    assert top_p_renorm_prob(probs, torch.tensor([0.4, 0.6, 1.0])).tolist() == [
        [1.0, 0.0, 0.0, 0.0],
        pytest.approx([2 / 3, 0.0, 1 / 3, 0.0]),
        [0.5, 0.125, 0.25, 0.125],
    ]
