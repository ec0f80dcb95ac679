"""One run of the DLPM bench: a workload under a policy, run to completion, measured and checked."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from penstock.benchmarks.dlpm_cases import QUANTUM, STOCK, Case, Policy, cases, fair
from penstock.schedulers.waiting import ClientService
from penstock.simulation.engine import Result, Simulation, Step, VirtualClock
from penstock.simulation.fairness import OUTPUT_WEIGHT, FairnessMeter
from penstock.simulation.measures import hit_rate, percentile, throughput, ttfts
from penstock.simulation.records import Served
from penstock.simulation.step_time import StepTime

MAX_MODEL_LEN = 131_072


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one run gave. Jain's indices and the gap are over the time in which clients were backlogged.

    ``jain_extend`` is of prompt tokens computed, ``jain_service`` of those plus twice the tokens generated,
    ``jain_input`` of whole prompts, cached tokens included;
    ``gap`` is in weighted tokens, ``batch`` the weighted tokens of the largest step's requests. ``faults``
    are the checks that failed.
    """

    requests: int
    tokens_per_s: float
    hit_rate: float
    jain_extend: float
    jain_service: float
    jain_input: float
    backlogged_share: float
    shared_service: float
    """Service of the mean client while all clients were backlogged, in weighted tokens."""
    gap: float
    batch: float
    waits: int
    p50_ttft_s: float
    p99_ttft_s: float
    longest_ttft_s: float
    """Of the clients that behave, which have so many ``waits``."""
    preemptions: int
    digest: str
    faults: tuple[str, ...] = ()


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A run by name, so that it can be sent to another process. Its outcome counts under ``label``."""

    label: str
    case: str
    policy: Policy
    seed: int
    step_time: StepTime
    quick: bool
    trace: Path | None = None


def available(policy: Policy) -> bool:
    """Whether this installation has the scheduler that a policy names, given that it has vLLM."""
    if policy.scheduler_cls == STOCK:
        return True
    module = policy.scheduler_cls.rpartition(".")[0]
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def measure(task: Task) -> Outcome:
    """Run it."""
    case = next(case for case in cases(quick=task.quick, trace=task.trace) if case.name == task.case)
    return run_case(case, task.policy, task.seed, task.step_time)


class DeficitWatch:
    """Follows the standing of every client that a policy with ``WaitingOrder.clients`` remembers."""

    def __init__(self, order: Any) -> None:
        """``order`` is that policy, or None for one that remembers nobody."""
        self._order = order
        self.low, self.high = math.inf, -math.inf

    def stepped(self, step: Step) -> None:
        """Look at all clients."""
        for client in self.clients():
            self.low, self.high = min(self.low, client.standing), max(self.high, client.standing)

    def clients(self) -> list[ClientService]:
        """All clients that are remembered; none under a stock policy."""
        return [] if self._order is None else list(self._order.clients())


def run_case(case: Case, policy: Policy, seed: int, step_time: StepTime) -> Outcome:
    """One workload under one policy."""
    from penstock.simulation.vllm_engine import EngineShape, VllmEngine, resolve

    clock = VirtualClock()
    make = resolve(policy.scheduler_cls)
    shape = EngineShape(
        kv_tokens=case.kv_tokens,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=case.max_num_seqs,
        policy=policy.scheduling_policy,
        additional_config=policy.additional_config,
    )
    engine = VllmEngine(shape, make if policy.scheduler_cls == STOCK else partial(make, clock=clock))
    watch = DeficitWatch(getattr(engine.scheduler.waiting, "order", None))
    meter = FairnessMeter(case.clients)
    result = Simulation(engine, case.make(seed), step_time, clock, (meter, watch)).run()
    return outcome_of(case, policy, result, meter, watch)


def outcome_of(
    case: Case, policy: Policy, result: Result, meter: FairnessMeter, watch: DeficitWatch
) -> Outcome:
    """What a run gave, and which checks it failed."""
    waits = [
        time for name, times in ttfts(result.served).items() if name not in case.unruly for time in times
    ]
    return Outcome(
        requests=len(result.served),
        tokens_per_s=throughput(result.served, result.makespan_s),
        hit_rate=hit_rate(result.served),
        jain_extend=meter.jain_extend(),
        jain_service=meter.jain_service(),
        jain_input=meter.jain_input(),
        backlogged_share=meter.backlogged_s / result.makespan_s,
        shared_service=meter.service_while_all_wait(),
        gap=meter.largest_gap,
        batch=meter.largest_batch,
        waits=len(waits),
        p50_ttft_s=percentile(waits, 0.5),
        p99_ttft_s=percentile(waits, 0.99),
        longest_ttft_s=max(waits),
        preemptions=sum(one.preemptions for one in result.served),
        digest=result.digest(),
        faults=(*complete(result), *balanced(result.served, watch), *bounded(case, policy, watch)),
    )


def complete(result: Result) -> list[str]:
    """Every request finished with all its tokens, and the engine never idled while one waited."""
    faults = []
    for one in result.served:
        whole = one.output_tokens == one.ask.output_tokens
        if one.finished_s is None or not whole or one.extend_tokens + one.cached_tokens != one.prompt_tokens:
            faults.append(f"{one.ask.request_id} is incomplete")
    if result.idle_ticks:
        faults.append(f"{result.idle_ticks} steps scheduled nothing while requests waited")
    return faults


def balanced(served: list[Served], watch: DeficitWatch) -> list[str]:
    """What the policy charged each client is what was computed and generated for it."""
    charged = {one.client: (one.extend_tokens, one.output_tokens) for one in watch.clients()}
    if not charged:
        return []
    due: dict[str, tuple[int, int]] = {}
    for one in served:
        extend, output = due.get(one.ask.client, (0, 0))
        due[one.ask.client] = (extend + one.extend_tokens, output + one.output_tokens)
    return [
        f"{client} was charged {charged.get(client)} extend and output tokens, served {tokens}"
        for client, tokens in due.items()
        if charged.get(client) != tokens
    ]


def bounded(case: Case, policy: Policy, watch: DeficitWatch) -> list[str]:
    """-U < deficit <= quantum, U the longest prompt and the output weight times what the KV cache holds."""
    settings = policy.additional_config.get("penstock", {}).get("scheduler", {})
    if settings.get("policy") != "dlpm" or watch.high == -math.inf:
        return []
    quantum = settings.get("quantum_tokens", QUANTUM)
    most = min(MAX_MODEL_LEN, case.kv_tokens) + OUTPUT_WEIGHT * case.kv_tokens
    if -most < watch.low and watch.high <= quantum:
        return []
    return [
        f"deficits went from {watch.low:g} to {watch.high:g}, allowed: above {-most:g}, up to {quantum:g}"
    ]


def endless_quantum() -> Policy:
    """DLPM that never has to refill: it must serve as LPM does."""
    return fair("dlpm", quantum_tokens=1e9, ageing_tokens_per_s=0.0)
