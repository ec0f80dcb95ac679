"""Shared prefixes on vLLM's own CPU layer, metadata builder and kernels, without a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("numba")

from penstock.benchmarks.attention_rig import AttentionRig, Shape
from penstock.benchmarks.tiny_model import ensure_model
from penstock.patches.vllm.builds import is_cpu_build
from penstock.plugins.configuration import ConfigurationError

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="needs vLLM's CPU kernels")

SHAPE = Shape(heads=8, kv_heads=2, head_size=64, block_tokens=32, blocks=96, dtype=torch.float32)
SECTION = "shared_prefix_attention"


@pytest.fixture(scope="module", autouse=True)
def _enabled() -> None:
    from penstock.plugins.vllm.shared_prefix import enable

    enable()


@pytest.fixture(scope="module")
def rigs() -> tuple[AttentionRig, AttentionRig]:
    model = str(ensure_model())
    settings = {"log_steps": 2}
    return (
        AttentionRig(model, SHAPE, "CPU_ATTN"),
        AttentionRig(model, SHAPE, "CUSTOM", settings, section=SECTION),
    )


@pytest.fixture(params=["layer by layer", "layers within a block"])
def both(request, rigs) -> tuple[AttentionRig, AttentionRig]:
    """Stock's layer and ours, on caches of the same numbers, in either memory layout."""
    shape = (SHAPE.blocks, SHAPE.kv_heads, SHAPE.block_tokens, 2 * SHAPE.head_size)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for rig in rigs:
        rig.cache = numbers if request.param == "layer by layer" else torch.stack([numbers] * 2, 1)[:, 1]
    return rigs


def attended(rig, queries, tables, tokens, rows=None):
    return rig.attend(queries, rig.metadata(tables, tokens, rows or [1] * len(tables)))


def steps(rig):
    return rig.builder._worker.stats.snapshot().steps


PREFIX = list(range(10, 20))
SHARED = [[*PREFIX, 30, 31], [40, 41], [*PREFIX, 32], [*PREFIX[:4], 33]]
TOKENS = [11 * 32 + 7, 50, 10 * 32 + 1, 4 * 32 + 20]


def test_a_step_that_shares_a_prefix_is_stocks_step(both):
    stock, ours = both
    queries = torch.randn(4, *stock.query_shape)
    before = steps(ours)
    torch.testing.assert_close(
        attended(ours, queries, SHARED, TOKENS),
        attended(stock, queries, SHARED, TOKENS),
        rtol=1e-4,
        atol=1e-5,
    )
    assert steps(ours) == before + 1


@pytest.mark.parametrize(
    ("tables", "tokens", "rows"),
    [
        ([[1, 2], [3, 4]], [40, 60], [1, 1]),
        (SHARED, TOKENS, [1, 1, 1, 3]),
        (SHARED[:1], TOKENS[:1], [1]),
        ([[1], [1]], [5, 9], [1, 1]),
        ([[1, *range(2, 14)], [1, *range(20, 32)]], [400, 400], [1, 1]),
    ],
    ids=["nothing shared", "drafts or a prompt", "one request", "no full block", "too little saved"],
)
def test_other_steps_are_stocks_to_the_bit(both, tables, tokens, rows):
    stock, ours = both
    queries = torch.randn(sum(rows), *stock.query_shape)
    before = steps(ours)
    assert torch.equal(
        attended(ours, queries, tables, tokens, rows), attended(stock, queries, tables, tokens, rows)
    )
    assert steps(ours) == before


def test_blocks_of_others_are_never_read(both):
    _, ours = both
    held = {block for table in SHARED for block in table}
    ours.cache[torch.tensor([block for block in range(SHAPE.blocks) if block not in held])] = math.nan
    # What of a request's last block is not written yet is nobody's, too.
    ours.cache[31].flatten(1)[:, 64 * 32 :].unflatten(1, (32, 64))[:, 7:] = math.nan
    assert attended(ours, torch.randn(4, *ours.query_shape), SHARED, TOKENS).isfinite().all()


def test_requests_that_come_leave_and_take_blocks_of_others_are_stocks(both):
    """Preemption, abort and recycling are, to a step, other tables than before."""
    stock, ours = both
    generator = torch.Generator().manual_seed(3)
    tables, tokens = [list(table) for table in SHARED], list(TOKENS)
    changes = [
        lambda: tables.pop(1) and tokens.pop(1),
        lambda: (tables.append([*PREFIX[:7], 41, 40]), tokens.append(8 * 32 + 3)),
        lambda: tables.reverse() or tokens.reverse(),
        lambda: (tables.__setitem__(0, [30, 31, 10]), tokens.__setitem__(0, 70)),
        lambda: (tables.append([30, 31, 50, 51]), tokens.append(100)),
    ]
    for change in changes:
        change()
        queries = torch.randn(len(tables), *stock.query_shape, generator=generator)
        for _ in range(3):
            torch.testing.assert_close(
                attended(ours, queries, tables, tokens),
                attended(stock, queries, tables, tokens),
                rtol=1e-4,
                atol=1e-5,
            )
            tokens[-1] += 1


def test_the_log_says_what_was_saved(both, caplog):
    _, ours = both
    caplog.set_level("INFO", "vllm.penstock")
    for _ in range(4):
        attended(ours, torch.randn(4, *ours.query_shape), SHARED, TOKENS)
    lines = [record.message for record in caplog.records if "shared prefixes: saved" in record.message]
    assert len(lines) == 2
    assert "% of block reads in" in lines[-1]


def test_layers_that_kernels_do_not_serve_are_stocks_and_named(caplog):
    model = str(ensure_model())
    settings = {"per_layer_sliding_window": 256, "section": SECTION}
    windowed = AttentionRig(model, SHAPE, "CUSTOM", {}, **settings)
    named = "1 layers read them once for each request: model.layers.5.self_attn.attn: a sliding window of 256"
    assert named in caplog.text
    stock = AttentionRig(model, SHAPE, "CPU_ATTN", per_layer_sliding_window=256)
    windowed.cache = stock.cache.normal_()
    queries = torch.randn(4, *stock.query_shape)
    assert torch.equal(attended(windowed, queries, SHARED, TOKENS), attended(stock, queries, SHARED, TOKENS))


@pytest.mark.parametrize(
    ("given", "isa", "message"),
    [
        ({"dtype": torch.float16}, "vec", "given a KV cache of torch.float16, allowed: bfloat16, float32"),
        ({"dtype": torch.uint8}, "vec", "given a KV cache of torch.uint8"),
        ({"head_size": 72}, "vec", "given heads of 72, allowed: multiples of 16"),
        ({}, "tiled", "given a KV cache as the kernels 'tiled' of this CPU keep it"),
    ],
)
def test_what_compiled_kernels_do_not_read_is_refused(given, isa, message, monkeypatch):
    from penstock.plugins.vllm import prefix_worker

    lies_plain = prefix_worker.lies_plain
    monkeypatch.setattr(
        prefix_worker, "lies_plain", lambda isa, *rest: isa == "vec" and lies_plain(isa, *rest)
    )
    spec = {"dtype": torch.bfloat16, "head_size": 64, "block_size": 32, "num_kv_heads": 2, **given}
    with pytest.raises(ConfigurationError, match=message):
        prefix_worker.check(SimpleNamespace(**spec), isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("isa", "size"), [("vec", 64), ("vec16", 80)])
def test_kernels_of_this_processor_keep_blocks_plain(dtype, isa, size):
    from penstock.plugins.vllm.packed_keys import lies_plain

    assert lies_plain(isa, dtype, 32, size)


def test_an_order_of_channels_that_is_not_plain_is_noticed(monkeypatch):
    from penstock.plugins.vllm import packed_keys

    def write(rows, values, keys_, values_, slots, isa):
        keys_.copy_(rows.view_as(keys_))
        values_.copy_(values.view_as(values_))

    monkeypatch.setattr(packed_keys.ops, "cpu_attn_reshape_and_cache", write)
    packed_keys.lies_plain.cache_clear()
    assert not packed_keys.lies_plain("other", torch.float32, 32, 64)


def test_without_numba_it_is_refused(monkeypatch):
    from penstock.plugins.vllm import prefix_worker

    monkeypatch.setattr(prefix_worker, "HAS_NUMBA", False)
    spec = SimpleNamespace(dtype=torch.bfloat16, head_size=64, block_size=32)
    with pytest.raises(ConfigurationError, match="Numba, which is missing"):
        prefix_worker.check(spec, "vec")


def test_without_a_section_the_backend_is_that_of_sparse_attention():
    from penstock.plugins.vllm.prefix_backend import PrefixCPUImpl
    from penstock.plugins.vllm.sparse_attention import enable
    from penstock.plugins.vllm.sparse_backend import SparseCPUImpl

    enable()
    model = str(ensure_model())
    assert isinstance(AttentionRig(model, SHAPE, "CUSTOM", {}).impl, SparseCPUImpl)
    assert isinstance(AttentionRig(model, SHAPE, "CUSTOM", {}, section=SECTION).impl, PrefixCPUImpl)


def test_nothing_is_compiled_after_start_up():
    from penstock.kernels.shared_prefix import fused
    from penstock.kernels.sparse import running_softmax

    shape = Shape(heads=8, kv_heads=2, head_size=64, block_tokens=32, blocks=96)
    ours = AttentionRig(str(ensure_model()), shape, "CUSTOM", {}, section=SECTION)
    before = [len(kernel.signatures) for kernel in (fused.attend, running_softmax.merge)]
    attended(ours, torch.randn(4, *ours.query_shape).bfloat16(), SHARED, TOKENS)
    assert steps(ours) == 1
    assert [len(kernel.signatures) for kernel in (fused.attend, running_softmax.merge)] == before
