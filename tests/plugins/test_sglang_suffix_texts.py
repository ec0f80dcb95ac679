"""Drafts for SGLang's verification, checked by a small verifier of our own: whatever is drafted, and however
late SGLang reports tokens, answers are the model's; and what is drafted is where the mask says."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.plugins.sglang.suffix_texts import BatchTexts, Row, lay_out, rows_of
from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.tree import DraftTree

WIDTH = 6
LAST = 99


@st.composite
def trees(draw):
    tree = DraftTree()
    for _ in range(draw(st.integers(0, WIDTH - 1))):
        parent, token = draw(st.integers(-1, len(tree) - 1)), draw(st.sampled_from([1, 2, 3, LAST]))
        if (parent, token) not in zip(tree.parents, tree.tokens, strict=True):
            tree.parents.append(parent)
            tree.tokens.append(token)
    return tree


def paths_of(tokens, mask):
    """Tokens from the first position to each position, by the mask alone."""
    return [tuple(tokens[mask[position]]) for position in range(len(tokens))]


@settings(deadline=None)
@given(trees())
def test_a_tree_is_laid_out_so_that_the_mask_says_its_paths(tree):
    tokens, mask = np.empty(WIDTH, np.int64), np.empty((WIDTH, WIDTH), np.bool_)
    lay_out(LAST, tree, tokens, mask, chain=False)
    assert not np.triu(mask, 1).any()
    assert mask.diagonal().all()
    wanted = [(LAST,)]
    for parent, token in zip(tree.parents, tree.tokens, strict=True):
        wanted.append((*wanted[parent + 1], token))
    repeated = max(len(path) for path in wanted if set(path) == {LAST})
    wanted += [(LAST,) * (repeated + more + 1) for more in range(WIDTH - len(wanted))]
    assert paths_of(tokens, mask) == wanted
    assert len(set(wanted)) == WIDTH, "no token stands twice in one place"
    # A position's parent is the last of its ancestors: so SGLang reads it.
    for position, parent in enumerate(tree.parents, 1):
        assert mask[position, :position].nonzero()[0][-1] == parent + 1


def test_a_chain_is_one_also_where_it_is_padded():
    tokens, mask = np.empty(WIDTH, np.int64), np.empty((WIDTH, WIDTH), np.bool_)
    lay_out(LAST, DraftTree([7, 8], [-1, 0]), tokens, mask, chain=True)
    assert tokens.tolist() == [LAST, 7, 8, LAST, LAST, LAST]
    assert (mask == np.tri(WIDTH, dtype=bool)).all()


class Request:
    """A request that SGLang decodes; the last ``unprocessed`` accepted tokens are not reported yet."""

    def __init__(self, name, prompt, model):
        self.name, self.prompt, self.model = name, prompt, model
        self.output = [model(prompt)]
        self.unprocessed = 1

    def row(self):
        at = len(self.output) - self.unprocessed
        return Row(self.name, self.prompt, self.output[:at], self.output[at:])

    def verify(self, tokens, mask):
        """Accept what the model says, along the tree that the mask describes."""
        assert tokens[0] == self.output[-1]
        paths = paths_of(tokens, mask)
        at, text = paths[0], [*self.prompt, *self.output]
        accepted = []
        while True:
            accepted.append(self.model([*text, *accepted]))
            at = (*at, accepted[-1])
            if at not in paths:
                return accepted


def answer(texts, requests, length, *, late):
    """Decode ``requests`` to ``length`` tokens of output; returns the passes that were made."""
    passes = 0
    while running := [request for request in requests if len(request.output) < length]:
        drafts = texts.drafts([request.row() for request in running])
        for request, tokens, mask in zip(running, drafts.tokens, drafts.mask, strict=True):
            accepted = request.verify(tokens, mask) if drafts.worthwhile else None
            accepted = accepted or [request.model([*request.prompt, *request.output])]
            request.output += accepted
            request.unprocessed = len(accepted) if late else 0
        passes += 1
    return passes


def model_of(seed, usually=0.9):
    """A model that usually goes by the last two tokens alone, so that its texts repeat, but not in all."""

    def model(text):
        rng = random.Random(f"{seed}{text[-2:]}")
        usual = rng.randrange(8)
        return usual if random.Random(f"{seed}{text[-5:]}").random() < usually else (usual + 1) % 8

    return model


@pytest.mark.parametrize("late", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("branches", [1, 3])
def test_answers_are_the_models_and_take_fewer_passes_when_they_were_heard_before(branches, late):
    texts = BatchTexts(SuffixConfig(), WIDTH, branches)
    taken = []
    for wave in range(2):
        requests = [Request(f"{wave}/{seed}", [seed, *range(seed)], model_of(seed // 2)) for seed in range(6)]
        taken.append(answer(texts, requests, 60, late=late))
        for request in requests:
            for at in range(1, len(request.output)):
                said = [*request.prompt, *request.output[:at]]
                assert request.output[at] == request.model(said)
    assert taken[1] < taken[0] / 2


def test_branches_take_fewer_passes_than_chains_where_texts_part():
    def passes(branches):
        texts = BatchTexts(SuffixConfig(), WIDTH, branches)
        return sum(
            answer(texts, [Request(f"{n}", [n], model_of(n % 3, 0.6))], 60, late=False) for n in range(9)
        )

    assert passes(4) < passes(1)


def scheduled(name, prompt, output, cached, accepted):
    """A request, the tokens of its text that are cached, and what its last pass accepted."""
    req = SimpleNamespace(
        rid=name, origin_input_ids=prompt, origin_input_ids_unpadded=prompt, output_ids=output
    )
    return req, cached, [*accepted, *[0] * (WIDTH - len(accepted))], len(accepted)


@pytest.mark.parametrize(
    ("output", "accepted", "unprocessed"),
    [
        ([], [5], [5]),
        ([5], [6, 7], [6, 7]),
        ([5, 6, 7], [6, 7], []),
        ([5, 6, 7, 8], [8], []),
    ],
    ids=["after the prompt", "overlap", "processed while a prompt ran", "no overlap"],
)
def test_what_sglang_has_not_processed_is_told_by_what_is_cached(output, accepted, unprocessed):
    prompt, total = [1, 2, 3], 3 + len(output) + len(unprocessed)
    other = scheduled("other", [9], [4], 2, [3])
    requests = zip(scheduled("r", prompt, output, total - 1, accepted), other, strict=True)
    reqs, cached, tokens, lengths = map(list, requests)
    verified = SimpleNamespace(accept_tokens=np.array(tokens).reshape(-1), accept_lens=np.array(lengths))
    batch = SimpleNamespace(reqs=reqs, seq_lens_cpu=np.array(cached), spec_info=verified)
    row, beside = rows_of(batch, WIDTH)
    assert row == Row("r", prompt, output, unprocessed)
    assert beside == Row("other", [9], [4], [3])


def test_a_text_is_followed_once_however_late_it_is_reported():
    def drafted(*steps):
        texts = BatchTexts(SuffixConfig(), WIDTH, 1)
        for output, unprocessed in steps:
            drafts = texts.drafts([Row("r", [1], output, unprocessed)])
        return drafts.tokens.tolist()

    said = [5, 6, 7, 8, 5, 6]
    at_once = drafted((said, []))
    assert at_once == [[6, 7, 8, 5, 6, 7]]
    assert drafted((said[:1], []), (said, [])) == at_once
    assert drafted((said[:1], said[1:3]), (said[:3], said[3:])) == at_once
    assert drafted((said[:1], said[1:4]), (said[:1], said[1:])) == at_once


def test_a_match_that_is_too_short_is_not_worth_a_verification_but_has_a_place_in_one():
    def drafts(**settings):
        texts = BatchTexts(SuffixConfig(**settings), WIDTH, 4)
        return texts.drafts([Row("r", [1, 2, 3, 4, 1], [2], [])])

    assert drafts(least_match_tokens=2).worthwhile
    short = drafts(least_match_tokens=3)
    assert not short.worthwhile
    assert short.tokens.tolist() == drafts(least_match_tokens=2).tokens.tolist()


def test_nothing_is_worth_a_verification_where_nothing_was_said_before():
    texts = BatchTexts(SuffixConfig(), WIDTH, 4)
    drafts = texts.drafts([Row("a", list(range(50)), [60], [])])
    assert not drafts.worthwhile
    assert drafts.drafted == 0
    drafts = texts.drafts([Row("a", list(range(50)), [60, 1], [2]), Row("b", [1, 2, 3], [4], [])])
    assert drafts.worthwhile
    assert drafts.drafted == WIDTH - 1


def test_requests_that_left_are_not_kept_and_what_they_said_is_until_the_caches_are_flushed():
    texts = BatchTexts(SuffixConfig(), WIDTH, 4)
    said = [11, 12, 13, 14, 15, 16]
    for left, right in pairwise(range(3)):
        texts.drafts([Row(f"{left}", [1], said, []), Row(f"{right}", [2], [3], [])])
    texts.drafts([Row("last", [9], said[:2], [])])
    assert len(texts) == 1
    assert texts.drafts([Row("last", [9], said[:3], [])]).worthwhile
    texts.reset()
    assert len(texts) == 0
    assert not texts.drafts([Row("last", [9], said[:3], [])]).worthwhile


def test_a_request_that_comes_back_with_less_is_followed_from_there():
    texts = BatchTexts(SuffixConfig(), WIDTH, 1)
    texts.drafts([Row("a", [1, 2, 3, 4], [5, 6, 7], [])])
    drafts = texts.drafts([Row("a", [1, 2, 3, 4], [1, 2], [])])
    assert drafts.tokens[0, :3].tolist() == [2, 3, 4]
    assert len(texts) == 1
