"""``--penstock-config`` and our values of SGLang's options, on the parser that SGLang builds."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, NoReturn

from penstock.plugins.configuration import NAMESPACE, ConfigurationError, section
from penstock.plugins.features import FeatureError
from penstock.plugins.sglang.flowkv_settings import BACKEND, ease, flowkv_config, require_transferable
from penstock.plugins.sglang.flowkv_settings import FLAG as TRANSFER_FLAG
from penstock.plugins.sglang.settings import (
    FLAG,
    POLICIES,
    VARIABLE,
    hand_on,
    has_ranks,
    inherited,
    parse,
    require_supported,
    scheduler_config,
    settled,
)
from penstock.plugins.sglang.sparse_settings import BACKEND as SPARSE_BACKEND
from penstock.plugins.sglang.sparse_settings import SECTION as SPARSE_SECTION
from penstock.plugins.sglang.sparse_settings import is_asked_for as is_sparse
from penstock.plugins.sglang.sparse_settings import require_sparse, settle, sparse_config
from penstock.plugins.sglang.suffix_settings import (
    ALGORITHM,
    SECTION,
    is_asked_for,
    require_draftable,
    suffix_config,
)
from penstock.plugins.sglang.suffix_settings import FLAG as SPECULATION_FLAG
from penstock.schedulers.config import SchedulerConfig

DESTINATION = "penstock_config"
FROM_COMMAND_LINE = "_penstock_from_command_line"
"""An attribute of ``ServerArgs``, which take others beside their fields if they begin so."""
SPARSE_OPTIONS = ("attention_backend", "decode_attention_backend")


def add_cli_args(original: Callable[[ArgumentParser], Any], parser: ArgumentParser) -> Any:
    """Around ``ServerArgs.add_cli_args``: the same parser, with our flag and values."""
    result = original(parser)
    if any(action.dest == DESTINATION for action in parser._actions):
        return result
    group = parser.add_argument_group("Penstock")
    group.add_argument(
        FLAG,
        dest=DESTINATION,
        metavar="JSON|FILE",
        help=f"What Penstock does, as JSON or the path of a JSON file; the same as {VARIABLE}. "
        """Example: {"scheduler": {"policy": "dlpm", "quantum_tokens": 4000}}""",
    )
    for action in parser._actions:
        if action.dest == "schedule_policy" and action.choices is not None:
            action.choices = [*action.choices, *(name for name in POLICIES if name not in action.choices)]
            action.help = (
                f"{action.help} Penstock adds dlpm (fair to clients, keeps prefixes together), vtc (strictly "
                "fair) and slo (latency targets)."
            )
        if action.dest == "disaggregation_transfer_backend" and action.choices is not None:
            action.choices = [*action.choices, BACKEND]
            action.help = f"{action.help} Penstock adds flowkv (few descriptors, every page verified)."
        if action.dest == "speculative_algorithm":
            action.help = f"{action.help} Penstock adds {ALGORITHM} (drafts from what requests said)."
        if action.dest in SPARSE_OPTIONS and action.choices is not None:
            action.choices = [*action.choices, SPARSE_BACKEND]
            action.help = f"{action.help} Penstock adds tactic (decodes read the pages that matter, on CPU)."
    return result


def from_cli_args(original: Callable[..., Any], cls: type, args: Namespace) -> Any:
    """Around ``ServerArgs.from_cli_args``: settles what is asked for before SGLang makes up its mind."""
    try:
        join(args)
    except (ConfigurationError, FeatureError) as error:
        refuse(error)
    settings = original(cls, args)
    if os.environ.get(VARIABLE):
        # What a model brings is known later, and is told as what is known here.
        setattr(settings, FROM_COMMAND_LINE, True)
    return settings


def join(args: Namespace) -> None:
    """Turn our flags into the configuration of this process and its children, and apply what it asks for.

    Raises:
        ConfigurationError: a contradiction or an impossible value.
        FeatureError: what is asked for cannot be applied to this SGLang.
    """
    given = inherited()
    if (text := getattr(args, DESTINATION, None)) is not None:
        from_flag = parse(FLAG, text)
        if given and given != from_flag:
            raise ConfigurationError(f"{FLAG} and {VARIABLE} differ; give one of them")
        given = from_flag
    config = scheduler_config(given, flag=args.schedule_policy if args.schedule_policy in POLICIES else None)
    if config is not None:
        require_supported(args, config)
        args.schedule_policy = config.policy
        given = settled(config, given)
    transfers = args.disaggregation_transfer_backend == BACKEND
    if transfers:
        require_transferable(args)
        given = {**given, BACKEND: section({NAMESPACE: given}, BACKEND)}
        ease(flowkv_config(given))
    elif BACKEND in given:
        raise ConfigurationError(f"section {BACKEND!r} is given without {TRANSFER_FLAG} {BACKEND}")
    drafts = is_asked_for(args)
    if drafts:
        require_draftable(args)
        given = {**given, SECTION: section({NAMESPACE: given}, SECTION)}
        suffix_config(given)
    elif SECTION in given:
        raise ConfigurationError(f"section {SECTION!r} is given without {SPECULATION_FLAG} {ALGORITHM}")
    sparse = sparse_config(given, flag=is_sparse(args))
    if sparse is not None:
        require_sparse(args, sparse)
        settle(args)
        given = {**given, SPARSE_SECTION: section({NAMESPACE: given}, SPARSE_SECTION)}
    if config is None and not transfers and not drafts and sparse is None:
        return
    hand_on(given)
    ranks = config is not None and has_ranks(args)
    _apply(config, ranks=ranks, transfers=transfers, drafts=drafts, sparse=sparse is not None)


def _apply(
    config: SchedulerConfig | None, *, ranks: bool, transfers: bool, drafts: bool, sparse: bool
) -> None:
    from penstock.plugins.features import require
    from penstock.plugins.sglang.features import (
        FLOWKV,
        SHARED_CLOCK,
        SPARSE_ATTENTION,
        SUFFIX_DRAFTER,
        server_features,
    )
    from penstock.plugins.sglang.hooks import apply_now, confirm
    from penstock.plugins.sglang.installation import upstream

    asked = [
        *(server_features(config) if config is not None else ()),
        *((SHARED_CLOCK,) if ranks else ()),
        *((FLOWKV,) if transfers else ()),
        *((SUFFIX_DRAFTER,) if drafts else ()),
        *((SPARSE_ATTENTION,) if sparse else ()),
    ]
    for feature in asked:
        require(feature, upstream())
    apply_now()
    for feature in asked:
        confirm(feature.hooks)


def refuse_settings(settings: Any, error: Exception) -> NoReturn:
    """End the start with one line where ``settings`` came from a command line; else raise ``error``."""
    if getattr(settings, FROM_COMMAND_LINE, False):
        refuse(error)
    raise error


def refuse(error: Exception) -> NoReturn:
    """End the start with one line."""
    print(f"penstock: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error
