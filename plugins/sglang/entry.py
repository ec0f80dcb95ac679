"""The entry point that SGLang calls in every process of an engine. Importing this module costs nothing.

With nothing asked for it changes two methods of ``ServerArgs``, so that our options exist, in the process
that a user starts, and nothing in the processes that this one starts. What ``PENSTOCK_CONFIG`` asks for is
applied in every process; SGLang logs and forgets what a plugin raises, so a refusal ends the process.
"""

from __future__ import annotations

import multiprocessing
import os


def register() -> None:
    """Make Penstock known to this process (``sglang.srt.plugins``).

    Raises:
        SystemExit: ``PENSTOCK_CONFIG`` asks for something that cannot be done; one line says what.
    """
    if multiprocessing.parent_process() is None:
        from penstock.plugins.features import offer
        from penstock.plugins.sglang.features import COMMAND_LINE
        from penstock.plugins.sglang.installation import upstream

        offer(COMMAND_LINE, upstream())
    if os.environ.get("PENSTOCK_CONFIG"):
        _apply_inherited()


def _apply_inherited() -> None:
    from penstock.plugins.configuration import ConfigurationError
    from penstock.plugins.features import FeatureError, require
    from penstock.plugins.sglang.features import (
        FLOWKV,
        SPARSE_ATTENTION,
        SUFFIX_DRAFTER,
        scheduler_feature,
        server_features,
    )
    from penstock.plugins.sglang.flags import refuse
    from penstock.plugins.sglang.flowkv_settings import BACKEND, ease, flowkv_config
    from penstock.plugins.sglang.installation import upstream
    from penstock.plugins.sglang.settings import inherited, scheduler_config
    from penstock.plugins.sglang.sparse_settings import sparse_config
    from penstock.plugins.sglang.suffix_settings import SECTION, suffix_config

    try:
        given = inherited()
        config = scheduler_config(given)
        first = multiprocessing.parent_process() is None
        if config is not None:
            for feature in server_features(config) if first else (scheduler_feature(config),):
                require(feature, upstream())
        if BACKEND in given:
            ease(flowkv_config(given))
            require(FLOWKV, upstream())
        if SECTION in given:
            suffix_config(given)
            require(SUFFIX_DRAFTER, upstream())
        if sparse_config(given) is not None:
            require(SPARSE_ATTENTION, upstream())
    except (ConfigurationError, FeatureError) as error:
        refuse(error)
