"""What a server is asked to do: ``PENSTOCK_CONFIG``, which ``--penstock-config`` and our flags end in.

The variable reaches every process of an engine, whichever way it is started. Its value is a JSON object with
one section for each feature, ``{"scheduler": {"policy": "dlpm"}}``, or the path of a file that holds one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.plugins.askers import DIGEST_PREFIX, digest_of
from penstock.plugins.configuration import NAMESPACE, ConfigurationError, convert, merge, section
from penstock.schedulers.config import SchedulerConfig

VARIABLE = "PENSTOCK_CONFIG"
FLAG = "--penstock-config"
SECTIONS = ("scheduler", "flowkv", "suffix", "sparse_attention")
POLICIES = ("dlpm", "vtc", "slo")
"""Of ours. SGLang has an ``lpm`` and an ``fcfs`` of its own, which stay what they are."""
STOCK_POLICY = "fcfs"
"""What SGLang takes if nothing is said; our policies say the same without a client's name."""
UNUSED = frozenset({"speculation"})
"""Keys of ``SchedulerConfig`` that do nothing here."""


def parse(source: str, text: str) -> dict[str, Any]:
    """The object that ``text`` is, or that the file of that name holds; ``source`` names it in messages.

    Raises:
        ConfigurationError: there is no such file, it holds no JSON object, or a section that is not for
            SGLang.
    """
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"{source}: given {text!r}, allowed: a JSON object or a file with one ({error.strerror})"
            ) from None
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{source}: allowed is a JSON object: {error}") from None
    for name in found:
        if name not in SECTIONS:
            allowed = ", ".join(SECTIONS)
            raise ConfigurationError(f"{source}: given section {name!r}, allowed on SGLang: {allowed}")
    return found


def scheduler_config(given: Mapping[str, Any], *, flag: str | None = None) -> SchedulerConfig | None:
    """Request scheduling as ``given`` and ``--schedule-policy`` ask for it; None if neither does.

    Raises:
        ConfigurationError: a contradiction, an unknown key, one that does nothing on SGLang, a wrong type or
            an impossible value.
    """
    if flag is None and "scheduler" not in given:
        return None
    ours = section({NAMESPACE: given}, "scheduler")
    from_flag = {} if flag is None else {"policy": flag}
    merged = merge("scheduler", {FLAG: ours, "--schedule-policy": from_flag})
    config = convert("scheduler", merged, SchedulerConfig)
    if config.policy not in POLICIES:
        allowed = ", ".join(POLICIES)
        raise ConfigurationError(
            f"scheduler.policy: given {config.policy!r}, allowed on SGLang: {allowed}; "
            "SGLang's own policies are values of --schedule-policy"
        )
    for key in merged:
        if key in UNUSED:
            raise ConfigurationError(f"scheduler.{key}: does nothing on SGLang yet; leave it out")
    return config


def judges_at_the_edge(config: SchedulerConfig) -> bool:
    """Whether headers or API keys say who asks, so that the server has to look at them."""
    return config.trust_headers or bool(config.clients)


def inherited() -> dict[str, Any]:
    """What the variable asks for in this process; empty where it is not set.

    Raises:
        ConfigurationError: its value is no configuration.
    """
    text = os.environ.get(VARIABLE, "")
    return parse(VARIABLE, text) if text else {}


def settled(config: SchedulerConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the policy that was settled on, and digests for API keys: an environment can be read."""
    ours = {**section({NAMESPACE: given}, "scheduler"), "policy": config.policy}
    if config.clients:
        ours["clients"] = {
            DIGEST_PREFIX + digest_of(key).hex(): client for key, client in ours["clients"].items()
        }
    return {**given, "scheduler": ours}


def hand_on(given: Mapping[str, Any]) -> None:
    """Let this process and those that it starts read ``given``, as it was settled on."""
    os.environ[VARIABLE] = msgspec.json.encode(given).decode()


def has_ranks(settings: Any) -> bool:
    """Whether several ranks schedule the same requests, or may. ``settings`` as in ``require_supported``."""
    return bool(settings.tp_size * settings.pp_size > 1)


def require_supported(settings: Any, config: SchedulerConfig) -> None:
    """Refuse settings of SGLang's that contradict a policy of ours. ``settings`` are the parsed arguments or
    the ``ServerArgs``.

    Raises:
        ConfigurationError: naming the setting.
    """
    policy = f"scheduler.policy {config.policy}"
    given = settings.schedule_policy
    if given not in (STOCK_POLICY, config.policy):
        raise ConfigurationError(f"{policy} contradicts --schedule-policy {given}; give one of them")
    if settings.enable_priority_scheduling:
        raise ConfigurationError(f"{policy} contradicts --enable-priority-scheduling; leave one out")
    if settings.lora_drain_wait_threshold > 0:
        raise ConfigurationError(f"{policy} contradicts --lora-drain-wait-threshold; leave one out")
    if settings.dllm_algorithm is not None:
        raise ConfigurationError(
            f"{policy} contradicts --dllm-algorithm; diffusion models keep SGLang's order"
        )
    if config.policy == "slo":
        _require_planned(settings, policy)
    if judges_at_the_edge(config):
        _require_python_server(settings)
    if settings.pp_size != 1:
        _require_one_pipeline(settings, config, policy)


def _require_one_pipeline(settings: Any, config: SchedulerConfig, policy: str) -> None:
    """Refuse a pipeline whose stages cannot go by one clock, or by one plan."""
    apart = settings.disaggregation_mode != "null" or settings.enable_pd_role_switch
    if config.policy == "slo" or apart:
        reason = (
            "its stages send each other more than requests there"
            if apart
            else "it plans one batch at a time, and a pipeline holds several"
        )
        given = settings.pp_size
        raise ConfigurationError(f"--pp-size: given {given} beside {policy}, allowed: 1, as {reason}")


def _require_planned(settings: Any, policy: str) -> None:
    """Refuse what a plan of tokens cannot stand on."""
    if settings.disaggregation_mode == "decode" or settings.enable_pd_role_switch:
        raise ConfigurationError(
            f"{policy} contradicts --disaggregation-mode decode and --enable-pd-role-switch; every request "
            "decodes in every pass of a decode server, so there is nothing to plan"
        )
    if (size := settings.chunked_prefill_size) is not None and size <= 0:
        raise ConfigurationError(
            f"--chunked-prefill-size: given {size} beside {policy}, allowed: more than 0, as it plans chunks"
        )
    if settings.speculative_algorithm is not None:
        raise ConfigurationError(
            f"{policy} contradicts --speculative-algorithm; it plans a token a step for each request"
        )
    if has_ranks(settings):
        _require_common_step_times(settings, policy)


def _require_common_step_times(settings: Any, policy: str) -> None:
    """Refuse ranks that would measure steps, or learn from them, each in another way."""
    for name, flag, reason in (
        ("scheduler_recv_interval", "--scheduler-recv-interval", "ranks hear the time along with requests"),
        ("nnodes", "--nnodes", "processors of other kinds may round differently what step times teach"),
    ):
        if (given := getattr(settings, name)) > 1:
            raise ConfigurationError(f"{flag}: given {given} beside {policy}, allowed: 1, as {reason}")


def _require_python_server(settings: Any) -> None:
    """Refuse front ends that run without plugins: nobody would look at headers there."""
    what = "scheduler.trust_headers and scheduler.clients"
    if (number := settings.tokenizer_worker_num) != 1:
        raise ConfigurationError(
            f"--tokenizer-worker-num: given {number} beside {what}, allowed: 1, "
            "as SGLang loads no plugins in others"
        )
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"):
        raise ConfigurationError(f"SGLANG_RUST_SERVER contradicts {what}; its server loads no plugins")
