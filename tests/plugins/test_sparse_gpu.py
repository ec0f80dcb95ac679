"""Sparse attention over vLLM's own Triton backend: its layer, metadata builder and kernels, interpreted."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.tiny_model import ensure_model
from penstock.kernels.triton import reference
from penstock.kernels.triton.launch import INTERPRETED
from penstock.patches.vllm.builds import is_cpu_build
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm import sparse_attention, sparse_blocks

pytestmark = pytest.mark.skipif(
    not (is_cpu_build() and INTERPRETED), reason="needs vLLM on a CPU, and Triton's interpreter"
)

HEADS, GROUP, SIZE, N, PAGES = 1, 2, 32, 16, 8
SHAPE = Shape(
    heads=HEADS * GROUP, kv_heads=HEADS, head_size=SIZE, block_tokens=N, blocks=20, dtype=torch.float32
)
SPARSE = {
    "least_tokens": 40, "mass": 0.5, "most_share": 1.0, "calibration_share": 0.0, "margin": 0.0,
    "sink_tokens": 1, "recent_tokens": 8, "log_steps": 0,
}  # fmt: skip
platform_backend = sparse_attention._backend
OURS = "penstock.plugins.vllm.sparse_triton"
STOCK = ("vllm.v1.attention.ops.triton_", "vllm.v1.attention.backends.triton_attn", OURS)


def loaded():
    return [name for name in sys.modules if name.startswith(STOCK)]


@pytest.fixture(scope="module")
def backend():
    """Our backend over stock's, whose kernels vLLM's CPU build leaves out, in Triton's interpreter."""
    import triton
    import triton.language
    from vllm import triton_utils
    from vllm.v1.attention.selector import _cached_get_attn_backend

    before = {name: sys.modules.pop(name) for name in loaded()}
    with pytest.MonkeyPatch.context() as patch:
        for name, real in {"triton": triton, "tl": triton.language, "HAS_TRITON": True}.items():
            patch.setattr(triton_utils, name, real)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        from penstock.plugins.vllm.sparse_triton import SparseTritonBackend

        patch.setattr(sparse_attention, "_backend", lambda: SparseTritonBackend)
        sparse_attention.enable()
        _cached_get_attn_backend.cache_clear()
        yield SparseTritonBackend
    _cached_get_attn_backend.cache_clear()
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def rig(backend):
    """A layer of ours on a cache full of NaN, bound by a first step."""
    return make_rig()


def make_rig(**sparse):
    rig = AttentionRig(str(ensure_model()), SHAPE, "CUSTOM", SPARSE | sparse)
    bind(rig)
    return rig


def bind(rig):
    rig.cache = torch.full_like(rig.cache, torch.nan)
    rig.layer.kv_cache = rig.cache
    step(rig, [[1]], [1], [1])


def step(rig, tables, tokens, rows):
    return rig.metadata([row + [0] * (PAGES - len(row)) for row in tables], tokens, rows)


def keys_of(seed, tokens, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(tokens, HEADS, SIZE, generator=generator) * sharp
    return keys, torch.randn(tokens, HEADS, SIZE, generator=generator)


def asked(seed, rows):
    return torch.randn(rows, HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def dense(queries, keys, values):
    """Causal attention of the last tokens' ``queries``, in torch."""
    rows, tokens = len(queries), len(keys)
    scores = torch.einsum("thgd,shd->hgts", queries.view(rows, HEADS, GROUP, SIZE), keys) * SIZE**-0.5
    past = torch.arange(tokens) <= torch.arange(tokens - rows, tokens)[:, None]
    weights = scores.masked_fill(~past, -torch.inf).softmax(-1)
    return torch.einsum("hgts,shd->thgd", weights, values).reshape(rows, HEADS * GROUP, SIZE)


def expected(rig, query, tables, tokens):
    """What the lists of the last step should have given: the pages read, and an estimate of the others."""
    layers = rig.impl.sparse
    one = layers._step_of(len(tokens))
    table = torch.zeros(len(tables), PAGES, dtype=torch.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    lengths = torch.tensor(tokens)
    taken = one.reads.taken.bool() & (torch.arange(PAGES) * N < lengths[:, None])
    unread = ~taken & (torch.arange(PAGES) < layers._counts[: len(tokens), None])
    logs = one.logs.masked_fill(~unread[:, None, None], -torch.inf)
    index = layers._indexes[5]
    rest = logs, index.summaries.values
    cache = index.cache
    found = reference.attention(query, cache, table, lengths, SIZE**-0.5, taken.repeat_interleave(N, 1), rest)
    return found.output, taken


def test_prefill_in_chunks_is_stocks_and_decode_reads_chosen_pages(rig):
    blocks, other = [3, 9, 1, 12, 7, 15], [4]
    keys, values = keys_of(0, 86, sharp=2.0)
    own = torch.tensor([*blocks, *other])
    rig.cache[own] = 0.0
    queries = asked(1, 85)
    for first, last in ((0, 50), (50, 85)):
        metadata = step(rig, [blocks], [last], [last - first])
        rig.write(keys[first:last], values[first:last], blocks, first)
        out = rig.attend(queries[first:last], metadata)
        torch.testing.assert_close(
            out, dense(queries[first:last], keys[:last], values[:last]), rtol=1e-4, atol=1e-5
        )
    assert rig.impl.sparse._indexes[5].known.nonzero().flatten().tolist() == sorted(blocks[:5])
    short_keys, short_values = keys_of(2, 3)
    metadata = step(rig, [blocks, other], [86, 3], [1, 1])
    rig.write(keys[85:], values[85:], blocks, 85)
    rig.write(short_keys, short_values, other)
    query = asked(3, 2)
    out = rig.attend(query, metadata)
    want, taken = expected(rig, query, [blocks, other], [86, 3])
    assert 1 < taken[0].sum() < 6
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[1:], dense(query[1:], short_keys, short_values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "rows"), [(39, 1), (60, 2)])
def test_short_contexts_and_several_rows_are_stocks_to_the_bit(rig, tokens, rows):
    blocks = [2, 5, 8, 11]
    keys, values = keys_of(4, tokens)
    rig.cache[torch.tensor(blocks)] = 0.0
    metadata = step(rig, [blocks], [tokens], [rows])
    rig.write(keys, values, blocks)
    queries = asked(5, rows)
    ours = rig.attend(queries, metadata)
    stock = torch.empty_like(ours)
    super(type(rig.impl).__mro__[1], rig.impl).forward(
        rig.layer, queries, None, None, rig.cache, metadata, stock
    )
    assert torch.equal(ours, stock)


def test_the_host_decides_nothing_in_a_graph_of_decode_steps(rig):
    from vllm.v1.attention.backend import AttentionCGSupport

    common = SimpleNamespace(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32), seq_lens=torch.ones(1, dtype=torch.int32),
        num_reqs=1, num_actual_tokens=1, max_query_len=1, max_seq_len=1, causal=True,
        block_table_tensor=torch.zeros(1, PAGES, dtype=torch.int32), slot_mapping=torch.tensor([-1]),
        mm_req_doc_ranges=None, rswa_prefix_lens=None,
    )  # fmt: skip
    captured = rig.builder.build_for_cudagraph_capture(common)
    blocks = [2, 5, 8, 11]
    keys, values = keys_of(6, 60)
    rig.write(keys, values, blocks)
    # Replay: the same tensors, other contents.
    captured.block_table[0, :4] = torch.tensor(blocks)
    captured.seq_lens.fill_(60)
    query = asked(7, 1)
    out = rig.attend(query, captured)
    want, taken = expected(rig, query, [blocks], [60])
    assert taken.sum() < 4
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    support = type(rig.builder).get_cudagraph_support(rig.builder.vllm_config, rig.builder.kv_cache_spec)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_a_cache_that_is_made_anew_gets_an_index_of_its_own(rig):
    first = rig.impl.sparse
    bind(rig)
    assert rig.impl.sparse is not first
    assert rig.impl.sparse._indexes[5].cache.keys.data_ptr() == rig.cache.data_ptr()
    assert rig.builder._worker.cache_bytes == rig.cache.nbytes
    again = rig.impl.sparse
    step(rig, [[1, 2]], [20], [1])
    assert rig.impl.sparse is again


def test_blocks_that_a_connector_fills_are_forgotten_when_handed_out_and_caught_up(rig):
    rig.builder.vllm_config.kv_transfer_config = object()
    bind(rig)
    blocks = [2, 5, 8, 11]
    keys, values = keys_of(8, 60)
    rig.write(keys, values, blocks)
    known = rig.impl.sparse._indexes[5].known
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=N))]
    runner = SimpleNamespace(kv_cache_config=SimpleNamespace(num_blocks=20, kv_cache_groups=groups))
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=([5, 8],), num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
    )
    sparse_blocks.hear(runner, output)
    assert known.nonzero().flatten().tolist() == [2]
    query = asked(9, 1)
    out = rig.attend(query, step(rig, [blocks], [60], [1]))
    torch.testing.assert_close(out, dense(query, keys, values), rtol=1e-4, atol=1e-5)
    assert known.nonzero().flatten().tolist() == [2, 5, 8]


def test_first_layers_and_windows_stay_stocks(backend, caplog):
    model = str(ensure_model())
    rig = AttentionRig(model, SHAPE, "CUSTOM", SPARSE, layer=1)
    bind(rig)
    assert rig.impl.sparse is None
    rig = AttentionRig(model, SHAPE, "CUSTOM", SPARSE, per_layer_sliding_window=32)
    bind(rig)
    assert rig.impl.sparse is None
    assert "model.layers.5.self_attn.attn: a sliding window of 32" in caplog.text


@pytest.mark.parametrize(
    ("sparse", "change", "message"),
    [
        ({"group_rule": "union"}, {}, "group_rule: given union, allowed: ranked"),
        ({"budget": 0.5}, {}, "budget: given 0.5, allowed on a GPU: none"),
        ({"estimate_rest": False}, {}, "estimate_rest: given false, allowed on a GPU: true"),
        ({}, {"enable_dbo": True}, "given micro-batches"),
        ({}, {"block_size": 256}, "--block-size: given 256, allowed: at most 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_at_start_up(rig, sparse, change, message):
    from penstock.plugins.vllm.sparse_gpu import gpu_config

    config = SimpleNamespace(
        additional_config={"penstock": {"sparse_attention": sparse}},
        parallel_config=SimpleNamespace(use_ubatching=change.get("enable_dbo", False)),
        cache_config=SimpleNamespace(block_size=change.get("block_size", 16)),
    )
    with pytest.raises(ConfigurationError, match=message):
        gpu_config(config)


def test_the_backend_refuses_what_it_cannot_do(backend):
    assert backend.get_name() == "CUSTOM"
    assert backend.supports_kv_cache_dtype("auto")
    assert not backend.supports_kv_cache_dtype("fp8")
    assert not backend.supports_dcp()
    assert not backend.supports_batch_invariance()


def test_memory_is_left_for_the_index_and_a_step(rig, monkeypatch):
    from penstock.plugins.vllm.sparse_memory import left_for_cache

    settings = rig.builder.vllm_config
    worker = SimpleNamespace(vllm_config=settings, device=torch.device("cpu"))
    left = left_for_cache(worker, 2**30)
    layers = rig.impl.sparse
    index = layers.index_bytes / rig.cache.nbytes * left
    assert left + index < 2**30
    assert index < 0.11 * left
    plan = 2**30 - left - index
    assert 0 < plan < 2**30 / 2
    monkeypatch.setattr(settings.cache_config, "kv_cache_memory_bytes", 5)
    assert left_for_cache(worker, 2**30) == 2**30


@pytest.mark.parametrize(
    ("cuda", "capability", "stock"),
    [(True, 90, "FlashAttentionBackend"), (True, 75, "TritonAttentionBackend"), (False, 0, None)],
)
def test_the_platform_decides_which_stock_backend_is_extended(backend, monkeypatch, cuda, capability, stock):
    from vllm import platforms

    from penstock.plugins.vllm import sparse_flash  # noqa: F401

    given = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: cuda,
        has_device_capability=lambda least: capability >= least,
        device_type="cuda" if cuda else "xpu",
    )
    monkeypatch.setattr(platforms, "current_platform", given, raising=False)
    if stock is None:
        with pytest.raises(ConfigurationError, match="given a platform xpu, allowed: cpu, cuda"):
            platform_backend()
        return
    found = platform_backend()
    assert stock in {base.__name__ for base in found.__mro__}
    assert found.get_name() == "CUSTOM"
    for ours in (found, found.get_impl_cls(), found.get_builder_cls()):
        # vLLM goes on with the path of the class, and looks it up again.
        assert getattr(sys.modules[ours.__module__], ours.__qualname__) is ours
