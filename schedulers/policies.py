"""The orders by name, made from the configuration."""

from __future__ import annotations

from typing import TypedDict

from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.dlpm import DeficitOrder
from penstock.schedulers.fcfs import ArrivalOrder
from penstock.schedulers.lpm import PrefixOrder
from penstock.schedulers.vtc import CounterOrder
from penstock.schedulers.waiting import Clock, HitTokens, WaitingOrder


class _Common(TypedDict):
    clock: Clock
    extend_weight: float
    output_weight: float
    idle_s: float
    max_clients: int


def waiting_order(config: SchedulerConfig, clock: Clock, hit_tokens: HitTokens) -> WaitingOrder:
    """The order that ``config.policy`` names. ``clock`` and ``hit_tokens`` as in ``waiting``.

    Raises:
        ValueError: the policy is ``slo``, which plans whole steps and brings an order of its own.
    """
    if config.policy == "slo":
        raise ValueError("policy: given slo, allowed: a policy that only orders requests")
    if config.policy == "fcfs":
        return ArrivalOrder(
            extend_weight=config.extend_weight,
            output_weight=config.output_weight,
            max_clients=config.max_clients,
        )
    common = _Common(
        clock=clock,
        extend_weight=config.extend_weight,
        output_weight=config.output_weight,
        idle_s=config.client_idle_s,
        max_clients=config.max_clients,
    )
    if config.policy == "vtc":
        return CounterOrder(
            quantum_tokens=config.quantum_tokens,
            newcomers_per_refill=config.newcomers_per_refill,
            listed=config.listed,
            **common,
        )
    if config.policy == "lpm":
        return PrefixOrder(
            hit_tokens=hit_tokens,
            ageing_tokens_per_s=config.ageing_tokens_per_s,
            refreshes_per_step=config.hit_refreshes_per_step,
            unnamed_by_arrival=config.orders_unnamed_by_arrival,
            **common,
        )
    return DeficitOrder(
        hit_tokens=hit_tokens,
        quantum_tokens=config.quantum_tokens,
        first_output_tokens=config.first_output_tokens,
        newcomers_per_refill=config.newcomers_per_refill,
        listed=config.listed,
        ageing_tokens_per_s=config.ageing_tokens_per_s,
        refreshes_per_step=config.hit_refreshes_per_step,
        unnamed_by_arrival=config.orders_unnamed_by_arrival,
        **common,
    )
