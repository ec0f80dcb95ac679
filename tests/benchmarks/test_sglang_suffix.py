"""``penstock bench sglang-suffix``: how it replays texts, and what it says where SGLang is missing."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from penstock.benchmarks import sglang_suffix
from penstock.benchmarks.sglang_suffix import Drafts, accepted, bench, claims, replay, suffix_drafts

WIDTH = 4
TREE = Drafts(
    np.array([1, 5, 6, 7]),
    np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=bool),
    verified=True,
)


@pytest.mark.parametrize(
    ("output", "right"), [([5, 6, 7], 1), ([6, 7, 5], 2), ([7, 7], 0), ([6], 1), ([6, 7], 2)]
)
def test_what_is_accepted_lies_on_one_path_of_the_tree(output, right):
    assert accepted(TREE, output) == right


def test_without_drafts_a_pass_is_a_token_and_with_ours_a_loop_takes_fewer():
    def nothing(name, prompt, output):
        tokens = np.full(WIDTH, -1)
        return Drafts(tokens, np.eye(WIDTH, dtype=bool), verified=False)

    alone = replay(nothing, "looping", 1, seed=0)
    assert (alone.passes, alone.verified) == (alone.tokens, 0)
    ours = replay(suffix_drafts(WIDTH, 2), "looping", 1, seed=0)
    assert ours.tokens == alone.tokens
    assert ours.tokens / WIDTH <= ours.passes < alone.passes / 2
    assert 0 < ours.verified <= ours.passes


def test_claims_compare_trees_with_n_grams_width_by_width():
    rows = [
        {"width": width, "text": kind, "drafter": drafter, "tokens a pass": brought}
        for width in sglang_suffix.WIDTHS
        for kind in sglang_suffix.KINDS
        for drafter, brought in (("SGLang's n-grams", 2.0), ("suffix, trees", 1.0 + width / 8))
    ]
    assert [claim.holds for claim in claims(rows)] == [True] * len(sglang_suffix.KINDS) * 2
    assert {claim.value for claim in claims(rows)} == {1.0, 1.25}


def test_without_sglang_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(sglang_suffix, "find_spec", lambda name: None)
    done = CliRunner().invoke(bench, ["--quick"])
    assert done.exit_code == 1
    assert "make env-sglang" in done.output
