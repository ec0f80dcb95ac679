"""Drafts for a batch of SGLang's, from requests whose tokens are partly not reported yet.

Every request has as many positions in a verification as any other: ``width``, of which the first is its last
sure token. What is likely to come next has the others, wherever it branches; what is left is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.drafter import SuffixDrafter
from penstock.schedulers.suffix.tree import DraftTree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Row(NamedTuple):
    """A request: its prompt, its output as far as SGLang has processed it, and tokens after that which are
    accepted and not processed yet. One token of output at least."""

    name: str
    prompt: Sequence[int]
    output: Sequence[int]
    unprocessed: Sequence[int]


def rows_of(batch: ScheduleBatch, width: int) -> list[Row]:
    """The requests of a batch that is about to decode.

    With overlap, results are processed while the next pass runs; with a grammar, or with prompts in between,
    they are processed before. What is not processed is what the cache holds more of than outputs do, and the
    end of what the request's last verification accepted.
    """
    # The last token of a text has no place in the cache yet.
    missing = [
        length + 1 - len(req.origin_input_ids) - len(req.output_ids)
        for req, length in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True)
    ]
    if not any(count > 0 for count in missing):
        return [Row(req.rid, req.origin_input_ids_unpadded, req.output_ids, []) for req in batch.reqs]
    accepted = batch.spec_info.accept_tokens.reshape(len(batch.reqs), width).tolist()
    rows = zip(batch.reqs, missing, accepted, batch.spec_info.accept_lens.tolist(), strict=True)
    return [
        Row(req.rid, req.origin_input_ids_unpadded, req.output_ids, tokens[:end] if count > 0 else [])
        for req, count, tokens, end in rows
    ]


class BatchDrafts(NamedTuple):
    """What a batch would verify: token ids ``[rows, width]``; which position is among the ancestors of which,
    itself included, ``[rows, width, width]``; how many tokens are drafts, and whether any is likely enough to
    be verified at all."""

    tokens: Tokens
    mask: Mask
    drafted: int
    worthwhile: bool


class BatchTexts:
    """Texts of the requests that decode, and drafts of them: trees of up to ``branches`` tokens in one place,
    chains where that is 1."""

    def __init__(self, config: SuffixConfig, width: int, branches: int) -> None:
        self._config = config
        self._width = width
        self._branches = branches
        self.reset()

    def reset(self) -> None:
        """Forget everything: SGLang flushes its caches."""
        self._texts = SuffixDrafter(self._config)
        self._said: dict[str, int] = {}

    def __len__(self) -> int:
        """Requests that are followed."""
        return len(self._texts)

    def drafts(self, rows: Sequence[Row]) -> BatchDrafts:
        """Follow the texts of ``rows``, which are all that decode, and draft what comes next. What requests
        said that are in no row any more is remembered, they are not."""
        for name in self._said.keys() - {row.name for row in rows}:
            self._leave(name)
        self._texts.begin_step()
        tokens = np.empty((len(rows), self._width), dtype=np.int64)
        mask = np.empty((len(rows), self._width, self._width), dtype=np.bool_)
        trees = []
        for row, row_tokens, row_mask in zip(rows, tokens, mask, strict=True):
            last = self._follow(row)
            tree = self._texts.propose_tree(row.name, self._width - 1, self._branches)
            lay_out(last, tree, row_tokens, row_mask, chain=self._branches == 1)
            trees.append(tree)
        least, match = self._config.least_probability, self._config.least_match_tokens
        worthwhile = any(tree.likely(least, match) for tree in trees)
        return BatchDrafts(tokens, mask, sum(map(len, trees)), worthwhile)

    def _follow(self, row: Row) -> int:
        """Bring the row's text up to date; returns its last token."""
        length = len(row.output) + len(row.unprocessed)
        said = self._said.get(row.name)
        # A request whose memory was taken back may come again with less than it had said.
        if said is None or said > length:
            if said is not None:
                self._leave(row.name)
            before = [*row.prompt, *row.output, *row.unprocessed]
            new = [before.pop()]
            self._texts.open(row.name, before)
        else:
            new = [*row.output[said:], *row.unprocessed[max(0, said - len(row.output)) :]]
        self._said[row.name] = length
        self._texts.extend(row.name, new)
        return int(row.unprocessed[-1] if len(row.unprocessed) else row.output[-1])

    def _leave(self, name: str) -> None:
        del self._said[name]
        self._texts.close(name)


def lay_out(last: int, tree: DraftTree, tokens: Tokens, mask: Mask, *, chain: bool) -> None:
    """Write a tree behind ``last`` into one request's positions: ``tokens [width]``, ``mask [width, width]``.

    Padding repeats ``last``, which a text that repeats makes the best of, as a chain behind what of the tree
    repeats it: no token stands twice in one place, as a verification that samples adds the probabilities of
    those that do. In a chain it hangs off the position before it, whatever that holds: attention that reads
    no mask takes positions for a chain.
    """
    width, drafted = len(tokens), len(tree)
    tokens[0] = last
    tokens[1 : 1 + drafted] = tree.tokens
    tokens[1 + drafted :] = last
    if chain:
        mask[:] = np.tri(width, dtype=np.bool_)
        return
    paths, end = [[0]], 0
    for position in range(1, width):
        parent = tree.parents[position - 1] + 1 if position <= drafted else end
        paths.append([*paths[parent], position])
        if parent == end and tokens[position] == last:
            end = position
    mask[:] = False
    mask[[path[-1] for path in paths for _ in path], [place for path in paths for place in path]] = True
