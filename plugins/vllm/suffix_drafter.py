"""A drafter for stock vLLM: ``--speculative-config '{"method": "custom_class", "model":
"penstock.plugins.vllm.suffix_drafter.SuffixDrafter", "num_speculative_tokens": 8}'``.

It needs no scheduler of ours, no model and no device. Keys: ``penstock.suffix`` in ``--additional-config``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.plugins.configuration import suffix_config
from penstock.plugins.features import require
from penstock.plugins.vllm.features import SUFFIX_DRAFTER
from penstock.plugins.vllm.installation import upstream
from penstock.schedulers.suffix.drafter import SuffixDrafter as Texts
from penstock.schedulers.suffix.rows import RowTexts

PREEMPTED_SHARE = 2
"""Texts that are kept, to rows that an engine has: a request that was preempted comes back to its own."""


class SuffixDrafter:
    """What vLLM's model runner asks for drafts after each step, in every worker alike.

    Raises:
        FeatureError: this vLLM lacks a name that the drafter stands on.
        ConfigurationError: ``additional_config`` is wrong.
    """

    def __init__(self, vllm_config: Any) -> None:
        require(SUFFIX_DRAFTER, upstream())
        self._most = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len = vllm_config.model_config.max_model_len
        self._texts = Texts(suffix_config(vllm_config.additional_config))
        self._rows = RowTexts(PREEMPTED_SHARE * vllm_config.scheduler_config.max_num_seqs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts by row, up to ``num_speculative_tokens`` each.

        Args:
            sampled_token_ids: new tokens of each row; none where a prompt is not computed to its end.
            num_tokens_no_spec: ``[rows]``, tokens of each row, the new ones included.
            token_ids_cpu: ``[rows, max_model_len]``, those tokens.
        """
        for name in self._rows.begin_step():
            self._texts.close(name)
        self._texts.begin_step()
        rows = zip(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, strict=False)
        return [self._draft(new, int(length), tokens) for new, length, tokens in rows]

    def _draft(self, new: list[int], length: int, tokens: NDArray[np.int32]) -> list[int]:
        # The last token of a context is sampled, never drafted.
        room = self._max_model_len - length - 1
        if not new or room < 1:
            return []
        before = length - len(new)
        name, unknown = self._rows.find(tokens, before, length)
        if unknown:
            # Rows of embeddings, where no ids are, may hold any number.
            self._texts.open(name, np.maximum(tokens[:before], 0).tolist())
        self._texts.extend(name, new)
        return self._texts.propose(name, min(self._most, room)).tokens
