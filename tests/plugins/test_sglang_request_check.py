"""What a request says of itself on SGLang is judged where its sampling parameters are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.plugins.sglang import request_check
from penstock.plugins.sglang.settings import VARIABLE
from penstock.schedulers.asking import AskingError


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"scheduler": {"policy": "slo", "longest_client_id": 8}}')
    request_check._longest_client_id.cache_clear()
    yield
    request_check._longest_client_id.cache_clear()


def verified(custom_params: Any) -> Any:
    return request_check.verify(
        lambda parameters, vocab: vocab, SimpleNamespace(custom_params=custom_params), 7
    )


@pytest.mark.parametrize(
    "given", [None, {}, {"mine": [1]}, {"client_id": "eight by", "weight": 2}, {"ttft_slo_ms": 5}]
)
def test_what_is_allowed_is_what_sglang_makes_of_it(given):
    assert verified(given) == 7


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (5, "custom_params"),
        ([1], "custom_params"),
        ("text", "custom_params"),
        ({"client_id": "longer than eight"}, "client_id"),
        ({"client_id": 5}, "client_id"),
        ({"weight": True}, "weight"),
        ({"tpot_slo_ms": "40"}, "tpot_slo_ms"),
        ({"ttft_slo_ms": float("nan")}, "ttft_slo_ms"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(given, field):
    with pytest.raises(AskingError, match=f"^{field}: given"):
        verified(given)
