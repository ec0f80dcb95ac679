"""Sparse attention on vLLM's own CPU layer, metadata builder and kernels, without a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from penstock.benchmarks.sparse_keys import made_up

pytest.importorskip("vllm")

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.tiny_model import ensure_model
from penstock.kernels.sparse.attention import Partial, attend, merge
from penstock.kernels.sparse.block_index import BlockIndex
from penstock.kernels.sparse.paged_decode import PagedDecode
from penstock.patches.vllm.builds import is_cpu_build
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm import sparse_backend, sparse_blocks

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="needs vLLM's CPU kernels")

SHAPE = Shape(heads=8, kv_heads=2, head_size=64, block_tokens=32, blocks=96, dtype=torch.float32)
SPARSE = {
    "least_tokens": 512,
    "mass": 0.6,
    "most_share": 0.95,
    "calibration_share": 0.0,
    "log_steps": 0,
    "estimate_rest": False,
}
TOKENS = 1500


@pytest.fixture(scope="module", autouse=True)
def _enabled() -> None:
    from penstock.plugins.vllm.sparse_attention import enable

    enable()


@pytest.fixture(scope="module")
def rigs() -> tuple[AttentionRig, AttentionRig]:
    model = str(ensure_model())
    return AttentionRig(model, SHAPE, "CPU_ATTN"), AttentionRig(model, SHAPE, "CUSTOM", SPARSE)


@pytest.fixture(scope="module")
def estimating_rig() -> AttentionRig:
    return AttentionRig(str(ensure_model()), SHAPE, "CUSTOM", {**SPARSE, "estimate_rest": True})


def poison(rig, layout="layer by layer"):
    """Fill the cache with NaN, in one of two memory layouts."""
    shape = (SHAPE.blocks, SHAPE.kv_heads, SHAPE.block_tokens, 2 * SHAPE.head_size)
    if layout == "layer by layer":
        rig.cache = torch.full(shape, math.nan)
    else:
        rig.cache = torch.full((shape[0], 3, *shape[1:]), math.nan)[:, 1]
    return rig


@pytest.fixture(params=["layer by layer", "layers within a block"])
def both(request, rigs) -> tuple[AttentionRig, AttentionRig]:
    """Stock's layer and ours, on caches full of NaN, in either memory layout."""
    for rig in rigs:
        poison(rig, request.param)
    return rigs


@pytest.fixture(params=["layer by layer", "layers within a block"])
def estimating(request, estimating_rig) -> AttentionRig:
    return poison(estimating_rig, request.param)


def context(seed: int, tokens: int = TOKENS):
    """Query [1, Hq, D], keys and values [n, H, D], and blocks for them, in random order."""
    layer = made_up("peaky", seed=seed, tokens=tokens, steps=1, heads=2, size=64)
    query = layer.queries[0].flatten(0, 1)[None] * 64**0.5
    blocks = torch.randperm(95, generator=torch.Generator().manual_seed(seed)).add(1)
    keys, values = (rows.transpose(0, 1).contiguous() for rows in (layer.keys, layer.values))
    return query, keys, values, blocks[: -(-tokens // 32)].tolist()


def own(rig, tables):
    """Clear what requests hold: stock's kernel multiplies the rest of a last block by zero."""
    rig.cache[torch.tensor([block for table in tables for block in table])] = 0.0


def reference(query, keys, values, tokens=None):
    """Attention [Hq, D] over ``tokens`` (bool [H, n]), all of them if absent."""
    grouped = query.view(2, 4, 64) / 8
    scores = grouped @ keys.permute(1, 2, 0)
    if tokens is not None:
        scores = scores.masked_fill(~tokens[:, None], -math.inf)
    return (scores.softmax(-1) @ values.transpose(0, 1)).view(8, 64)


def chosen_tokens(rig, query, blocks, tokens):
    pages = rig.impl.decode.pages(query.view(2, 4, 64) / 8, torch.tensor(blocks), tokens, 32)
    assert pages is not None
    return pages.repeat_interleave(32, 1)[:, :tokens]


def test_a_decode_step_reads_the_chosen_pages_of_its_own_request_alone(both):
    _, ours = both
    query, keys, values, blocks = context(1)
    own(ours, [blocks])
    ours.write(keys, values, blocks)
    found = ours.attend(query, ours.metadata([blocks], [TOKENS], [1]))[0]
    read = chosen_tokens(ours, query, blocks, TOKENS)
    assert read.float().mean() < 0.7
    torch.testing.assert_close(found, reference(query, keys, values, read), rtol=1e-4, atol=1e-4)


def test_requests_of_a_batch_are_what_they_are_alone(both):
    _, ours = both
    contexts = [context(seed, tokens) for seed, tokens in ((2, 1100), (3, 700), (4, 100))]
    free = list(range(1, 96))
    tables = []
    for _, keys, values, blocks in contexts:
        tables.append([free.pop() for _ in blocks])
        own(ours, tables[-1:])
        ours.write(keys, values, tables[-1])
    counts = [len(keys) for _, keys, _, _ in contexts]
    queries = torch.cat([query for query, *_ in contexts])
    together = ours.attend(queries, ours.metadata(tables, counts, [1, 1, 1]))
    assert together.isfinite().all()
    for row, (query, keys, values, _), table, count in zip(together, contexts, tables, counts, strict=True):
        read = None if count < 512 else chosen_tokens(ours, query, table, count)
        torch.testing.assert_close(row, reference(query, keys, values, read), rtol=1e-4, atol=1e-4)


def with_rows(query, rows):
    """A query for each of ``rows`` that are alike, as those of drafts often are."""
    return query + 0.2 * torch.randn(rows, 8, 64, generator=torch.Generator().manual_seed(rows))


def row_by_row(rig, queries, keys, values, blocks, tokens):
    """Attention of the last tokens' ``queries`` over what they read together, none past its own place."""
    rows = len(queries)
    group = (queries / 8).view(rows, 2, 4, 64).transpose(0, 1).flatten(1, 2)
    known = tokens - rows + 1
    pages = rig.impl.decode.pages(group, torch.tensor(blocks[: -(-known // 32)]), known, 32)
    assert pages is not None
    pages = torch.nn.functional.pad(pages, (0, len(blocks) - pages.shape[1]), value=True)
    read = pages.repeat_interleave(32, 1)[:, :tokens]
    own = [read & (torch.arange(tokens) <= tokens - rows + row) for row in range(rows)]
    return torch.stack(
        [reference(q[None], keys, values, one) for q, one in zip(queries, own, strict=True)]
    ), read


@pytest.mark.parametrize("tokens", [TOKENS, 1474, 1472])
def test_rows_of_drafts_read_what_they_need_together_and_nothing_that_comes_after_them(
    both, tokens, monkeypatch
):
    _, ours = both
    monkeypatch.setattr(ours.builder, "_most_rows", 4)
    query, keys, values, blocks = context(11, tokens)
    own(ours, [blocks])
    ours.write(keys, values, blocks)
    queries = with_rows(query, 4)
    found = ours.attend(queries, ours.metadata([blocks], [tokens], [4]))
    want, read = row_by_row(ours, queries, keys, values, blocks, tokens)
    assert read.float().mean() < 0.8
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def with_rest(rig, queries, keys, values, blocks, tokens):
    """Attention [T, Hq, D] of the last tokens' ``queries`` over what they read, and what stands for the rest;
    and without the rest."""
    rows = len(queries)
    group = (queries / 8).view(rows, 2, 4, 64).transpose(0, 1)
    known = tokens - rows + 1
    read = rig.impl.decode.read(group.flatten(1, 2), torch.tensor(blocks[: -(-known // 32)]), known, 32)
    pages = torch.nn.functional.pad(read.pages, (0, len(blocks) - read.pages.shape[1]), value=True)
    chosen = pages.repeat_interleave(32, 1)[:, :tokens]
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    found = []
    for row in range(rows):
        seen = chosen & (torch.arange(tokens) <= tokens - rows + row)
        part = attend(group[:, row], keys, values, seen)
        rest = Partial(*(each.unflatten(1, (rows, 4))[:, row] for each in read.rest))
        found.append((merge(part, rest).output.view(8, 64), part.output.view(8, 64)))
    return tuple(torch.stack(outputs) for outputs in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_read_is_estimated_and_the_output_is_nearer_to_dense(estimating, rows, monkeypatch):
    monkeypatch.setattr(estimating.builder, "_most_rows", 3)
    query, keys, values, blocks = context(15)
    own(estimating, [blocks])
    estimating.write(keys, values, blocks)
    queries = with_rows(query, rows)
    found = estimating.attend(queries, estimating.metadata([blocks], [TOKENS], [rows]))
    expected, without = with_rest(estimating, queries, keys, values, blocks, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    dense = torch.stack(
        [
            reference(one[None], keys[: TOKENS - rows + 1 + row], values[: TOKENS - rows + 1 + row])
            for row, one in enumerate(queries)
        ]
    )
    assert (found - dense).norm() < 0.9 * (without - dense).norm()


def test_a_batch_in_which_some_read_everything_has_estimates_for_the_others_alone(estimating):
    contexts = [context(seed, tokens) for seed, tokens in ((16, 1100), (17, 100), (18, 900))]
    free = list(range(1, 96))
    tables = []
    for _, keys, values, blocks in contexts:
        tables.append([free.pop() for _ in blocks])
        own(estimating, tables[-1:])
        estimating.write(keys, values, tables[-1])
    counts = [len(keys) for _, keys, _, _ in contexts]
    queries = torch.cat([query for query, *_ in contexts])
    together = estimating.attend(queries, estimating.metadata(tables, counts, [1, 1, 1]))
    for row, (query, keys, values, _), table, count in zip(together, contexts, tables, counts, strict=True):
        if count < 512:
            expected = reference(query, keys, values)
        else:
            expected = with_rest(estimating, query, keys, values, table, count)[0][0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_saved_our_kernel_reads_everything(both, monkeypatch):
    query, keys, values, blocks = context(19)
    outputs = []
    monkeypatch.setattr(PagedDecode, "choose", lambda *_: None)
    for rig in both:
        own(rig, [blocks])
        rig.write(keys, values, blocks)
        outputs.append(rig.attend(query, rig.metadata([blocks], [TOKENS], [1])))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_cache_that_our_kernel_does_not_read_is_stocks_and_nothing_is_estimated(rigs, monkeypatch):
    monkeypatch.setattr(sparse_backend, "own_attention", lambda *_: None)
    ours = poison(rigs[1])
    query, keys, values, blocks = context(20)
    own(ours, [blocks])
    ours.write(keys, values, blocks)
    found = ours.attend(query, ours.metadata([blocks], [TOKENS], [1]))[0]
    read = chosen_tokens(ours, query, blocks, TOKENS)
    assert not ours.impl.decode.index.has_values
    torch.testing.assert_close(found, reference(query, keys, values, read), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_beside_a_prompt_decode_rows_are_what_they_are_alone_and_the_prompt_is_stocks(
    both, order, monkeypatch
):
    stock, ours = both
    monkeypatch.setattr(ours.builder, "_most_rows", 3)
    free = list(range(1, 96))
    requests = []
    for seed, tokens, rows in ((12, 1400, 3), (13, 700, 40), (14, 600, 1)):
        query, keys, values, _ = context(seed, tokens)
        blocks = [free.pop() for _ in range(-(-tokens // 32))]
        for rig in both:
            own(rig, [blocks])
            rig.write(keys, values, blocks)
        requests.append((with_rows(query, rows), keys, values, blocks, tokens, rows))
    requests = [requests[number] for number in order]
    queries = torch.cat([request[0] for request in requests])
    tables, tokens, rows = ([request[field] for request in requests] for field in (3, 4, 5))
    found = ours.attend(queries, ours.metadata(tables, tokens, rows)).split(rows)
    dense = stock.attend(queries, stock.metadata(tables, tokens, rows)).split(rows)
    for part, plain, (asked, keys, values, blocks, length, count) in zip(found, dense, requests, strict=True):
        if count == 40:
            torch.testing.assert_close(part, plain, rtol=1e-5, atol=1e-6)
            continue
        want, read = row_by_row(ours, asked, keys, values, blocks, length)
        assert read.float().mean() < 0.95
        torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "rows"), [(511, 1), (TOKENS, 3), (TOKENS, 40)])
def test_short_contexts_and_prefill_are_stocks_to_the_bit(both, tokens, rows):
    _, keys, values, blocks = context(5, tokens)
    queries = torch.randn(rows, 8, 64)
    outputs = []
    for rig in both:
        own(rig, [blocks])
        rig.write(keys, values, blocks)
        outputs.append(rig.attend(queries, rig.metadata([blocks], [tokens], [rows])))
    assert torch.equal(*outputs)


def test_blocks_that_change_hands_between_two_steps_are_seen_anew(both):
    _, ours = both
    query, keys, values, blocks = context(6)
    own(ours, [blocks])
    ours.write(keys, values, blocks)
    ours.attend(query, ours.metadata([blocks], [TOKENS], [1]))
    query, keys, values, _ = context(7)
    ours.write(keys, values, blocks)
    stale = chosen_tokens(ours, query, blocks, TOKENS)
    hand_out(ours, [blocks], computed=0)
    fresh = chosen_tokens(ours, query, blocks, TOKENS)
    ours.impl.bind(ours.impl.worker, 5)
    ours.attend(query, ours.metadata([blocks], [TOKENS], [1]))
    assert torch.equal(fresh, chosen_tokens(ours, query, blocks, TOKENS))
    assert not torch.equal(fresh, stale)


def hand_out(rig, new=(), computed=0, added=()):
    """A step of a scheduler that gives ``new`` requests blocks, and running ones the ``added`` blocks."""
    spec = SimpleNamespace(block_size=rig.shape.block_tokens)
    groups = [SimpleNamespace(kv_cache_spec=spec)]
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=rig.shape.blocks, kv_cache_groups=groups)
    )
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(b,), num_computed_tokens=computed) for b in new],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None, *((b,) for b in added)]),
    )
    sparse_blocks.hear(runner, output)


@pytest.fixture
def index():
    found = BlockIndex(blocks=96, heads=1, block_tokens=32, head_size=8, summary_tokens=16, rounds=0)
    sparse_blocks.register(found)
    found.put(torch.arange(96), torch.zeros(1, 96, 32, 8))
    return found


def test_handed_out_blocks_are_forgotten_but_for_the_cached_prefix(rigs, index):
    hand_out(rigs[0], new=[[5, 6, 7, 8]], computed=64, added=[[20], [30, 31]])
    assert index.missing(torch.arange(96)).tolist() == [7, 8, 20, 30, 31]


def test_where_a_connector_fills_blocks_the_prefix_is_forgotten_too(rigs, index, monkeypatch):
    monkeypatch.setattr(sparse_blocks, "_cached_tokens_stand", lambda: False)
    hand_out(rigs[0], new=[[5, 6, 7]], computed=64)
    assert index.missing(torch.arange(96)).tolist() == [5, 6, 7]


def test_blocks_of_the_manager_that_the_kernel_splits(rigs, index):
    rig = SimpleNamespace(shape=Shape(block_tokens=64, blocks=48))
    hand_out(rig, added=[[3]])
    assert index.missing(torch.arange(96)).tolist() == [6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_are_read_as_they_were_written_even_in_an_order_nobody_knows(dtype, monkeypatch):
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from penstock.plugins.vllm import packed_keys

    isa = _get_attn_isa(dtype, 32, 64)
    cache = torch.zeros(4, 2, 32, 128, dtype=dtype)
    rows = torch.randn(64, 2, 64).to(dtype)
    parts = cache.view(4, 2, 64, 64).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(rows, rows, *parts, torch.arange(64) + 32, isa)
    expected = rows.view(2, 32, 2, 64).permute(2, 0, 1, 3)
    assert torch.equal(packed_keys.PackedKeys(cache, isa).read(torch.tensor([1, 2])), expected)
    size = 32 * 64
    transposed = torch.arange(size).view(64, 32).t().flatten()
    monkeypatch.setattr(packed_keys, "key_order", lambda *_: transposed)
    assert torch.equal(packed_keys.PackedKeys(cache, isa).read(torch.tensor([1, 2])), expected)
    assert torch.equal(
        packed_keys.PackedKeys(cache, isa).read(torch.tensor([2]), slice(1, 2)), expected[1:, 1:]
    )


def test_layers_that_cannot_be_sparse_are_dense_and_named(caplog):
    model = str(ensure_model())
    rig = AttentionRig(model, SHAPE, "CUSTOM", SPARSE, per_layer_sliding_window=256)
    assert rig.impl.worker is None or rig.impl.dense_reason == "a sliding window of 256"
    assert "leaves 1 layers dense: model.layers.5.self_attn.attn: a sliding window of 256" in caplog.text


@pytest.mark.parametrize(
    ("cache", "size", "sizes", "message"),
    [
        ("fp8_e5m2", 64, [32, 64], "given a KV cache of fp8_e5m2, allowed: one of 16 or 32 bits"),
        ("auto", 100, [32, 64], "given heads of 100, allowed: 32, 64"),
        ("auto", 512, range(16, 257), "given heads of 512, allowed: 16 to 256"),
    ],
)
def test_what_no_layer_can_be_sparse_with_is_refused(cache, size, sizes, message):
    from penstock.plugins.vllm.sparse_worker import check

    with pytest.raises(ConfigurationError, match=message):
        check(cache, size, sizes)


def test_first_layers_stay_stocks(caplog):
    rig = AttentionRig(str(ensure_model()), SHAPE, "CUSTOM", SPARSE, layer=1)
    assert rig.impl.worker is None
    assert "compiled kernels" not in caplog.text


def test_nothing_is_compiled_after_start_up(caplog):
    pytest.importorskip("numba")
    caplog.set_level("INFO", "vllm.penstock")
    shape = Shape(heads=8, kv_heads=2, head_size=64, block_tokens=32, blocks=96)
    rig = AttentionRig(str(ensure_model()), shape, "CUSTOM", {**SPARSE, "calibration_share": 1.0})
    assert "sparse attention has compiled kernels after" in caplog.text
    before = compiled_signatures()
    query, keys, values, blocks = (part if isinstance(part, list) else part.bfloat16() for part in context(8))
    rig.write(keys, values, blocks)
    rig.attend(query, rig.metadata([blocks], [TOKENS], [1]))
    assert rig.impl.worker.stats.selections == 1
    assert compiled_signatures() == before


def compiled_signatures():
    from penstock.kernels.sparse import fused_choice, fused_exact, fused_masses

    return {
        name: len(function.signatures)
        for module in (fused_choice, fused_exact, fused_masses)
        for name, function in vars(module).items()
        if hasattr(function, "signatures")
    }


def test_the_log_says_what_was_measured_once_for_every_so_many_selections(caplog):
    from penstock.kernels.sparse.serving import ServingConfig
    from penstock.plugins.vllm.sparse_worker import SparseWorker

    worker = SparseWorker(ServingConfig(log_steps=2))
    worker.tell_index(2**20, 16 * 2**20)
    worker.stats.measured(0.75)
    for _ in range(5):
        worker.stats.chosen(3, 8, 32, 0.004)
        worker.tell_progress()
    lines = [record.message for record in caplog.records if "sparse attention" in record.message]
    assert len(lines) == 2
    assert "read 25.0 % of pages in 4 selections, 4.00 ms each" in lines[-1]
    assert "attained mass P10 0.750, P50 0.750 of 1 measured" in lines[-1]
    assert "index at most 1 MiB, 6.2 % of the KV cache" in lines[-1]
