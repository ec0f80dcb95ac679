"""What SGLang asks of a device to verify drafts of requests that sample, in torch.

The target's probabilities alone decide: a draft has no probability of its own. At a node one number is drawn,
and its children are tried in their order; each has, with those before it, the share of [0, 1) that the target
gives them. So a child is taken as often as the target says its token, and where none is, the next token is
drawn from what is left. That holds as long as no token stands twice among the children of a node.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walk each tree ``[batch, nodes]`` as far as children are taken, and draw the token after it.

    ``target_probs`` are ``[batch, nodes, vocabulary]``; ``draft_probs``, zeros of that shape, are left with
    what refused children had. A child is also taken at a probability of ``threshold_single`` or more; below
    1, ``threshold_acc`` makes all children likelier. ``accept_index [batch, depth]``, ``accept_token_num
    [batch]`` (drafts) and ``predicts [batch * nodes]`` are written as by a greedy verification.
    """
    least = max(threshold_acc, 1e-9)
    for row, final in enumerate(uniform_samples_for_final_sampling.tolist()):
        links = retrive_next_token[row].tolist(), retrive_next_sibling[row].tolist()
        place, node, accepted = int(retrive_index[row, 0]), 0, 0
        accept_index[row, 0] = place
        while True:
            coin, reached, taken = float(uniform_samples[row, node]), 0.0, None
            children = _children(node, *links) if accepted + 1 < accept_index.shape[1] else ()
            for child in children:
                token = int(candidates[row, child])
                share = float(target_probs[row, node, token])
                reached += share
                if share > 0 and (coin < reached / least or share >= threshold_single):
                    taken = child
                    break
                draft_probs[row, node, token] = share
            if taken is None:
                break
            predicts[place] = candidates[row, taken]
            node, place, accepted = taken, int(retrive_index[row, taken]), accepted + 1
            accept_index[row, accepted] = place
        accept_token_num[row] = accepted
        predicts[place] = _drawn(target_probs[row, node] - draft_probs[row, node], final)


def _children(node: int, first: list[int], sibling: list[int]) -> Iterator[int]:
    child = first[node]
    while child >= 0:
        yield child
        child = sibling[child]


def _drawn(left: torch.Tensor, coin: float) -> int:
    """The token at ``coin`` of what is left ``[vocabulary]``, the last possible one where sums round down."""
    reached = left.clamp(min=0).cumsum(0)
    token = int(torch.searchsorted(reached, coin * reached[-1], right=True))
    return token if token < len(left) else int(left.gt(0).nonzero()[-1])


def top_k_renorm_prob(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """``probs [rows, vocabulary]`` of which each row keeps its ``top_k [rows]`` likeliest tokens."""
    ranked = probs.sort(dim=-1, descending=True).values
    last = ranked.gather(1, top_k.long().clamp(max=probs.shape[1])[:, None] - 1)
    return _renormed(probs, last)


def top_p_renorm_prob(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """``probs [rows, vocabulary]`` of which each row keeps its likeliest tokens up to a sum of ``top_p``."""
    ranked = probs.sort(dim=-1, descending=True).values
    before = ranked.cumsum(-1) - ranked
    kept = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    return _renormed(probs, ranked.gather(1, kept - 1))


def _renormed(probs: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    kept = torch.where(probs >= least, probs, 0)
    return kept / kept.sum(-1, keepdim=True)
