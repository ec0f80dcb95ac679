"""What SGLang's verification of drafts asks of a device, in torch: operations that it has as kernels alone.

The worker, its trees, memory, the relay between passes, sampling and what is done with results are SGLang's.
Each function here has the place and the arguments of a kernel's front in SGLang, and is written from what
that front documents, with loops where a kernel has threads.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.nn.functional import scaled_dot_product_attention

from penstock_refcpu.sampled_verification import (
    top_k_renorm_prob,
    top_p_renorm_prob,
    tree_speculative_sampling_target_only,
)

TREES = "sglang.kernels.ops.speculative.reconstruct_tree"
VERIFICATION = "sglang.srt.speculative.eagle_utils"
SAMPLERS = {
    function.__name__: function
    for function in (tree_speculative_sampling_target_only, top_k_renorm_prob, top_p_renorm_prob)
}
KERNELS = "sgl_kernel"
"""The compiled package, from which SGLang before 0.5.23 takes all of them."""


def install() -> None:
    """Put the stand-ins in place. Call it in a worker's process before SGLang makes a speculative worker."""
    pool = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
    operations = "sglang.kernels.ops.speculative"
    replaced: dict[str, Callable[..., Any]] = {
        f"{operations}.eagle.fill_accept_out_cache_loc_func": fill_accept_out_cache_loc,
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": assign_req_to_token_pool,
        f"{pool}._init_kv_copy_and_warmup": init_kv_copy,
    }
    if find_spec("sglang.kernels.ops.speculative.verify_sampling"):
        _stand_in_for_trees()
        # Without a kernel these names are None, which SGLang's hooks cannot tell from any other None.
        vars(importlib.import_module(VERIFICATION)).update(SAMPLERS)
        replaced[f"{operations}.spec_tree.verify_tree_greedy_func"] = verify_tree_greedy
        replaced[f"{operations}.cache_locs.fill_front_out_cache_loc_func"] = fill_front_out_cache_loc
    else:
        _stand_in_for_kernels()
        # A kernel itself, called for a grid of threads.
        launched = defaultdict(lambda: assign_extend_cache_locs)
        vars(importlib.import_module("sglang.srt.speculative.spec_utils"))["assign_extend_cache_locs"] = (
            launched
        )
        replaced[f"{VERIFICATION}.verify_tree_greedy_func"] = verify_tree_greedy
    for target, stand_in in replaced.items():
        HookRegistry.register(target, stand_in, HookType.REPLACE)
    native = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{native}.forward_extend", forward_extend, HookType.AROUND)
    HookRegistry.apply_hooks()


def _stand_in_for_trees() -> None:
    """SGLang's module of this name imports a compiled package, whatever is used of it."""
    module = ModuleType(TREES)
    vars(module)["reconstruct_indices_from_tree_mask_func"] = reconstruct_indices_from_tree_mask
    sys.modules[TREES] = module
    parent, _, name = TREES.rpartition(".")
    setattr(importlib.import_module(parent), name, module)


def _stand_in_for_kernels() -> None:
    package, trees = ModuleType(KERNELS), ModuleType(f"{KERNELS}.speculative")
    vars(package).update(SAMPLERS, speculative=trees)
    vars(trees)["reconstruct_indices_from_tree_mask"] = reconstruct_indices_from_tree_mask
    sys.modules.update({module.__name__: module for module in (package, trees)})


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions and links of trees whose mask ``[batch, nodes, nodes]`` says who is whose ancestor."""
    mask = tree_mask.view(batch_size, draft_token_num, draft_token_num).tolist()
    for row, (tree, length) in enumerate(zip(mask, verified_seq_len.tolist(), strict=True)):
        parents = []
        for node, marks in enumerate(tree):
            ancestors = [other for other in range(node) if marks[other]]
            parents.append(ancestors[-1] if ancestors else -1)
            positions[row * draft_token_num + node] = length + len(ancestors)
        for node, parent in enumerate(parents):
            later = range(node + 1, draft_token_num)
            children = [other for other in later if parents[other] == node]
            siblings = [other for other in later if parent >= 0 and parents[other] == parent]
            retrieve_index[row, node] = row * draft_token_num + node
            retrieve_next_token[row, node] = children[0] if children else -1
            retrieve_next_sibling[row, node] = siblings[0] if siblings else -1


def verify_tree_greedy(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk each tree along what the model says, as far as a child holds it."""
    for row in range(len(candidates)):
        node, accepted = 0, 0
        accept_index[row, 0] = retrieve_index[row, 0]
        while True:
            wanted = target_predict[row, node]
            predicts[retrieve_index[row, node]] = wanted
            child = int(retrieve_next_token[row, node])
            while child >= 0 and candidates[row, child] != wanted:
                child = int(retrieve_next_sibling[row, child])
            if child < 0 or accepted + 1 == accept_index.shape[1]:
                break
            node, accepted = child, accepted + 1
            accept_index[row, accepted] = retrieve_index[row, node]
        accept_token_num[row] = accepted
    return predicts, accept_index, accept_token_num


def fill_front_out_cache_loc(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """The first ``num_front[i]`` slots of each request's window, packed."""
    windows = out_cache_loc.view(len(num_front), -1)
    packed = torch.cat([window[:count] for window, count in zip(windows, num_front.tolist(), strict=True)])
    front_out_cache_loc[: len(packed)] = packed


def fill_accept_out_cache_loc(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor, size: int
) -> None:
    """The slots of accepted nodes, packed; -1 stands for none."""
    accepted = accept_index[accept_index >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into each request's row, from its start to its end."""
    taken = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in spans:
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


def assign_extend_cache_locs(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    *_sizes: int,
) -> None:
    """The slots of each request's row from its start to its end, packed."""
    taken = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in spans:
        out_cache_loc[taken : taken + end - start] = req_to_token[row, start:end]
        taken += end - start


def init_kv_copy(pool: Any) -> None:
    """Have the pool move slots with SGLang's own torch code in the place of its Triton kernel."""
    pool._kv_copy_config = None
    pool.use_native_move_kv_cache = True


def extend_cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    draft_token_num: int,
    **_unused: Any,
) -> torch.Tensor:
    """The slots ``[batch * nodes]`` that a verification writes; SGLang asks the platform for this one."""
    columns = start_offset.long()[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long()[:, None], columns].flatten().long()


def forward_extend(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    batch: Any,
    save_kv_cache: bool = True,
    **given: Any,
) -> torch.Tensor:
    """Around ``TorchNativeAttnBackend.forward_extend``, which knows no trees: attention of every node to the
    committed tokens and to its ancestors, as the mask of the verification says."""
    if not batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, batch, save_kv_cache, **given)
    pool = backend.token_to_kv_pool
    if save_kv_cache:
        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, backend.swa_out_cache_loc), k, v)
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    nodes, mask = batch.spec_info.draft_token_num, batch.spec_info.custom_mask
    outputs = []
    queries = q.view(batch.batch_size, nodes, layer.tp_q_head_num, layer.qk_head_dim)
    for query, row, length in zip(queries, batch.req_pool_indices, batch.seq_lens.tolist(), strict=True):
        seen = length + nodes
        slots = backend.req_to_token_pool.req_to_token[row, :seen]
        visible, mask = mask[: nodes * seen].view(nodes, seen), mask[nodes * seen :]
        output = scaled_dot_product_attention(
            query.transpose(0, 1),
            keys[slots].to(q.dtype).transpose(0, 1),
            values[slots].to(q.dtype).transpose(0, 1),
            attn_mask=visible,
            scale=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
        )
        outputs.append(output.transpose(0, 1).reshape(nodes, -1))
    return torch.cat(outputs)
