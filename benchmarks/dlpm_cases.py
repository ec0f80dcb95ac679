"""The workloads of the DLPM bench, and the waiting policies that they are put to.

Lengths and misbehaviour follow the DLPM evaluation (arXiv 2501.14312): long-document QA, LLM-as-judge, tree
of thought, multi-turn chat; S1 (one client has wider trees, more dimensions), S2 (twice the documents, ten
times the questions, 600 tokens more). The KV cache is sized so that one client's documents fit and all
clients' do not: only then does the order of service decide what the prefix cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from penstock.simulation.closed_loops import Chat, Several, TreeOfThought
from penstock.simulation.engine import Workload
from penstock.simulation.traces import read_mooncake, replay
from penstock.simulation.workloads import (
    Fixed,
    Keys,
    SharedPrefixClient,
    flood,
    judge,
    long_document_qa,
    mooncake_prefixes,
    together,
)

REQUEST_SCHEDULER = "penstock.plugins.vllm.request_scheduler.make_scheduler"
STOCK = "vllm.v1.core.sched.scheduler.Scheduler"
QUANTUM = 2000.0
MOST_CLIENTS = 32


@dataclass(frozen=True, slots=True)
class Policy:
    """How an engine is started: ``--scheduler-cls``, ``--scheduling-policy`` and ``--additional-config``."""

    name: str
    scheduler_cls: str = STOCK
    scheduling_policy: str = "fcfs"
    additional_config: Mapping[str, Any] = field(default_factory=dict)


def ours(policy: str, **settings: Any) -> Policy:
    """A policy of the request scheduler, chosen as in ``vllm serve``."""
    return Policy(
        policy,
        REQUEST_SCHEDULER,
        additional_config={"penstock": {"scheduler": {"policy": policy, **settings}}},
    )


def fair(policy: str, **settings: Any) -> Policy:
    """DLPM or VTC with an account for each of a case's clients: they may all come in one instant, and more
    newcomers are let in only after a refill."""
    return ours(policy, newcomers_per_refill=MOST_CLIENTS, **settings)


POLICIES = (
    Policy("fcfs"),
    Policy("priority", scheduling_policy="priority"),
    ours("lpm", ageing_tokens_per_s=0.0),
    fair("vtc"),
    fair("dlpm", quantum_tokens=QUANTUM),
)
"""Peers first. ``priority`` is given each request's number at its client: round robin between clients, the
best that stock vLLM can be made to do for fairness. LPM is the bare one, under which prompts may starve."""

PEERLESS = tuple(policy for policy in POLICIES if policy.name in {"fcfs", "lpm", "dlpm"})
"""For cases of one client, where VTC and priority are first come, first served."""


@dataclass(frozen=True, slots=True)
class Case:
    """One workload: ``make(seed)`` for ``clients`` on a KV cache of ``kv_tokens``.

    ``unruly`` clients ask for more than the others; where there are none, all behave. Cases that are not for
    ``peers`` are there for settings of DLPM alone, and count in no claim.
    """

    name: str
    clients: tuple[str, ...]
    make: Callable[[int], Workload]
    kv_tokens: int
    unruly: frozenset[str] = frozenset()
    max_num_seqs: int = 256
    most_local: bool = False
    flood: bool = False
    peers: bool = True


NAMES = tuple(f"client-{n}" for n in range(4))


def cases(*, quick: bool, trace: Path | None = None) -> list[Case]:
    """All workloads; ``trace`` is a Mooncake trace.

    ``quick``: shorter documents, fewer requests, narrower trees, and no workload of which the rest has a
    harder kin.
    """
    both = [] if quick else [_judges("judge", quick=quick)]
    extra = [] if quick else [_cold_prompts("cold prompts")]
    return [
        _documents("long documents", quick=quick),
        _documents("long documents, S2", quick=quick, unruly=True),
        *both,
        _judges("judge, S1", quick=quick, unruly=True),
        _trees("tree of thought, S1", quick=quick),
        _chats("chat", quick=quick),
        _mooncake("mooncake", trace, quick=quick),
        _flood("flood", quick=quick),
        *extra,
    ]


def _documents(name: str, *, quick: bool, unruly: bool = False) -> Case:
    scale, documents, questions = (0.25, 6, 8) if quick else (1.0, 8, 8 if unruly else 12)
    room = documents * (21_449 * scale + 75)

    def make(seed: int) -> Workload:
        clients = [
            long_document_qa(client, documents=documents, questions=questions, scale=scale)
            for client in NAMES
        ]
        if unruly:
            clients[0] = long_document_qa(
                NAMES[0],
                documents=2 * documents,
                questions=10 * questions if not quick else 3 * questions,
                scale=scale,
                more_tokens=600,
            )
        return together(clients, seed)

    misbehaving = frozenset({NAMES[0]} if unruly else ())
    return Case(name, NAMES, make, round(room * 1.25), misbehaving, most_local=not unruly)


def _judges(name: str, *, quick: bool, unruly: bool = False) -> Case:
    articles, dimensions = (5, 6) if quick else (20, 8)

    def make(seed: int) -> Workload:
        few, many = (2, 16) if unruly else (dimensions, dimensions)
        more = dimensions // 2 if unruly else 1
        clients = [judge(client, articles=articles * more, dimensions=few) for client in NAMES]
        clients[0] = judge(NAMES[0], articles=articles, dimensions=many)
        return together(clients, seed)

    return Case(name, NAMES, make, 22_000 if quick else 66_000, frozenset({NAMES[0]} if unruly else ()))


def _trees(name: str, *, quick: bool) -> Case:
    wide, narrow, branches = (1, 1, 3) if quick else (2, 20, 4)

    def make(seed: int) -> Workload:
        keys = Keys()
        return Several(
            tuple(
                TreeOfThought(
                    name=client,
                    trees=wide if client == NAMES[0] else narrow,
                    branches=branches if client == NAMES[0] else 2,
                    keys=keys,
                    seed=seed,
                )
                for client in NAMES
            )
        )

    return Case(name, NAMES, make, 40_000, frozenset({NAMES[0]}), max_num_seqs=96)


def _chats(name: str, *, quick: bool) -> Case:
    conversations, turns = (8, 4) if quick else (60, 6)

    def make(seed: int) -> Workload:
        keys = Keys()
        return Several(
            tuple(
                Chat(
                    name=client,
                    conversations=conversations,
                    turns=turns,
                    keys=keys,
                    seed=seed,
                    system_tokens=600,
                )
                for client in NAMES
            )
        )

    return Case(name, NAMES, make, 11_000 if quick else 60_000)


def _mooncake(name: str, trace: Path | None, *, quick: bool) -> Case:
    requests, clients = (150, 8) if quick else (2000, 20)

    def make(seed: int) -> Workload:
        rows = replay(None if trace is None else read_mooncake(trace), seed)
        return mooncake_prefixes(islice(rows, requests), seed, clients=clients, requests=requests, rate=None)

    names = tuple(f"client-{n}" for n in range(clients))
    return Case(name, names, make, 120_000 if quick else 400_000)


def _flood(name: str, *, quick: bool) -> Case:
    seconds, flood_rate = (12.0, 80.0) if quick else (60.0, 40.0)
    clients = flood(seconds, rate=1.5, prefixes=10, flood_rate=flood_rate)
    names = tuple(client.name for client in clients)
    return Case(
        name,
        names,
        lambda seed: together(clients, seed),
        60_000,
        frozenset({"flood"}),
        flood=True,
    )


def _cold_prompts(name: str) -> Case:
    """One client asks 60 times a second about 2 documents, more than the engine can serve for 30 s, and once
    in 2 s about another one. Where hits alone decide, those few are served when all else is done."""

    def make(seed: int) -> Workload:
        client = partial(SharedPrefixClient, document_tokens=1000, question_tokens=60, output_tokens=32)
        hot = client(name="hot", documents=2, questions=900, rate=60.0)
        cold = client(name="cold", documents=15, questions=1, rate=0.5)
        asks = together([hot, cold], seed).asks
        return Fixed([replace(ask, client=NAMES[0]) for ask in asks])

    return Case(name, NAMES[:1], make, 60_000, max_num_seqs=32, peers=False)
