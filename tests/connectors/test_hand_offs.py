"""Healthy hand-offs: the bytes are right, the verifier raises no false alarm, nothing is left behind."""

from __future__ import annotations

import msgspec
import pytest
from two_engines import CONFIG, Site

from penstock.connectors.lease import LeaseEnd

LAYOUTS = [("BLHNC", "BLHNC"), ("LBHNC", "LBHNC"), ("gaps", "BLHNC"), ("gaps", "gaps")]


def prompt(site: Site) -> list[int]:
    """A prompt of up to 24 blocks that shares a prefix with many others."""
    family, shared = site.rng.randrange(4), site.rng.randrange(1, 12)
    own = site.rng.randrange(1, 1 << 30)
    length = shared + site.rng.randrange(1, 12)
    return [family * 1000 + i if i < shared else own * 1000 + i for i in range(length)]


@pytest.mark.parametrize("digest", ["full", "sampled", "off"])
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-to-".join)
def test_no_false_alarm_under_churn_with_shared_prefixes_and_local_hits(layouts, digest):
    site = Site(
        msgspec.structs.replace(CONFIG, digest=digest), seed=7, layouts=layouts, num_blocks=(160, 200)
    )
    partial = 0
    for i in range(120):
        request_id = site.request(prompt(site))
        partial += site.decode.requests[request_id].first > 0
        site.decode.step(site.rng.randrange(2))
        if i % 3 == 2:
            site.run()
        if i % 40 == 39:
            site.decode.drop_cache()
    site.run()
    assert not [r.error for r in site.decode.done.values() if r.error]
    assert len(site.decode.done) == 120
    assert partial > 10, "the test no longer exercises local prefix hits"
    assert set(site.prefill.ends.values()) == {LeaseEnd.COMMITTED}
    site.check()


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_pulls_from_its_peer_rank_and_the_lease_ends_after_the_last(ranks):
    site = Site(ranks=ranks)
    for _ in range(20):
        assert site.outcome(prompt(site)) is None
    assert set(site.prefill.ends.values()) == {LeaseEnd.COMMITTED}
    site.check()


def test_a_lease_is_held_until_the_slowest_rank_has_read():
    site = Site(ranks=2)
    site.request([1, 2, 3])
    fast, _slow = site.decode.receivers
    for _ in range(5):
        fast.step()
    site.prefill.sweep()
    assert not site.prefill.ends
    for outcome in fast.outcomes():
        site.decode._take(0, outcome)
    site.run()
    assert list(site.prefill.ends.values()) == [LeaseEnd.COMMITTED]
    site.check()


@pytest.mark.parametrize(("layout", "descriptors"), [("BLHNC", 1), ("LBHNC", 3), ("gaps", 40)])
def test_a_joint_run_takes_one_descriptor_a_dense_strip(layout, descriptors):
    site = Site(layouts=(layout, layout))
    request_id = site.request(range(40))
    site.run()
    stats = site.decode.done[request_id].outcomes[0].stats
    assert stats.num_bytes == 40 * site.decode.pool.geometries[0].block_bytes
    assert stats.num_descriptors == descriptors
