"""The drafter as vLLM's model runner calls it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.suffix_drafter import SuffixDrafter

PATH = "penstock.plugins.vllm.suffix_drafter.SuffixDrafter"
LONGEST = 64


def config(most=4, **suffix):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=most, model=PATH),
        model_config=SimpleNamespace(max_model_len=LONGEST),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        additional_config={"penstock": {"suffix": suffix}},
    )


class Rows:
    """The input batch of a model runner: texts in rows, with the tokens of the last step at their ends."""

    def __init__(self, drafter):
        self.drafter = drafter

    def propose(self, *rows):
        """``rows`` are whole texts and how many of their tokens are new."""
        tokens = np.zeros((8, LONGEST), dtype=np.int32)
        lengths = np.zeros(8, dtype=np.int32)
        for index, (text, _) in enumerate(rows):
            tokens[index, : len(text)] = text
            lengths[index] = len(text)
        sampled = [text[len(text) - new :] if new else [] for text, new in rows]
        return self.drafter.propose(sampled, lengths, tokens, slot_mappings=None)


def test_vllm_makes_it_and_it_drafts_from_the_prompt():
    rows = Rows(create_custom_proposer(config()))
    assert rows.propose(([1, 2, 3, 4, 5, 6, 1, 2], 1), ([9, 8, 7], 1)) == [[3, 4, 5, 6], []]


def test_rows_that_change_places_keep_their_texts():
    rows = Rows(SuffixDrafter(config()))
    one, other = [1, 2, 3, 4, 5, 6, 1], [11, 12, 13, 14, 15, 16, 11]
    rows.propose((one, 1), (other, 1))
    assert rows.propose(([*other, 12, 13], 2), ([*one, 2], 1)) == [[14, 15, 16, 11], [3, 4, 5, 6]]


def test_a_prompt_that_is_not_computed_to_its_end_gets_no_draft():
    rows = Rows(SuffixDrafter(config()))
    assert rows.propose(([1, 2, 1, 2, 1, 2], 0)) == [[]]


@pytest.mark.parametrize(("length", "drafted"), [(LONGEST, 0), (LONGEST - 1, 0), (LONGEST - 3, 2)])
def test_no_draft_goes_past_the_context(length, drafted):
    rows = Rows(SuffixDrafter(config()))
    (found,) = rows.propose(([index % 3 for index in range(length)], 1))
    assert len(found) == drafted


def test_an_output_is_drafted_to_the_next_request():
    rows = Rows(SuffixDrafter(config()))
    answer = [21, 22, 23, 24, 25, 26]
    for end in range(1, len(answer) + 1):
        rows.propose(([1, *answer[:end]], 1))
    rows.propose(([2, 21], 1))
    assert rows.propose(([2, 21, 22], 1)) == [[23, 24, 25, 26]]


def test_a_wrong_key_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"suffix\.context: unknown key.*context_tokens"):
        SuffixDrafter(config(context=3))
