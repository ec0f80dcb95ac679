"""``--request-scheduler``, and how it joins vLLM's own arguments.

Three of them carry it: ``scheduler_cls`` names our factory, ``additional_config`` the policy, and
``middleware`` the code that reads who asks. The section ``penstock.scheduler`` of ``--additional-config``, or
our factory given as ``--scheduler-cls``, asks for the feature as the flag does.
"""

from __future__ import annotations

from argparse import SUPPRESS, Namespace, _ArgumentGroup
from collections.abc import Mapping
from typing import Any, get_args

from penstock.plugins.configuration import NAMESPACE, ConfigurationError, scheduler_config, section
from penstock.schedulers.config import SchedulerConfig, WaitingPolicy

FLAG = "--request-scheduler"
FACTORY = "penstock.plugins.vllm.request_scheduler.make_scheduler"
MIDDLEWARE = "penstock.plugins.vllm.asker_middleware.AskerMiddleware"
POLICIES = get_args(WaitingPolicy)


def add_flag(group: _ArgumentGroup) -> None:
    """Add the flag to a parser."""
    group.add_argument(
        FLAG,
        metavar="{" + ",".join(POLICIES) + "}",
        default=SUPPRESS,
        help="Order of waiting requests: dlpm is fair to clients and keeps prefixes together, vtc is fair "
        "alone, lpm keeps prefixes together alone, slo plans steps by latency targets, fcfs is stock's. "
        "More keys: penstock.scheduler in --additional-config.",
    )


def join(namespace: Namespace) -> None:
    """Turn the flag, or the JSON that stands for it, into vLLM's own arguments; again without effect.

    Raises:
        ConfigurationError: a contradiction or an impossible value.
        FeatureError: request scheduling is asked for and cannot be applied to this vLLM.
    """
    policy = getattr(namespace, "request_scheduler", None)
    given_class = getattr(namespace, "scheduler_cls", None)
    additional = getattr(namespace, "additional_config", None)
    additional = additional if isinstance(additional, Mapping) else {}
    if policy is None and given_class != FACTORY and not asks(additional):
        return
    _check_class(policy, given_class)
    config = scheduler_config(additional, {} if policy is None else {"policy": policy})
    _check_priority(config, namespace)
    _require()
    namespace.scheduler_cls = FACTORY
    namespace.additional_config = _with_policy(additional, config)
    _add_middleware(namespace)


def asks(additional_config: Mapping[str, Any]) -> bool:
    """Whether ``additional_config`` has a section for request scheduling.

    Raises:
        ConfigurationError: what stands under our name is no mapping.
    """
    section(additional_config, "scheduler")
    return "scheduler" in additional_config.get(NAMESPACE, {})


def _check_class(policy: str | None, given: Any) -> None:
    if given not in (None, FACTORY):
        what = "penstock.scheduler in --additional-config" if policy is None else f"{FLAG} {policy}"
        raise ConfigurationError(f"{what} contradicts --scheduler-cls {given}; give one of them")


def _check_priority(config: SchedulerConfig, namespace: Namespace) -> None:
    if getattr(namespace, "scheduling_policy", "fcfs") != "fcfs":
        given = namespace.scheduling_policy
        raise ConfigurationError(f"{FLAG} {config.policy} contradicts --scheduling-policy {given}")


def _require() -> None:
    from penstock.plugins.features import require
    from penstock.plugins.vllm.features import REQUEST_SCHEDULER
    from penstock.plugins.vllm.installation import upstream

    require(REQUEST_SCHEDULER, upstream())


def _with_policy(additional: Mapping[str, Any], config: SchedulerConfig) -> dict[str, Any]:
    ours = {**section(additional, "scheduler"), "policy": config.policy}
    return {**additional, NAMESPACE: {**additional.get(NAMESPACE, {}), "scheduler": ours}}


def _add_middleware(namespace: Namespace) -> None:
    given = getattr(namespace, "middleware", None)
    if given is not None and MIDDLEWARE not in given:
        # The first one runs last: what other middleware adds or removes is seen.
        namespace.middleware = [MIDDLEWARE, *given]
