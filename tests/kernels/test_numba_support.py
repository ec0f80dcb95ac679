"""What is kept of compiled kernels."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("numba")

from penstock.kernels import numba_support


@pytest.fixture
def kernel(tmp_path):
    """A function to compile, in a file of its own, as if each time by another process."""
    (tmp_path / "kernel.py").write_text("def plus_one(x):\n    return x + 1\n")

    def compiled():
        spec = importlib.util.spec_from_file_location("kernel", tmp_path / "kernel.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return numba_support.compiled(module.plus_one)

    return compiled


def loaded(kernel):
    """Whether the function came from the disk."""
    function = kernel()
    assert function(41) == 42
    return sum(function.stats.cache_hits.values()) == 1


def test_a_kernel_is_loaded_while_no_source_of_any_kernel_changes(kernel, monkeypatch):
    assert not loaded(kernel)
    assert loaded(kernel)
    monkeypatch.setattr(numba_support, "sources_digest", lambda: "of other sources")
    assert not loaded(kernel)
    assert loaded(kernel)


def test_the_digest_is_of_every_module(tmp_path):
    def digest():
        numba_support.sources_digest.cache_clear()
        return numba_support.sources_digest(tmp_path)

    (tmp_path / "deep").mkdir()
    seen = {digest()}
    for file, text in (("a.py", "1"), ("a.py", "2"), ("deep/b.py", "1"), ("deep/c.py", "1")):
        (tmp_path / file).write_text(text)
        seen.add(digest())
    assert len(seen) == 5
    numba_support.sources_digest.cache_clear()


def test_kernels_are_compiled_with_all_of_their_sources_in_the_key():
    from penstock.kernels.sparse import fused_choice

    key = fused_choice.choose_massive._cache._index_key((), fused_choice.choose_massive.targetctx.codegen())
    assert key[-1] == numba_support.sources_digest()
