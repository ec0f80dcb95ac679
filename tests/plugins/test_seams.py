"""Seams: which upstream changes break a use of a name, in source and in live objects alike."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.plugins.seams import Seam, State, Use, check
from penstock.plugins.signatures import parse_signature, render
from penstock.plugins.trees import LiveTree, SourceTree

UPSTREAM = '''
import functools

FIELD = 1

def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

class Pool:
    declared: int
    def __init__(self, size):
        self.free, self.size = [], size
    def take(self, count, *, hint=None):
        """Take blocks."""
        return self.free[:count]  # first ones
    @classmethod
    def layouts(cls):
        return (1,)
    @staticmethod
    def parse(text): ...
    @decorated
    def wrapped(self, a, b=1): ...
    @property
    def used(self): ...
    if True:
        def conditional(self): ...
'''


@pytest.fixture(params=["source", "live"])
def upstream(request, tmp_path, monkeypatch):
    """Writes the upstream package, and gives a tree that reads it or one that has it loaded."""

    def make(text: str = UPSTREAM):
        (tmp_path / "updep").mkdir(exist_ok=True)
        (tmp_path / "updep" / "__init__.py").touch()
        (tmp_path / "updep" / "pool.py").write_text(textwrap.dedent(text))
        source = SourceTree(tmp_path)
        if request.param == "source":
            return source
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("updep", "updep.pool"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module("updep.pool")
        return LiveTree(source)

    yield make
    for name in ("updep", "updep.pool"):
        sys.modules.pop(name, None)


def state(tree, path, use, signature=None, **options):
    return check(Seam(f"updep.pool:{path}", use, signature, **options), tree).state


@pytest.mark.parametrize(
    ("path", "signature"),
    [
        ("Pool.take", "(self, count, *, hint=...)"),
        ("Pool.layouts", "(cls)"),
        ("Pool.parse", "(text)"),
        ("Pool.wrapped", "(self, a, b=...)"),
        ("Pool.conditional", "(self)"),
        ("decorated", "(function)"),
    ],
)
def test_exact_signature_holds_for_every_use(upstream, path, signature):
    tree = upstream()
    for use in (Use.CALL, Use.OVERRIDE, Use.PATCH):
        assert state(tree, path, use, signature) is State.HOLDS


@pytest.mark.parametrize("path", ["FIELD", "Pool", "Pool.declared", "Pool.free", "Pool.size", "Pool.used"])
def test_values_fields_and_attributes_can_be_read(upstream, path):
    assert state(upstream(), path, Use.READ) is State.HOLDS


@pytest.mark.parametrize("path", ["GONE", "Gone.take", "Pool.gone", "Pool.taken", "Pool.free.x"])
def test_missing_name_moved_unless_optional(upstream, path):
    tree = upstream()
    assert state(tree, path, Use.READ) is State.MOVED
    assert state(tree, path, Use.READ, optional=True) is State.HOLDS


@pytest.mark.parametrize(
    ("expected", "call", "override"),
    [
        ("(self, count)", State.HOLDS, State.MOVED),  # upstream has a new optional parameter
        ("(self, *, hint=...)", State.MOVED, State.MOVED),  # upstream has a new required one
        ("(self, count, hint=...)", State.MOVED, State.MOVED),  # the kind changed
        ("(self, hint=..., count=...)", State.MOVED, State.MOVED),  # the order changed
        ("(self, number, *, hint=...)", State.MOVED, State.MOVED),  # the name changed
        ("(self, count=..., *, hint=...)", State.MOVED, State.MOVED),  # a default went away
        ("(self, count, *args, **kwargs)", State.MOVED, State.HOLDS),  # we pass the rest on
        ("(self, number, *args, **kwargs)", State.MOVED, State.MOVED),
    ],
)
def test_changed_signature(upstream, expected, call, override):
    tree = upstream()
    assert state(tree, "Pool.take", Use.CALL, expected) is call
    assert state(tree, "Pool.take", Use.OVERRIDE, expected) is override


def test_reason_shows_expected_and_found(upstream):
    finding = check(Seam("updep.pool:Pool.take", Use.OVERRIDE, "(self, n)"), upstream())
    assert "expected (self, n), found (self, count, *, hint=...)" in str(finding)


def test_function_that_became_a_value_moved(upstream):
    assert state(upstream(), "Pool.used", Use.CALL, "(self)") is State.MOVED


def fingerprint(tree, path):
    return tree.lookup("updep.pool", tuple(path.split("."))).digest()


def test_fingerprint_follows_what_the_code_does_not_how_it_is_written(upstream):
    before = fingerprint(upstream(), "Pool.take")
    same = UPSTREAM.replace("count, *", "count: int, *").replace("  # first ones", "").replace("Take", "Get")
    assert fingerprint(upstream(same), "Pool.take") == before
    other = UPSTREAM.replace("[:count]", "[-count:]")
    assert fingerprint(upstream(other), "Pool.take") != before


def test_changed_source_stops_a_replacement_and_is_reported_for_a_wrapper(upstream):
    tree = upstream()
    known = fingerprint(tree, "Pool.take")
    signature = "(self, count, *, hint=...)"
    assert state(tree, "Pool.take", Use.PATCH, signature, fingerprints=(known, "0" * 12)) is State.HOLDS
    assert state(tree, "Pool.take", Use.PATCH, signature, fingerprints=("0" * 12,)) is State.MOVED
    drifted = state(tree, "Pool.take", Use.PATCH, signature, fingerprints=("0" * 12,), wraps=True)
    assert drifted is State.DRIFTED


def test_source_and_live_objects_have_one_fingerprint(upstream, tmp_path):
    tree = upstream()
    assert fingerprint(tree, "Pool.layouts") == fingerprint(SourceTree(tmp_path), "Pool.layouts")


def test_replacement_by_someone_else_is_seen(tmp_path, monkeypatch):
    (tmp_path / "updep2.py").write_text("class Pool:\n    def take(self, count): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("updep2")
    monkeypatch.setattr(module.Pool, "take", lambda self, count, extra: None)
    seam = Seam("updep2:Pool.take", Use.OVERRIDE, "(self, count)")
    assert check(seam, LiveTree(SourceTree(tmp_path))).state is State.MOVED
    assert check(seam, SourceTree(tmp_path)).state is State.HOLDS


NAMES = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)


@given(NAMES, st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans())
def test_signature_survives_rendering(names, first_optional, first_keyword, star, stars):
    positional, keyword = names[:first_keyword], names[first_keyword:]
    parts = [name if i < first_optional else f"{name}=..." for i, name in enumerate(positional)]
    if star or keyword:
        parts.append("*rest" if star else "*")
    parts += [f"{name}=..." if i % 2 else name for i, name in enumerate(keyword)]
    if stars:
        parts.append("**more")
    text = f"({', '.join(parts)})"
    assert render(parse_signature(text)) == text
