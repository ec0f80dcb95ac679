"""vLLM's real scheduler on the virtual clock: nothing is lost, tokens add up, equal inputs run equally."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.simulation.closed_loops import Chat
from penstock.simulation.engine import Simulation, SimulationStall, VirtualClock
from penstock.simulation.fairness import FairnessMeter
from penstock.simulation.records import Ask, Piece
from penstock.simulation.step_time import shipped
from penstock.simulation.vllm_engine import BlockHashes, EngineShape, VllmEngine, resolve
from penstock.simulation.workloads import Fixed, Keys, SharedPrefixClient, together

STEP_TIME = shipped()["opt-6.7b-a100"]
SMALL = EngineShape(kv_tokens=4096, max_model_len=2048, max_num_batched_tokens=512, max_num_seqs=16)


def mixed(seed, clients=3):
    return together(
        [
            SharedPrefixClient(
                name=f"c{n}",
                documents=4,
                questions=6,
                document_tokens=300,
                question_tokens=37,
                output_tokens=20,
                rate=8.0,
            )
            for n in range(clients)
        ],
        seed,
    )


def run(workload, shape=SMALL, make=Scheduler, **more):
    clock = VirtualClock()
    engine = VllmEngine(shape, make, clock=clock)
    return Simulation(engine, workload, STEP_TIME, clock, **more).run(), engine


def check_complete(result):
    for one in result.served:
        assert one.finished_s is not None
        assert one.output_tokens == one.ask.output_tokens
        assert one.extend_tokens + one.cached_tokens == one.prompt_tokens
        assert one.ask.arrival_s <= one.admitted_s < one.first_token_s <= one.finished_s
        assert list(one.token_times) == sorted(one.token_times)


def test_with_overlap_every_request_finishes_once_as_well():
    shape = replace(SMALL, kv_tokens=SMALL.kv_tokens // 3, async_scheduling=True)
    result, engine = run(mixed(0), shape, make=None, overlap=True)
    check_complete(result)
    assert isinstance(engine.scheduler, AsyncScheduler)
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == shape.num_blocks - 1


def test_every_request_finishes_once_and_its_tokens_add_up():
    meter = FairnessMeter(["c0", "c1", "c2"])
    result, engine = run(mixed(0), observers=(meter,))
    check_complete(result)
    assert len(result.served) == 72
    assert (
        sum(one.cached_tokens for one in result.served) / sum(one.prompt_tokens for one in result.served)
        > 0.3
    )
    assert meter.service.sum() == sum(one.extend_tokens + 2 * one.output_tokens for one in result.served)
    assert engine.scheduler.get_num_unfinished_requests() == 0
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == SMALL.num_blocks - 1


def test_a_pool_that_is_too_small_for_all_preempts_and_still_serves_everything():
    shape = EngineShape(kv_tokens=1024, max_model_len=1024, max_num_batched_tokens=512, max_num_seqs=16)
    asks = [
        Ask(request_id=f"r{n}", arrival_s=0.0, prompt=(Piece(n + 1, 64),), output_tokens=300, answer=-n)
        for n in range(8)
    ]
    result, _ = run(Fixed(asks), shape)
    check_complete(result)
    assert sum(one.preemptions for one in result.served) > 0
    assert sum(one.recomputed_tokens for one in result.served) > 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_equal_seeds_give_bit_equal_runs(policy):
    shape = EngineShape(
        kv_tokens=4096, max_model_len=2048, max_num_batched_tokens=512, max_num_seqs=16, policy=policy
    )
    first, second, other = (run(mixed(seed), shape)[0].digest() for seed in (1, 1, 2))
    assert first == second != other


def test_a_lone_request_takes_as_long_as_its_chunks_and_tokens():
    ask = Ask(request_id="a", arrival_s=3.0, prompt=(Piece(1, 1200),), output_tokens=3, answer=2)
    (served,) = run(Fixed([ask]))[0].served
    chunks = sum(0.0248 + 6.878e-5 * tokens for tokens in (512, 512, 176))
    assert served.first_token_s == pytest.approx(3.0 + chunks)
    assert served.finished_s == pytest.approx(3.0 + chunks + 2 * (0.0248 + 6.878e-5))


def test_the_next_turn_of_a_chat_hits_the_blocks_of_the_answer_before():
    chat = Chat(name="c", conversations=1, turns=3, keys=Keys(), system_tokens=200)
    result, _ = run(chat)
    first, second, third = result.served
    assert first.cached_tokens == 0
    # The last token of an answer is never computed, so the block that it would fill is not cached.
    for before, after in ((first, second), (second, third)):
        computed = before.prompt_tokens + before.output_tokens - 1
        assert after.cached_tokens == computed // 16 * 16


def test_remembered_block_hashes_are_those_of_vllms_hasher():
    init_none_hash(sha256)
    rng = random.Random(0)
    hashes = BlockHashes(16, sha256)

    class Tokens:
        mm_features, lora_request, cache_salt, prompt_embeds = (), None, None, None

        def __init__(self, tokens):
            self.all_token_ids, self.num_tokens = tokens, len(tokens)
            self.block_hashes = []

    for _ in range(50):
        prompt = tuple(
            Piece(rng.randrange(1, 4), rng.choice((5, 16, 40))) for _ in range(rng.randrange(1, 6))
        )
        tokens = [piece.key for piece in prompt for _ in range(piece.tokens)]
        assert hashes.of(prompt) == get_request_block_hasher(16, sha256)(Tokens(tokens))


@pytest.mark.parametrize("tokens", [2047, 5000])
def test_a_request_that_can_never_be_served_is_refused_with_the_limit(tokens):
    ask = Ask(request_id="long", arrival_s=0.0, prompt=(Piece(1, tokens),), output_tokens=2)
    with pytest.raises(ValueError, match=r"'long' .* allowed: 2048"):
        run(Fixed([ask]))


def test_a_scheduler_that_loses_sight_of_a_request_stalls_with_what_waits():
    class Blind(Scheduler):
        def _handle_blocked_waiting_request(self, request):
            return False

        @staticmethod
        def _is_blocked_waiting_status(status):
            return True

    with pytest.raises(SimulationStall, match=r"unfinished .* wait, the oldest 'a' of 10 tokens; 0 run"):
        run(
            Fixed([Ask(request_id="a", arrival_s=0.0, prompt=(Piece(1, 10),), output_tokens=1)]),
            make=Blind,
        )


def test_a_scheduler_with_its_own_queue_gets_what_the_client_said_and_the_virtual_clock():
    seen = {}

    class LastComeFirstServed(FCFSRequestQueue):
        def add_request(self, request):
            seen[request.request_id] = (request.sampling_params.extra_args, request.arrival_time)
            self.appendleft(request)

    def make(**arguments):
        assert {"vllm_config", "kv_cache_config", "structured_output_manager", "block_size"} <= set(arguments)
        scheduler = Scheduler(**arguments)
        scheduler.waiting = LastComeFirstServed()
        return scheduler

    clocks = []
    clock = VirtualClock()
    shape = EngineShape(kv_tokens=4096, max_model_len=2048, max_num_seqs=1)
    engine = VllmEngine(shape, make, clock=clock, prepare=lambda scheduler, given: clocks.append(given))
    asks = [
        Ask(
            request_id=f"r{n}",
            arrival_s=n * 1e-3,
            prompt=(Piece(n + 1, 50),),
            output_tokens=2,
            client="me",
            weight=2.0,
            ttft_slo_ms=100.0,
        )
        for n in range(4)
    ]
    result = Simulation(engine, Fixed(asks), STEP_TIME, clock).run()
    order = sorted(result.served, key=lambda one: one.admitted_s)
    assert [one.ask.request_id for one in order] == ["r0", "r3", "r2", "r1"]
    assert seen["r1"] == ({"client_id": "me", "weight": 2.0, "ttft_slo_ms": 100.0}, 1e-3)
    assert clocks == [clock]


def test_a_scheduler_is_found_by_its_dotted_path_or_the_missing_part_is_named():
    assert resolve("vllm.v1.core.sched.scheduler.Scheduler") is Scheduler
    with pytest.raises(ImportError, match="no_such"):
        resolve("vllm.v1.core.sched.scheduler.no_such")
    with pytest.raises(ImportError):
        resolve("vllm.no_such.Scheduler")


def asked(number, output_tokens, predictable):
    return Ask(
        request_id=f"r{number}",
        arrival_s=0.0,
        prompt=(Piece(number + 1, 50),),
        output_tokens=output_tokens,
        predictable=predictable,
    )


def test_drafts_that_foresee_every_token_end_an_answer_in_fewer_steps():
    asks = [asked(number, 31, float(number % 2)) for number in range(4)]
    result, _ = run(Fixed(asks), replace(SMALL, draft_tokens=5))
    assert [len(set(one.token_times)) for one in result.served] == [31, 6, 31, 6]


def test_vllm_s_own_schedule_by_batch_size_decides_how_many_are_drafted():
    asks = [asked(number, 30, 1.0) for number in range(4)]
    result, _ = run(Fixed(asks), replace(SMALL, draft_tokens=5, draft_schedule=((1, 2, 5), (3, 16, 0))))
    assert [len(set(one.token_times)) for one in result.served] == [30] * 4


def test_a_draft_model_makes_its_first_pass_even_where_nothing_is_drafted():
    for schedule, passes in (((), 5), (((1, 16, 0),), 1), (((1, 16, 3),), 3)):
        shape = replace(SMALL, draft_tokens=5, draft_schedule=schedule, drafter="draft_model")
        engine = VllmEngine(shape)
        engine.add(asked(0, 10, 1.0))
        assert engine.schedule().draft_steps == passes
    engine = VllmEngine(replace(SMALL, draft_tokens=5))
    engine.add(asked(0, 10, 1.0))
    assert engine.schedule().draft_steps == 0
    with pytest.raises(ValueError, match="drafter"):
        replace(SMALL, drafter="oracle")


def test_an_answer_that_ends_by_a_stop_token_is_as_long_as_was_asked_and_nobody_is_told():
    asks = [replace(asked(number, 5 + number, 0.5), most_output_tokens=400) for number in range(3)]
    for shape in (SMALL, replace(SMALL, draft_tokens=4)):
        engine = VllmEngine(shape, Scheduler)
        seen = []
        add = engine.scheduler.add_request
        engine.scheduler.add_request = lambda request, add=add, seen=seen: (
            seen.append(request.max_tokens),
            add(request),
        )
        served = Simulation(engine, Fixed(asks), STEP_TIME).run().served
        assert [one.output_tokens for one in served] == [5, 6, 7]
        assert seen == [400] * 3


def test_a_stop_token_and_a_limit_below_the_answer_are_refused_where_they_cannot_be():
    ask = replace(asked(1, 5, 0.0), most_output_tokens=400)
    engine = VllmEngine(replace(SMALL, async_scheduling=True))
    with pytest.raises(ValueError, match="async_scheduling"):
        engine.add(ask)
    with pytest.raises(ValueError, match=r"most_output_tokens of request .* given 4"):
        replace(ask, most_output_tokens=4)
