"""Rows that move, stop and come back are known again by their tokens."""

from __future__ import annotations

import random

import numpy as np

from penstock.schedulers.suffix.rows import RowTexts


class Batch:
    """Requests in rows, as a worker has them: rows are swapped, left and taken again."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.texts = {}
        self.made = 0

    def arrive(self):
        self.made += 1
        shared = [7] * self.rng.choice((0, 40))
        self.texts[self.made] = [*shared, *(self.rng.randrange(50) for _ in range(self.rng.randint(1, 60)))]

    def rows(self):
        present = [name for name in self.texts if self.rng.random() < 0.8]
        self.rng.shuffle(present)
        for name in present:
            text = self.texts[name]
            before = len(text)
            text += [self.rng.randrange(50) for _ in range(self.rng.randint(1, 4))]
            yield name, np.array([*text, *[0] * 50], dtype=np.int32), before, len(text)


def test_a_request_keeps_its_name_whatever_row_it_is_in():
    for seed in range(20):
        batch, rows, known = Batch(seed), RowTexts(most=100), {}
        for _ in range(60):
            if batch.rng.random() < 0.3:
                batch.arrive()
            assert rows.begin_step() == []
            for request, tokens, before, after in batch.rows():
                name, new = rows.find(tokens, before, after)
                assert new == (request not in known)
                assert known.setdefault(request, name) == name
            rows.check_integrity()


def test_equal_texts_get_names_of_their_own():
    rows, tokens = RowTexts(most=10), np.arange(30)
    rows.begin_step()
    names = {rows.find(tokens, 10, 11)[0] for _ in range(3)}
    rows.begin_step()
    assert len(names) == 3
    assert {rows.find(tokens, 11, 12)[0] for _ in range(3)} == names


def test_texts_that_do_not_grow_are_given_up():
    rows = RowTexts(most=10, idle_steps=3)
    rows.begin_step()
    idle, _ = rows.find(np.arange(30), 5, 6)
    busy, _ = rows.find(np.arange(50, 90), 5, 6)
    given_up = []
    for step in range(5):
        given_up += rows.begin_step()
        assert rows.find(np.arange(50, 90), 6 + step, 7 + step) == (busy, False)
    assert given_up == [idle]
    rows.check_integrity()


def test_more_texts_than_there_is_room_for_are_given_up_longest_idle_first():
    rows = RowTexts(most=2)
    rows.begin_step()
    names = [rows.find(np.arange(start, start + 30), 5, 6)[0] for start in (0, 100, 200)]
    assert rows.begin_step() == names[:1]
    assert len(rows) == 2
