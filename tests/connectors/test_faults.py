"""What a fault leaves behind: right bytes or a typed error, every lease ended once, no block lost, service.

The cases are numbered as in the project's catalogue of known faults of disaggregated serving (F1 ...).
"""

from __future__ import annotations

import msgspec
import pytest
from two_engines import CONFIG, PREFILL, Site, blocks_handed_off

from penstock.connectors.errors import (
    DigestMismatchError,
    HandOffError,
    PeerUnreachableError,
    StaleReadError,
    TransferFailedError,
)
from penstock.connectors.handoff import parse_hand_off
from penstock.connectors.lease import Commit, LeaseEnd
from penstock.connectors.messages import EndOfRead, Release, Released, Renew, Renewed, Stale
from penstock.connectors.transports.faulty import Fault, seeded_script

KEYS = list(range(100, 112))
OTHERS = list(range(200, 209))
LAYOUTS = [("BLHNC", "BLHNC"), ("LBHNC", "LBHNC"), ("gaps", "BLHNC")]


def config(**changes: object):
    return msgspec.structs.replace(CONFIG, **changes)


def test_f1_abort_at_decode_with_the_prefill_server_gone_too_returns_all_blocks(site):
    assert site.outcome(OTHERS) is None
    site.decode.script(Fault.HANGS)
    hanging, read = site.request(OTHERS), site.request(KEYS)
    site.prefill.die()
    site.run()
    for _ in range(2):
        site.clock.advance(CONFIG.transfer_timeout_s)
        site.run()
    assert isinstance(site.decode.error_of(hanging), TransferFailedError)
    assert isinstance(site.decode.error_of(read), PeerUnreachableError)
    site.prefill.start()
    site.check()


@pytest.mark.parametrize("stage", ["handshake", "read", "end of read", "digests"])
def test_f2_no_wait_is_without_a_deadline(site, stage):
    assert site.outcome(OTHERS) is None
    if stage == "handshake":
        site.wire.servers[PREFILL] = site.wire.servers.pop(PREFILL)
        site.decode.receivers[0]._peers.clear()
        site.wire.silent.add(PREFILL)
    elif stage == "read":
        site.decode.script(Fault.HANGS)
    elif stage == "end of read":
        site.wire.lost = lambda question: isinstance(question, EndOfRead)
    request_id = site.decode.pull(site.prefill.prefill(KEYS, hashed=stage != "digests"), KEYS)
    site.run()
    assert request_id in site.decode.requests
    for _ in range(5):
        site.clock.advance(CONFIG.handshake_timeout_s)
        site.decode.renew()
        site.run()
    assert site.decode.error_of(request_id) is not None
    site.wire.silent.clear()
    site.wire.lost = lambda question: False
    site.check()


def test_f3_a_hand_off_that_nobody_asks_for_costs_the_blocks_until_pickup_is_over(site):
    site.prefill.prefill(KEYS)
    site.clock.advance(CONFIG.pickup_s - 0.001)
    site.prefill.sweep()
    assert not site.prefill.ends
    site.clock.advance(0.001)
    site.prefill.sweep()
    assert list(site.prefill.ends.values()) == [LeaseEnd.EXPIRED]
    site.check()


def test_f4_after_the_last_renewal_the_blocks_come_back_within_one_lease(site):
    hand_off = site.prefill.prefill(KEYS)
    for _ in range(3):
        site.clock.advance(CONFIG.lease_s - 1)
        assert site.prefill.sender.answer(Renew([hand_off.remote_lease])) == Renewed([])
        site.prefill.sweep()
    assert not site.prefill.ends
    site.clock.advance(CONFIG.lease_s)
    site.prefill.sweep()
    assert list(site.prefill.ends.values()) == [LeaseEnd.EXPIRED]
    assert site.prefill.sender.answer(Renew([hand_off.remote_lease])) == Renewed([hand_off.remote_lease])
    site.check()


def test_f5_a_post_that_fails_fails_its_request_only(site):
    assert site.outcome(OTHERS) is None
    site.decode.script(None, Fault.POST_FAILS, None)
    requests = [site.request([900 + 20 * i + j for j in range(8)]) for i in range(3)]
    site.run()
    errors = [site.decode.error_of(request_id) for request_id in requests]
    assert [type(error) for error in errors] == [type(None), TransferFailedError, type(None)]
    site.check()


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-to-".join)
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.HALF_THEN_FAILS, TransferFailedError),
        (Fault.DROPS_A_DESCRIPTOR, DigestMismatchError),
        (Fault.FLIPS_A_BYTE, DigestMismatchError),
    ],
)
def test_f6_bytes_that_did_not_land_are_never_reported_as_right(layouts, fault, error):
    for seed in range(8):
        site = Site(seed=seed, layouts=layouts)
        site.prefill.pool.churn()
        site.decode.script(fault)
        failure = site.outcome(KEYS[: seed + 1])
        assert isinstance(failure, error)
        site.check()


def test_f6_a_fault_on_one_rank_fails_the_request_as_a_whole():
    site = Site(ranks=2)
    site.decode.script(Fault.FLIPS_A_BYTE, rank=1)
    request_id = site.request(KEYS)
    site.run()
    outcomes = site.decode.done[request_id].outcomes
    assert outcomes[0].error is None
    assert isinstance(outcomes[1].error, DigestMismatchError)
    site.check()


def test_f6_a_wrong_byte_before_the_local_hit_is_not_our_bytes(site):
    """Only the blocks that were pulled are compared: the sender's hash of the others is not used."""
    site.decode.cache = {key: site.decode.pool.allocate(1)[0] for key in KEYS[:5]}
    for key, block in site.decode.cache.items():
        site.decode.pool.write(block, key)
    hand_off = site.prefill.prefill(KEYS)
    site.prefill.pool.write(blocks_handed_off(hand_off)[2], 777)
    site.prefill.hash("p1")
    request_id = site.decode.pull(hand_off, KEYS)
    site.run()
    assert site.decode.done[request_id].first == 5
    assert site.decode.error_of(request_id) is None


@pytest.mark.parametrize("digest", ["off", "full"])
def test_f7_a_lease_that_ran_out_in_the_decode_queue_is_not_read(digest):
    site = Site(config(digest=digest))
    hand_off = site.prefill.prefill(KEYS)
    site.clock.advance(CONFIG.pickup_s)
    site.prefill.sweep()
    request_id = site.decode.pull(hand_off, KEYS)
    site.run()
    assert isinstance(site.decode.error_of(request_id), StaleReadError)
    assert list(site.prefill.ends.values()) == [LeaseEnd.EXPIRED]
    assert site.prefill.sender.leases.take_stale_refused() == 1
    site.check()


@pytest.mark.parametrize("digest", ["off", "full"])
def test_f7_a_lease_that_runs_out_between_the_read_and_its_end_is_refused(digest):
    site = Site(config(digest=digest))
    assert site.outcome(OTHERS) is None
    request_id = site.request(KEYS)
    site.clock.advance(CONFIG.pickup_s)
    site.run()
    assert isinstance(site.decode.error_of(request_id), StaleReadError)
    site.check()


@pytest.mark.parametrize("when", ["before the read", "after the read"])
def test_f7_blocks_reassigned_under_a_live_lease_are_told_by_their_epoch(when):
    """The same block ids, the lease still held, no digests: only the allocation counter gives it away."""
    site = Site(config(digest="off"))
    assert site.outcome(OTHERS) is None
    hand_off = site.prefill.prefill(KEYS)
    if when == "after the read":
        request_id = site.decode.pull(hand_off, KEYS)
    site.prefill.pool.free(site.prefill.held["p2"])
    site.prefill.pool.churn()
    again = site.prefill.pool.allocate(site.prefill.pool.num_free)
    assert set(blocks_handed_off(hand_off)) <= set(again)
    if when == "before the read":
        request_id = site.decode.pull(hand_off, KEYS)
    site.decode.step(4)
    assert isinstance(site.decode.error_of(request_id), StaleReadError)
    site.prefill.pool.free([block for block in again if block not in site.prefill.held["p2"]])
    site.check()


def test_f8_target_blocks_are_not_reported_while_the_transfer_can_still_write(site):
    """The transfer refuses to be cancelled and goes on writing; the pool finds a write to a free block."""
    site.decode.script(Fault.HANGS_HARD)
    request_id = site.request(KEYS)
    site.decode.step(5)
    blocks = site.decode.requests[request_id].blocks
    assert not site.decode.pool.holds(blocks[0], KEYS[0])
    site.clock.advance(CONFIG.transfer_timeout_s)
    site.decode.step(2)
    assert site.decode.pool.holds(blocks[0], KEYS[0]), "the test's transfer no longer writes late"
    assert request_id in site.decode.requests, "reported although cancelling has not succeeded"
    site.decode.step()
    assert isinstance(site.decode.error_of(request_id), TransferFailedError)
    site.check()


def test_f9_a_restarted_prefill_server_is_found_again_and_its_old_hand_offs_fail(site):
    assert site.outcome(OTHERS) is None
    old = [site.prefill.prefill(KEYS), site.prefill.prefill(OTHERS)]
    site.prefill.die()
    site.prefill.start()
    requests = [site.decode.pull(old[0], KEYS), site.decode.pull(old[1], OTHERS)]
    site.run(8)
    assert all(site.decode.error_of(request_id) is not None for request_id in requests)
    assert site.outcome(KEYS) is None
    site.check()


def test_f9_a_hand_off_of_another_life_is_refused_before_any_byte_moves(site):
    old = site.prefill.prefill(KEYS)
    site.prefill.die()
    site.prefill.start()
    request_id = site.decode.pull(old, KEYS)
    site.run()
    assert isinstance(site.decode.error_of(request_id), PeerUnreachableError)
    assert "restarted" in str(site.decode.error_of(request_id))
    assert site.decode.transports[0].reads == 0
    site.check()


def test_f10_a_prefill_server_that_dies_in_the_handshake_fails_all_that_wait_for_it(site):
    hand_offs = [site.prefill.prefill([k + 50 * i for k in KEYS]) for i in range(4)]
    site.wire.silent.add(PREFILL)
    requests = [site.decode.pull(h, [k + 50 * i for k in KEYS]) for i, h in enumerate(hand_offs)]
    site.clock.advance(CONFIG.handshake_timeout_s - 0.001)
    site.run()
    assert not site.decode.done
    site.clock.advance(0.001)
    site.run()
    assert {type(site.decode.error_of(r)) for r in requests} == {PeerUnreachableError}
    site.wire.silent.clear()
    site.check()


def test_f11_what_is_said_about_an_ended_lease_is_ignored(site):
    hand_off = site.prefill.prefill(KEYS)
    sender, lease = site.prefill.sender, hand_off.remote_lease
    assert sender.answer(Release([lease], "aborted")) == Released(1)
    for _ in range(2):
        assert sender.answer(Release([lease, "f" * 32], "aborted")) == Released(0)
        assert sender.answer(EndOfRead(lease, 0)) == Stale()
        assert sender.answer(Renew([lease])) == Renewed([lease])
        sender.add_digests("p1", 0, None)
        site.prefill.sweep()
    assert list(site.prefill.ends.values()) == [LeaseEnd.RELEASED]
    site.check()


def test_f11_an_abort_at_decode_before_the_pull_gives_the_blocks_back_at_once(site):
    hand_off = site.prefill.prefill(KEYS)
    site.decode.link.ask(PREFILL, Release([hand_off.remote_lease], "client disconnected"))
    site.run(1)
    assert list(site.prefill.ends.values()) == [LeaseEnd.RELEASED]
    site.check()


@pytest.mark.parametrize("foreign", ["runs", "lease", "first"])
def test_f13_a_hand_off_that_does_not_fit_fails_its_request_only(site, foreign):
    """Parameters that parse and yet belong to something else."""
    assert site.outcome(OTHERS) is None
    hand_off = site.prefill.prefill(KEYS)
    keys = KEYS
    if foreign == "runs":
        params = {**hand_off.to_params(), "remote_runs": [[1 << 20, len(KEYS)]]}
        hand_off = parse_hand_off(params)
    elif foreign == "lease":
        hand_off = parse_hand_off({**hand_off.to_params(), "remote_lease": "e" * 32})
    else:
        keys = [*KEYS, 1, 2, 3]
    request_id = site.decode.pull(hand_off, keys)
    site.run()
    expected = StaleReadError if foreign == "lease" else TransferFailedError
    assert isinstance(site.decode.error_of(request_id), expected)
    site.check()


def test_f13_runs_that_do_not_hold_the_tokens_are_refused_at_the_edge(site):
    params = site.prefill.prefill(KEYS).to_params()
    with pytest.raises(HandOffError, match="hold 12 blocks, but 52 tokens in blocks of 4 take 13"):
        parse_hand_off({**params, "remote_num_tokens": 52})


def test_f17_blocks_of_a_prompt_that_lost_them_are_never_handed_over(site):
    """Preempted after the hand-off was made: released and reused, the hand-off is worth nothing."""
    hand_off = site.prefill.prefill(KEYS)
    site.prefill.sender.leases.release([hand_off.remote_lease])
    site.prefill.sweep()
    request_id = site.decode.pull(hand_off, KEYS)
    site.run()
    assert isinstance(site.decode.error_of(request_id), StaleReadError)
    site.check()


def test_digests_that_come_late_are_waited_for(site):
    request_id = site.decode.pull(site.prefill.prefill(KEYS, hashed=False), KEYS)
    for _ in range(3):
        site.decode.step(3)
        site.clock.advance(0.01)
    assert request_id in site.decode.requests
    assert site.prefill.sender.leases.commit("f" * 32, 0) == (Commit.STALE, None)
    site.prefill.hash("p1")
    site.run()
    assert site.decode.error_of(request_id) is None
    site.check()


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_faults_leaves_nothing_behind(seed):
    """A long life: scripted transfers, lost answers, restarts, silence and time, two ranks or one."""
    site = Site(
        config(digest="full"),
        seed=seed,
        ranks=1 + seed % 2,
        layouts=LAYOUTS[seed % 3],
        num_blocks=(220, 260),
    )
    for rank, transport in enumerate(site.decode.transports):
        transport.script = seeded_script(seed * 10 + rank, Fault, calls=400, share=0.25)
    rng, kept = site.rng, []
    for i in range(80):
        keys = [rng.randrange(6) * 100 + j for j in range(rng.randrange(1, 5))] + [
            10_000 + 100 * i + j for j in range(rng.randrange(1, 10))
        ]
        keys = list(dict.fromkeys(keys))
        if site.prefill.pool.num_free >= len(keys):
            kept.append((site.prefill.prefill(keys, hashed=rng.random() < 0.9), keys))
        if kept and rng.random() < 0.8:
            hand_off, keys = kept.pop(rng.randrange(len(kept)))
            if site.decode.pool.num_free >= len(keys):
                site.decode.pull(hand_off, keys)
        match rng.randrange(12):
            case 0:
                site.prefill.die()
                site.prefill.start()
            case 1:
                site.wire.lost = lambda question: rng.random() < 0.3
            case 2:
                site.wire.silent.add(PREFILL)
            case 3 | 4:
                site.clock.advance(rng.uniform(0, 25))
            case 5 | 6 | 7:
                site.wire.silent.clear()
                site.wire.lost = lambda question: False
                site.decode.renew()
        site.run(rng.randrange(4))
    site.wire.silent.clear()
    site.wire.lost = lambda question: False
    for transport in site.decode.transports:
        transport.script = {}
    for _ in range(8):
        site.clock.advance(CONFIG.transfer_timeout_s)
        site.run(8)
    assert {type(r.error) for r in site.decode.done.values()} >= {type(None), TransferFailedError}
    site.check()
