"""The clock that ranks of SGLang share: what travels with the requests, and when the time passes."""

from __future__ import annotations

import pickle
import time
from typing import Any

from penstock.plugins.sglang.shared_clock import SharedClock


class Group:
    """Ranks of one group: the first one's list reaches the others, as SGLang sends it."""

    def __init__(self) -> None:
        self.sent = b""

    def send(self, requests: list[Any] | None) -> list[Any]:
        assert requests is not None
        self.sent = pickle.dumps(requests)
        return requests

    def hear(self, requests: list[Any] | None) -> list[Any]:
        assert requests is None
        return list(pickle.loads(self.sent))


def test_ranks_have_the_first_one_s_time_and_the_requests_as_they_were():
    group, first, second = Group(), SharedClock(), SharedClock()
    assert first() == second()
    before = time.monotonic()
    for requests in (["a", "b"], [], ["c"]):
        assert first.send_along(group.send, requests) == requests
        assert second.send_along(group.hear, None) == requests
        assert before < first() == second() <= time.monotonic()
        before = first()


def test_where_time_may_come_seldom_it_comes_with_requests_and_once_in_a_while():
    group, first, second = Group(), SharedClock(1e6), SharedClock(1e6)

    def passed(*requests: str) -> float:
        assert first.send_along(group.send, list(requests)) == list(requests)
        assert second.send_along(group.hear, None) == list(requests)
        assert first() == second()
        return first()

    came = passed("a")
    assert passed() == passed() == came
    assert pickle.loads(group.sent) == []
    assert passed("b") > came
    first.begin_pass(time.monotonic() - 2e6)
    assert passed() > came


def test_it_stands_still_until_the_next_pass_begins():
    clock = SharedClock()
    clock.begin_pass(5.0)
    assert clock() == clock() == 5.0
    clock.begin_pass(5.25)
    assert clock() == 5.25


def test_what_ended_in_a_pass_is_heard_of_once_when_the_next_one_begins():
    clock, heard = SharedClock(), []
    clock.begin_pass(1.0)
    for name in ("launched", "came back"):
        clock.at_next(lambda name=name: heard.append((name, clock())))
    assert heard == []
    clock.begin_pass(2.0)
    clock.begin_pass(3.0)
    assert heard == [("launched", 2.0), ("came back", 2.0)]


def test_the_next_stage_of_a_pipeline_has_the_time_of_the_stage_before():
    before, group, first, second = SharedClock(), Group(), SharedClock(), SharedClock()
    before.begin_pass(7.0)
    sent = before.stamped(["a"])
    assert first.send_along(group.send, sent) == ["a"]
    assert second.send_along(group.hear, None) == ["a"]
    assert first() == second() == 7.0
