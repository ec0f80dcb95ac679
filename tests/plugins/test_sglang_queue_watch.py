"""Who came to a list of waiting requests and who left it, whatever became of the list."""

from __future__ import annotations

import random

import pytest

from penstock.plugins.sglang.queue_watch import QueueWatch


class Request:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"r{self.number}"


@pytest.mark.parametrize("seed", range(20))
def test_those_who_came_and_left_are_told_once_each(seed):
    draw = random.Random(seed)
    watch, queue, known, serial = QueueWatch(), [], [], 0
    for _ in range(60):
        came, left = watch.look(queue)
        assert list(came) == [one for one in queue if one not in known]
        assert set(left) == set(known) - set(queue)
        assert watch.waiting() == queue
        known = list(queue)
        taken = draw.sample(queue, k=min(len(queue), draw.choice((0, 0, 1, 3))))
        for one in taken:
            watch.took(one)
        queue = [one for one in queue if one not in taken]
        known = [one for one in known if one not in taken]
        assert watch.waiting() == known
        if draw.random() < 0.3:
            queue = [one for one in queue if draw.random() < 0.8]
        if draw.random() < 0.2:
            draw.shuffle(queue)
        # One that was taken may be thrown out and wait again.
        back = [one for one in taken if draw.random() < 0.3]
        for _ in range(draw.choice((0, 1, 4))):
            serial += 1
            back.append(Request(serial))
        queue = [*back, *queue] if draw.random() < 0.2 else [*queue, *back]


def test_a_list_that_changes_later_does_not_change_what_was_seen():
    watch, first, second = QueueWatch(), Request(1), Request(2)
    queue = [first]
    watch.look(queue)
    queue[0] = second
    assert watch.look(queue) == ([second], [first])
