"""The scheduler's configuration: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from penstock.schedulers.draft_config import SpeculationConfig
from penstock.schedulers.slo.config import SLOConfig

WaitingPolicy = Literal["dlpm", "vtc", "lpm", "fcfs", "slo"]

LEAST_WEIGHT, LARGEST_WEIGHT = 0.01, 100.0
LARGEST_TOKENS = 1e9

Weight = Annotated[float, msgspec.Meta(ge=LEAST_WEIGHT, le=LARGEST_WEIGHT)]
ClientId = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Price = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=86_400_000)]


class KeyedClient(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whom an API key belongs to."""

    client: ClientId
    """The client that every request with this key counts for."""
    weight: Weight | None = None
    """Its share; None takes the one in ``weights``, or 1."""
    ttft_slo_ms: Milliseconds | None = None
    """Target for the first token of requests with this key; None leaves it to the request."""
    tpot_slo_ms: Milliseconds | None = None
    """Target for each further token of requests with this key; None leaves it to the request."""


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of request scheduling. Service is counted in weighted tokens: ``extend_weight`` times the
    prompt tokens that were computed for a client plus ``output_weight`` times those generated for it.

    Every duration is in seconds, every size in tokens or bytes, as the name says.
    """

    policy: WaitingPolicy = "dlpm"
    """Which request is served next: ``dlpm`` longest cached prefix among clients whose deficit is positive,
    ``vtc`` the client that has had the least service, ``lpm`` longest cached prefix whoever asks, ``fcfs``
    the one that came first, ``slo`` by a plan that meets as many latency targets as it can."""
    quantum_tokens: Annotated[float, msgspec.Meta(gt=0, le=LARGEST_TOKENS)] = 2000.0
    """Weighted tokens that a client of weight 1 is given when its deficit is used up. More favours prefix
    locality, less favours fairness. ``dlpm``; for ``vtc`` it only measures the rounds of newcomers."""
    extend_weight: Price = 1.0
    """Price of a prompt token that was computed; tokens from the prefix cache or a connector are free."""
    output_weight: Price = 2.0
    """Price of a generated token."""
    first_output_tokens: Annotated[float, msgspec.Meta(ge=0, le=LARGEST_TOKENS)] = 128.0
    """Tokens that a request is expected to generate before any has ended; afterwards the mean of its client.
    They are charged when the request is admitted and put right as tokens come; 0 charges output only as it
    comes. ``dlpm``."""
    ageing_tokens_per_s: Annotated[float, msgspec.Meta(ge=0, le=LARGEST_TOKENS)] = 20.0
    """Cached tokens that a second of waiting is worth in the order by prefix, so that a cold prompt is
    served at last; 0 lets it wait for ever behind warmer ones. ``dlpm`` and ``lpm``."""
    hit_refreshes_per_step: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 64
    """Waiting requests whose cached prefix is looked up anew in one step."""
    client_idle_s: Seconds = 3600.0
    """How long a client without requests is remembered, with its deficit or counter."""
    max_clients: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 10_000
    """Clients that are remembered at most."""
    newcomers_per_refill: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 8
    """New client ids that get an account of their own while every other client uses up a quantum; further
    ones share one account until a later request. Whoever invents an id for every request gets the service of
    so many clients and one more. The clients in ``clients`` and ``weights`` always have accounts and do not
    count. ``dlpm`` and ``vtc``."""
    longest_client_id: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 128
    """Bytes of UTF-8 that a client id may have."""
    trust_headers: bool = False
    """Whether ``x-llm-d-inference-fairness-id`` and the headers of targets are believed. Only where every
    request comes through a gateway that sets or removes them."""
    clients: dict[str, KeyedClient] = {}
    """API keys and whose they are. A key is written as it is sent, or as ``sha256:`` and its digest in hex.
    With this table no request can name its client or weight itself."""
    weights: dict[ClientId, Weight] = {}
    """Shares of clients by id; they outrank what a request says."""
    unnamed_by_arrival: bool | None = None
    """Whether requests that name no client are served among themselves in order of arrival. None does so
    for ``dlpm`` and ``vtc``, and orders them by prefix for ``lpm``, which is what that is for."""
    speculation: SpeculationConfig | None = None
    """Draft lengths for each request, for an engine that drafts; None leaves drafts as they are."""
    default_ttft_slo_ms: Milliseconds | None = None
    """Target for the first token of requests that name no target at all. ``slo`` only."""
    default_tpot_slo_ms: Milliseconds | None = None
    """Target for each further token of requests that name no target at all. ``slo`` only."""
    slo: SLOConfig = SLOConfig()
    """The knobs of ``slo``."""
    shown_clients: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10
    """Clients with metrics of their own, those with the most service; the others are summed up as one."""

    def __post_init__(self) -> None:
        if not self.extend_weight and not self.output_weight:
            raise ValueError("extend_weight: given 0.0 beside output_weight=0.0, allowed: one above 0")
        for name in (*self.weights, *(keyed.client for keyed in self.clients.values())):
            if len(name.encode()) > self.longest_client_id:
                raise ValueError(
                    f"longest_client_id: given {self.longest_client_id}, "
                    f"allowed: at least the {len(name.encode())} bytes of client {name[:64]!r}"
                )

    @property
    def listed(self) -> frozenset[str]:
        """The clients that the operator names."""
        return frozenset(self.weights) | {keyed.client for keyed in self.clients.values()}

    @property
    def orders_unnamed_by_arrival(self) -> bool:
        """``unnamed_by_arrival``, resolved."""
        return self.policy != "lpm" if self.unnamed_by_arrival is None else self.unnamed_by_arrival
