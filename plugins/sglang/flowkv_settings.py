"""What ``--disaggregation-transfer-backend flowkv`` is given, and what it cannot stand beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from penstock.connectors.config import FlowKVConfig
from penstock.plugins.configuration import NAMESPACE, ConfigurationError, convert, section

BACKEND = "flowkv"
FLAG = "--disaggregation-transfer-backend"
ROLES = ("prefill", "decode")
UNUSED = frozenset({"lease_s", "longest_lease_s", "heartbeat_s"})
"""Keys of ``FlowKVConfig`` that do nothing here: decode reads a chunk at once, so no lease is renewed."""
POST_CAPTURE = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
RELEASE_TIMEOUT = "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT"


def flowkv_config(given: Mapping[str, Any], *, host: str = "127.0.0.1") -> FlowKVConfig:
    """FlowKV's settings in ``given``; ``host`` is the address of this machine where they name none.

    Raises:
        ConfigurationError: an unknown key, one that does nothing on SGLang, a wrong type or an impossible
            value.
    """
    ours = section({NAMESPACE: given}, BACKEND)
    for key in ours:
        if key in UNUSED:
            raise ConfigurationError(f"flowkv.{key}: does nothing on SGLang; leave it out (see pickup_s)")
    return convert(BACKEND, {"host": host, **ours}, FlowKVConfig)


def require_transferable(settings: Any) -> None:
    """Refuse settings of SGLang's that FlowKV cannot serve. ``settings`` are the parsed arguments or the
    ``ServerArgs``.

    Raises:
        ConfigurationError: naming the setting.
    """
    if settings.disaggregation_mode not in ROLES:
        raise ConfigurationError(
            f"{FLAG} {BACKEND}: given --disaggregation-mode {settings.disaggregation_mode}, "
            f"allowed: {', '.join(ROLES)}"
        )
    if settings.page_size is None or settings.page_size < 2:
        raise ConfigurationError(
            f"--page-size: given {settings.page_size or 'none'}, allowed beside {FLAG} {BACKEND}: 2 or more, "
            "the same on both servers"
        )
    for name in ("pp_size", "attn_cp_size", "dcp_size"):
        if (size := getattr(settings, name)) != 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag}: given {size}, allowed beside {FLAG} {BACKEND}: 1")
    for name, why in (
        ("speculative_algorithm", "the draft model's cache is not transferred yet"),
        ("enable_hisparse", "its pages are not the pool's"),
        ("enable_unified_memory", "its pages are not the pool's"),
        ("enable_memory_saver", "a pool that is given back would stay registered for transfers"),
        ("disaggregation_enable_kv_checksum", "FlowKV hashes pages itself; see flowkv.digest"),
    ):
        if getattr(settings, name):
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag} contradicts {FLAG} {BACKEND}: {why}")
    if settings.disaggregation_decode_host_receive_threshold < 1:
        raise ConfigurationError(
            f"--disaggregation-decode-host-receive-threshold contradicts {FLAG} {BACKEND}: "
            "decode reads into the pool"
        )
    if settings.enable_pd_role_switch and not (
        settings.disable_radix_cache or settings.disaggregation_decode_enable_radix_cache
    ):
        raise ConfigurationError(
            "--enable-pd-role-switch: give --disaggregation-decode-enable-radix-cache or "
            "--disable-radix-cache on both servers as well; a prefill server that becomes a decode server "
            "with its prefix cache on leaks pages in SGLang"
        )


def ease(config: FlowKVConfig) -> None:
    """Set what SGLang reads from its environment as FlowKV needs it, unless the user did.

    Pages of an aborted request wait for the end of our own read, which has a deadline; and the pool is one
    allocation of a size that is known when it is made.
    """
    longest = config.handshake_timeout_s + 2 * config.transfer_timeout_s
    os.environ.setdefault(RELEASE_TIMEOUT, str(longest))
    os.environ.setdefault(POST_CAPTURE, "0")
