"""``--shared-prefix-attention``, and how it joins vLLM's own arguments.

Two of them carry it: ``attention_backend`` is ``CUSTOM``, and ``additional_config`` has the method. The
section ``penstock.shared_prefix_attention`` of ``--additional-config`` asks for the feature as the flag does.
"""

from __future__ import annotations

from argparse import SUPPRESS, Namespace, _ArgumentGroup
from collections.abc import Mapping
from typing import get_args

from penstock.kernels.shared_prefix.config import Method
from penstock.plugins.configuration import NAMESPACE, section, shared_prefix_config
from penstock.plugins.vllm.shared_prefix import SECTION, asks
from penstock.plugins.vllm.sparse_flags import BACKEND, check_backend

FLAG = "--shared-prefix-attention"
METHODS = get_args(Method)


def add_flag(group: _ArgumentGroup) -> None:
    """Add the flag to a parser."""
    group.add_argument(
        FLAG,
        metavar="{" + ",".join(METHODS) + "}",
        default=SUPPRESS,
        help="Decode steps read blocks that several requests begin with once for all of them. "
        "More keys: penstock.shared_prefix_attention in --additional-config.",
    )


def join(namespace: Namespace) -> None:
    """Turn the flag, or the JSON that stands for it, into vLLM's own arguments; again without effect.

    Raises:
        ConfigurationError: a contradiction or an impossible value.
        FeatureError: it is asked for and cannot be applied to this vLLM.
    """
    method = getattr(namespace, "shared_prefix_attention", None)
    additional = getattr(namespace, "additional_config", None)
    additional = additional if isinstance(additional, Mapping) else {}
    ours = section(additional, SECTION)
    if method is None and not asks(additional):
        return
    config = shared_prefix_config(additional, {} if method is None else {"method": method})
    joined = {
        **additional,
        NAMESPACE: {**additional.get(NAMESPACE, {}), SECTION: {**ours, "method": config.method}},
    }
    asks(joined)
    check_backend(namespace, FLAG)
    from penstock.plugins.vllm.shared_prefix import enable

    enable()
    namespace.attention_backend = BACKEND
    namespace.additional_config = joined
