"""Two whole engines in one process, on real memory: the kit of these tests.

Each engine owns a pool of blocks that holds real bytes. A block's right content follows from its key, so a
prompt is a list of keys and shared prefixes are equal keys. Blocks are scribbled over when they are freed
and again when they are handed out, and a free block must not change: a stale, partial, late or misdirected
write cannot go unseen. The clock is moved by hand and the control network lives in memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_pool import TOKENS_A_BLOCK, Pool, record_of
from strict_transport import Strict

from penstock.connectors.compat import CompatibilityRecord
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import Reply
from penstock.connectors.digest import DramDigester, sampled_positions
from penstock.connectors.errors import FlowKVError, MessageError, PeerUnreachableError
from penstock.connectors.handoff import Address, HandOff, parse_hand_off
from penstock.connectors.lease import LeaseEnd
from penstock.connectors.messages import (
    Answer,
    Question,
    Release,
    Renew,
    Welcome,
    decode_answer,
    decode_question,
    encode,
)
from penstock.connectors.receiver import Load, Outcome, Receiver
from penstock.connectors.runs import blocks_of, runs_of
from penstock.connectors.sender import Sender
from penstock.connectors.transports.base import Transport
from penstock.connectors.transports.faulty import Fault, FaultyTransport
from penstock.connectors.transports.loopback import LoopbackTransport, Network

PREFILL = Address("prefill.test", 5600)

CONFIG = FlowKVConfig(
    pickup_s=45.0,
    lease_s=30.0,
    longest_lease_s=120.0,
    handshake_timeout_s=10.0,
    transfer_timeout_s=20.0,
    transport="loopback",
)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Wire:
    """The control network: servers by address, each of which can fall silent or have its answers altered."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.servers: dict[Address, Callable[[Question], Answer]] = {}
        self.silent: set[Address] = set()
        self.lost: Callable[[Question], bool] = lambda question: False
        self.alter: Callable[[Answer], Answer] = lambda answer: answer
        self.asked: list[Question] = []


class Link:
    """A receiver's end of the wire; questions arrive, and time out, when it is polled."""

    def __init__(self, wire: Wire, timeout_s: float = CONFIG.handshake_timeout_s) -> None:
        self._wire, self._timeout_s = wire, timeout_s
        self._waiting: dict[int, tuple[Address, bytes | None, float]] = {}
        self._tickets = 0

    def ask(self, address: Address, question: Question) -> int:
        self._tickets += 1
        self._wire.asked.append(question)
        self._waiting[self._tickets] = (address, encode(question), self._wire.clock() + self._timeout_s)
        return self._tickets

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        replies = []
        for ticket, (address, data, deadline) in list(self._waiting.items()):
            serve = self._wire.servers.get(address)
            if data is not None and serve is not None and address not in self._wire.silent:
                question = decode_question(data)
                answer = encode(self._wire.alter(serve(question)))
                self._waiting[ticket] = (address, None, deadline)
                if not self._wire.lost(question):
                    replies.append(self._reply(ticket, answer))
                    continue
            if self._wire.clock() >= deadline:
                del self._waiting[ticket]
                replies.append(Reply(ticket, PeerUnreachableError(f"no answer from {address}")))
        return replies

    def _reply(self, ticket: int, data: bytes) -> Reply:
        del self._waiting[ticket]
        try:
            return Reply(ticket, decode_answer(data))
        except MessageError as error:
            return Reply(ticket, error)


class PrefillEngine:
    """Prefills prompts, hands them off, takes its blocks back when their leases end."""

    def __init__(self, site: Site, pool: Pool, **changes: object) -> None:
        self.site, self.pool = site, pool
        self.record = record_of(pool, site.config, **changes)
        self.ends: dict[str, LeaseEnd] = {}
        self.held: dict[str, list[int]] = {}
        self._by_key: dict[int, int] = {}
        self._names = 0
        self.start()

    def start(self) -> None:
        """Come up, or come up again: a new process at the same address, with nothing in its memory."""
        self.alive = True
        self.sender = Sender("prefill", PREFILL, self.site.config, self.site.clock)
        self.sender.use_epochs(self.pool.epochs)
        self.transports = [self.site.loopback(f"prefill-{self.sender.instance}-{r}") for r in self.site.ranks]
        self.sender.open(
            {
                rank: Welcome(
                    self.sender.instance, self.record, geometry, transport.name, transport.register(geometry)
                )
                for rank, (geometry, transport) in enumerate(
                    zip(self.pool.geometries, self.transports, strict=True)
                )
            }
        )
        self.site.wire.servers[PREFILL] = self.sender.answer

    def die(self) -> None:
        """Kill -9: nothing answers any more, and what was held is gone."""
        self.alive = False
        del self.site.wire.servers[PREFILL]
        for transport in self.transports:
            transport.close()
        for blocks in self.held.values():
            self.pool.free(blocks)
        self.held.clear()
        self._by_key.clear()
        self.pool.churn()

    def prefill(self, keys: Sequence[int], hashed: bool = True) -> HandOff:
        """Compute a prompt (or share the blocks of a live one), and promise its blocks."""
        self._names += 1
        request_id = f"p{self._names}"
        blocks = self._blocks_of(keys)
        hand_off = self.sender.hand_off(
            request_id,
            runs_of(blocks),
            num_tokens=len(keys) * TOKENS_A_BLOCK,
            prompt="0" * 32,
            block_size=TOKENS_A_BLOCK,
            ranks=len(self.site.ranks),
        )
        self.held[request_id] = blocks
        if hashed:
            self.hash(request_id)
        return parse_hand_off(hand_off.to_params())

    def hash(self, request_id: str) -> None:
        """Every rank hashes the prompt's blocks."""
        blocks = self.held[request_id]
        sampled = [blocks[i] for i in sampled_positions(len(blocks), self.site.config.digest)]
        for rank, geometry in enumerate(self.pool.geometries):
            self.sender.add_digests(request_id, rank, DramDigester(geometry).digests(sampled))

    def sweep(self) -> None:
        """Take back the blocks of ended leases, and hand them to somebody else at once."""
        ended_leases = self.sender.collect() if self.alive else ()
        for ended in ended_leases:
            assert ended.request_id not in self.ends, "a lease ended twice"
            self.ends[ended.request_id] = ended.end
            self.pool.free(self.held.pop(ended.request_id))
        self._by_key = {key: block for key, block in self._by_key.items() if self.pool.users[block]}
        if ended_leases:
            self.pool.churn()

    def _blocks_of(self, keys: Sequence[int]) -> list[int]:
        for key in keys:
            if key in self._by_key:
                self.pool.share(self._by_key[key])
        computed = [key for key in keys if key not in self._by_key]
        for key, block in zip(computed, self.pool.allocate(len(computed)), strict=True):
            self.pool.write(block, key)
            self._by_key[key] = block
        return [self._by_key[key] for key in keys]


@dataclass
class Request:
    """A request at the decode engine."""

    hand_off: HandOff
    keys: list[int]
    first: int
    blocks: list[int]
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def error(self) -> FlowKVError | None:
        return next((o.error for o in self.outcomes.values() if o.error), None)


class DecodeEngine:
    """Pulls prompts and checks every byte of those that it is told are right."""

    def __init__(self, site: Site, pool: Pool, **changes: object) -> None:
        self.site, self.pool = site, pool
        self.link = Link(site.wire)
        self.cache: dict[int, int] = {}
        self.requests: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.transports: list[FaultyTransport] = []
        self.receivers: list[Receiver] = []
        for rank in site.ranks:
            transport = FaultyTransport(site.loopback(f"decode-{rank}"), {})
            transport.register(pool.geometries[rank])
            self.transports.append(transport)
            self.receivers.append(
                self._receiver(rank, Strict(transport), record_of(pool, site.config, **changes))
            )

    def script(self, *faults: Fault | None, rank: int = 0) -> None:
        """Let the next reads of one rank suffer ``faults``."""
        transport = self.transports[rank]
        transport.script = {transport.reads + i: fault for i, fault in enumerate(faults) if fault}

    def pull(self, hand_off: HandOff, keys: Sequence[int]) -> str:
        """Start a request; what the local prefix cache has is not pulled."""
        first = next((i for i, key in enumerate(keys) if key not in self.cache), len(keys) - 1)
        local = [self.cache[key] for key in keys[:first]]
        for block in local:
            self.pool.share(block)
        targets = self.pool.allocate(len(keys) - first)
        request_id = f"d{len(self.requests) + len(self.done)}"
        self.requests[request_id] = Request(hand_off, list(keys), first, local + targets)
        for receiver in self.receivers:
            receiver.submit(Load(request_id, hand_off, first, tuple(runs_of(targets))))
        return request_id

    def step(self, count: int = 1) -> None:
        """Drive the receivers and settle what has ended."""
        for _ in range(count):
            for rank, receiver in enumerate(self.receivers):
                receiver.step()
                for outcome in receiver.outcomes():
                    self._take(rank, outcome)
            self.link.poll()

    def renew(self) -> None:
        """One heartbeat for everything that is not settled."""
        leases = [r.hand_off.remote_lease for r in self.requests.values()]
        self.link.ask(PREFILL, Renew(leases))
        self.link.poll()

    def error_of(self, request_id: str) -> FlowKVError | None:
        """How a settled request failed."""
        return self.done[request_id].error

    def drop_cache(self) -> None:
        self.pool.free(list(self.cache.values()))
        self.cache.clear()

    def _receiver(self, rank: int, transport: Transport, record: CompatibilityRecord) -> Receiver:
        geometry = self.pool.geometries[rank]
        return Receiver(
            rank=rank,
            record=record,
            geometry=geometry,
            transport=transport,
            control=Link(self.site.wire),
            digester=DramDigester(geometry),
            config=self.site.config,
            clock=self.site.clock,
        )

    def _take(self, rank: int, outcome: Outcome) -> None:
        request_id = outcome.load.request_id
        assert request_id not in self.done, "a request was reported twice"
        request = self.requests[request_id]
        assert rank not in request.outcomes, "a rank reported a request twice"
        request.outcomes[rank] = outcome
        if len(request.outcomes) < len(self.receivers):
            return
        self.done[request_id] = self.requests.pop(request_id)
        if request.error:
            self.link.ask(request.hand_off.address, Release([request.hand_off.remote_lease], "failed"))
        elif self.site.checks_bytes:
            wrong = [
                i
                for i, (b, k) in enumerate(zip(request.blocks, request.keys, strict=True))
                if not self.pool.holds(b, k)
            ]
            assert not wrong, f"wrong bytes were reported as right, at positions {wrong}"
            self._keep(request)
        self.pool.free(request.blocks)

    def _keep(self, request: Request) -> None:
        """Some prompts' first blocks stay in the local prefix cache."""
        if len(self.done) % 3 == 0:
            for key, block in list(zip(request.keys, request.blocks, strict=True))[: len(request.keys) // 2]:
                if key not in self.cache:
                    self.pool.share(block)
                    self.cache[key] = block


class Site:
    """A prefill and a decode engine, the wire between them and the clock that both read."""

    def __init__(
        self,
        config: FlowKVConfig = CONFIG,
        *,
        seed: int = 0,
        ranks: int = 1,
        layouts: tuple[str, str] = ("BLHNC", "BLHNC"),
        num_blocks: tuple[int, int] = (96, 128),
        prefill_record: dict[str, object] | None = None,
        checks_bytes: bool = True,
    ) -> None:
        self.config = config
        self.ranks = range(ranks)
        self.checks_bytes = checks_bytes
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.wire = Wire(self.clock)
        self.network: Network = {}
        pools = [Pool(self.rng, n, layout, ranks) for n, layout in zip(num_blocks, layouts, strict=True)]
        self.prefill = PrefillEngine(self, pools[0], **(prefill_record or {}))
        self.decode = DecodeEngine(self, pools[1])

    def loopback(self, name: str) -> LoopbackTransport:
        return LoopbackTransport(name, self.network)

    def request(self, keys: Sequence[int]) -> str:
        """Prefill a prompt and start to pull it."""
        return self.decode.pull(self.prefill.prefill(keys), keys)

    def run(self, steps: int = 6) -> None:
        """Both engines' steps, in turn."""
        for _ in range(steps):
            self.decode.step()
            self.prefill.sweep()

    def outcome(self, keys: Sequence[int]) -> FlowKVError | None:
        """One whole request, from prompt to end."""
        request_id = self.request(keys)
        self.run()
        return self.decode.error_of(request_id)

    def check(self) -> None:
        """Nothing pends, nothing leaks, every lease ended once, and the next request is served."""
        next_request = self.request([9_000_001, 9_000_002, 9_000_003])
        self.run()
        assert self.decode.error_of(next_request) is None, "the engine does not serve the next request"
        self.clock.advance(self.config.longest_lease_s + 1)
        self.run()
        assert not self.decode.requests
        assert all(not receiver.num_pending for receiver in self.decode.receivers)
        self.decode.drop_cache()
        for pool in (self.prefill.pool, self.decode.pool):
            pool.check_integrity()
            assert pool.num_free == pool.num_blocks, "blocks leaked"
        self.prefill.sender.leases.check_integrity()
        assert not len(self.prefill.sender.leases)


def blocks_handed_off(hand_off: HandOff) -> list[int]:
    """The sender's block ids, in token order."""
    return list(blocks_of(hand_off.runs))
