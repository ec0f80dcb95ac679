"""Actions that wait for an import."""

from __future__ import annotations

import importlib
import sys

import pytest

from penstock.plugins.importing import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "uplate.py").write_text("order = ['module']\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = list(sys.meta_path)
    yield lambda: importlib.import_module("uplate")
    sys.modules.pop("uplate", None)
    sys.meta_path[:] = before


def test_runs_after_the_module_and_once(module):
    calls = []
    for name in ("first", "second"):
        after_import("uplate", lambda name=name: calls.append((name, list(sys.modules["uplate"].order))))
    assert calls == []
    module()
    importlib.reload(sys.modules["uplate"])
    assert sorted(calls) == [("first", ["module"]), ("second", ["module"])]


def test_loaded_module_runs_it_at_once(module):
    module()
    calls = []
    after_import("uplate", lambda: calls.append(1))
    assert calls == [1]


def test_module_looks_as_if_nothing_had_waited(module):
    plain = module()
    finders = list(sys.meta_path)
    loader = type(plain.__loader__)
    del sys.modules["uplate"]
    after_import("uplate", lambda: None)
    watched = module()
    assert type(watched.__loader__) is type(watched.__spec__.loader) is loader
    assert sys.meta_path == finders


def test_missing_module_is_missing_as_before():
    after_import("no_such_module_at_all", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_at_all")
