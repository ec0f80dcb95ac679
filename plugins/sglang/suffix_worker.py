"""SGLang's worker for drafts without a model, with drafts from suffixes; it verifies them as its own."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.ngram_worker import NGRAMWorker, assign_extend_cache_locs_func

from penstock.plugins.sglang.features import SUFFIX_DRAFTER
from penstock.plugins.sglang.hooks import confirm
from penstock.plugins.sglang.settings import inherited
from penstock.plugins.sglang.suffix_settings import suffix_config
from penstock.plugins.sglang.suffix_texts import BatchDrafts, BatchTexts, rows_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult


class SuffixWorker(NGRAMWorker):
    """Overrides where drafts come from, and whether a pass verifies any. Verification, memory, the overlap of
    passes and grammars are SGLang's.

    A pass has ``--speculative-num-draft-tokens`` positions for each request, or one: attention backends and
    captured graphs know no other widths.

    Raises:
        FeatureError: SGLang did not apply our hooks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        confirm(SUFFIX_DRAFTER.hooks)
        super().__init__(*args, **kwargs)
        branches = get_spec().speculative_eagle_topk
        self._texts = BatchTexts(suffix_config(inherited()), self.draft_token_num, branches)
        self._keeps_states = mambaish_config(self.model_runner.model_config) is not None
        self._drafts: BatchDrafts | None = None
        self._in_flight: deque[int] = deque()
        self.counts = {"allocated": 0, "accepted": 0, "wasted": 0}
        """Draft tokens of the passes that came back."""

    def clear_cache_pool(self) -> None:
        """The caches are flushed, and what was said is forgotten with them."""
        super().clear_cache_pool()
        self._texts.reset()

    def forward_batch_generation(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> GenerationBatchResult:
        """A pass, with a verification only where a draft is likely enough to come true."""
        decodes = batch.forward_mode.is_decode()
        result = super().forward_batch_generation(batch, *args, **kwargs)
        if decodes and batch.spec_info is None:
            # Without a verification the base class answers one token a request, and relays them padded.
            result.next_token_ids = result.next_draft_input.accept_tokens
        return result

    def _prepare_for_speculative_decoding(self, batch: ScheduleBatch) -> None:
        if not batch.forward_mode.is_decode():
            return
        self._drafts = self._texts.drafts(rows_of(batch, self.draft_token_num))
        if self._drafts.worthwhile or not self._may_decode_plainly(batch):
            self._in_flight.append(self._drafts.drafted)
            super()._prepare_for_speculative_decoding(batch)
        else:
            self._in_flight.append(0)
            self._decode_plainly(batch, self._drafts.tokens[:, 0])

    def _prepare_draft_tokens(self, batch: ScheduleBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        assert self._drafts is not None
        return self._drafts.tokens.reshape(-1), self._drafts.mask.reshape(-1)

    def _may_decode_plainly(self, batch: ScheduleBatch) -> bool:
        """Whether a pass without a verification is as good: with captured graphs, which are of verifications,
        it would be the slower one. Grammars and what is reported of logits are laid out for verifications,
        and states of layers without a cache are committed by them."""
        return not (
            self.model_runner.decode_cuda_graph_captured
            or batch.has_grammar
            or batch.return_logprob
            or batch.return_hidden_states
            or any(req.return_sampling_mask for req in batch.reqs)
            or self._keeps_states
        )

    def _decode_plainly(self, batch: ScheduleBatch, last: NDArray[np.int64]) -> None:
        """Have the pass decode one token a request: what SGLang prepares where nothing speculates."""
        batch.input_ids = torch.from_numpy(last.copy()).to(self.device)
        batch.out_cache_loc = assign_extend_cache_locs_func(
            req_pool_indices=batch.req_pool_indices,
            req_to_token=batch.req_to_token_pool.req_to_token,
            start_offset=batch.seq_lens,
            end_offset=batch.seq_lens + 1,
            batch_size=len(batch.reqs),
            draft_token_num=1,
            device=self.device,
        )
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        # Summed up again where it is needed.
        batch.seq_lens_sum = None
        batch.spec_info = None

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """A pass came back, in the order in which passes were made."""
        super().on_verify_complete_cpu(num_correct_drafts_per_req, batch_size)
        drafted, accepted = self._in_flight.popleft(), sum(num_correct_drafts_per_req)
        self.counts["allocated"] += drafted
        self.counts["accepted"] += accepted
        # Padding comes true now and then.
        self.counts["wasted"] += max(0, drafted - accepted)

    def _update_ngram_corpus(self, batch: ScheduleBatch) -> None:
        """Texts are followed where drafts are made."""
