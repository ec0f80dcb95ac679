"""``--sparse-attention``, and how it joins vLLM's own arguments.

Two of them carry it: ``attention_backend`` is ``CUSTOM``, and ``additional_config`` has the selector. The
section ``penstock.sparse_attention`` of ``--additional-config`` asks for the feature as the flag does.
"""

from __future__ import annotations

from argparse import SUPPRESS, Namespace, _ArgumentGroup
from collections.abc import Mapping
from typing import Any, get_args

from penstock.kernels.sparse.serving import Selector, ServingConfig
from penstock.plugins.configuration import NAMESPACE, ConfigurationError, section, sparse_config

FLAG = "--sparse-attention"
BACKEND = "CUSTOM"
SELECTORS = get_args(Selector)


def add_flag(group: _ArgumentGroup) -> None:
    """Add the flag to a parser."""
    group.add_argument(
        FLAG,
        metavar="{" + ",".join(SELECTORS) + "}",
        default=SUPPRESS,
        help="Decode steps of long contexts read the pages that hold a share of the attention mass. "
        "More keys: penstock.sparse_attention in --additional-config.",
    )


def join(namespace: Namespace) -> None:
    """Turn the flag, or the JSON that stands for it, into vLLM's own arguments; again without effect.

    Raises:
        ConfigurationError: a contradiction or an impossible value.
        FeatureError: sparse attention is asked for and cannot be applied to this vLLM.
    """
    selector = getattr(namespace, "sparse_attention", None)
    additional = getattr(namespace, "additional_config", None)
    additional = additional if isinstance(additional, Mapping) else {}
    ours = section(additional, "sparse_attention")
    if selector is None and "sparse_attention" not in additional.get(NAMESPACE, {}):
        return
    config = sparse_config(additional, {} if selector is None else {"selector": selector})
    check_backend(namespace, FLAG)
    from penstock.plugins.vllm.sparse_attention import enable

    enable()
    namespace.attention_backend = BACKEND
    namespace.additional_config = _with_selector(additional, ours, config)


def check_backend(namespace: Namespace, flag: str) -> None:
    """Refuse another backend beside ``flag``.

    Raises:
        ConfigurationError: there is one.
    """
    given = getattr(namespace, "attention_backend", None)
    name = getattr(given, "name", given)
    if name is not None and name.upper() != BACKEND:
        raise ConfigurationError(f"{flag} contradicts --attention-backend {name}; give one of them")


def _with_selector(
    additional: Mapping[str, Any], ours: Mapping[str, Any], config: ServingConfig
) -> dict[str, Any]:
    section_ = {**ours, "selector": config.selector}
    return {**additional, NAMESPACE: {**additional.get(NAMESPACE, {}), "sparse_attention": section_}}
