"""Digests that are late: the receiver asks again soon at first, then seldom, and hears of them in time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from two_engines import CONFIG

from penstock.connectors.messages import EndOfRead
from penstock.connectors.receiver import ASK_AGAIN_LONGEST_S, ASK_AGAIN_S

KEYS = [1, 2, 3]
TICK_S = ASK_AGAIN_S / 4


def times_asked(site, seconds: float) -> list[float]:
    """When the end of the read is asked about, over ``seconds`` from here, in steps of ``TICK_S``."""
    times, start = [], site.clock()
    for _ in range(round(seconds / TICK_S)):
        before = len(site.wire.asked)
        site.run()
        times += [site.clock() - start] * sum(isinstance(q, EndOfRead) for q in site.wire.asked[before:])
        site.clock.advance(TICK_S)
    return times


def test_pauses_double_up_to_the_longest(site):
    site.decode.pull(site.prefill.prefill(KEYS, hashed=False), KEYS)
    times = times_asked(site, 1.0)
    pauses = [later - earlier for earlier, later in pairwise(times)]
    expected = [min(ASK_AGAIN_S * 2**i, ASK_AGAIN_LONGEST_S) for i in range(len(pauses))]
    assert len(times) < 30
    assert pauses == pytest.approx(expected, abs=1.5 * TICK_S)


@pytest.mark.parametrize("late_s", [0.0, 0.003, 0.4, CONFIG.transfer_timeout_s - 0.1])
def test_late_digests_are_heard_of_within_the_longest_pause(site, late_s):
    hand_off = site.prefill.prefill(KEYS, hashed=False)
    request_id = site.decode.pull(hand_off, KEYS)
    site.run()
    site.clock.advance(late_s)
    site.run()
    assert request_id in site.decode.requests
    site.prefill.hash(next(iter(site.prefill.held)))
    site.clock.advance(ASK_AGAIN_LONGEST_S)
    site.run()
    assert site.decode.error_of(request_id) is None
    site.check()
