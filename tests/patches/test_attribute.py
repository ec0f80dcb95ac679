"""A patch of an attribute: what it replaces, and that nothing is left when it is removed."""

from __future__ import annotations

import sys
import types

import pytest

from penstock.patches.attribute import AttributePatch, original_of


@pytest.fixture
def upstream(monkeypatch):
    class Base:
        def method(self):
            return "stock"

        @classmethod
        def of_class(cls):
            return cls.__name__

        @staticmethod
        def of_none(value):
            return value

    module = types.ModuleType("uppatch")
    module.Base = Base
    module.function = lambda value: value
    monkeypatch.setitem(sys.modules, "uppatch", module)
    return module


def test_each_kind_of_function_calls_its_original(upstream):
    patches = [
        AttributePatch("uppatch:function", "(value)", lambda f: lambda value: -f(value)),
        AttributePatch("uppatch:Base.method", "(self)", lambda f: lambda self: f(self) + "!"),
        AttributePatch(
            "uppatch:Base.of_class", "(cls)", lambda f: classmethod(lambda cls: f.__func__(cls) + "!")
        ),
        AttributePatch(
            "uppatch:Base.of_none", "(value)", lambda f: staticmethod(lambda value: -f.__func__(value))
        ),
    ]
    before = dict(vars(upstream)), dict(vars(upstream.Base))
    for patch in patches:
        patch.install()
        patch.install()
        assert patch.installed
    child = type("Child", (upstream.Base,), {})
    assert (upstream.function(1), child().method(), child.of_class(), child.of_none(2)) == (
        -1,
        "stock!",
        "Child!",
        -2,
    )
    for patch in patches:
        patch.remove()
        patch.remove()
        assert not patch.installed
    assert (dict(vars(upstream)), dict(vars(upstream.Base))) == before


def test_target_that_does_not_exist_is_an_error_and_is_not_added(upstream):
    patch = AttributePatch("uppatch:Base.typo", "(self)", lambda f: lambda self: None)
    with pytest.raises(AttributeError):
        patch.install()
    assert not hasattr(upstream.Base, "typo")


def test_unpatched_attribute_has_no_original(upstream):
    assert original_of(upstream.Base.method) is None
