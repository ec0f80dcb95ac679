"""What a request says of itself: whatever it is, it is taken or refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.schedulers.asking import LARGEST_SLO_MS, NOTHING_ASKED, Asking, AskingError, asking, forgiving

LONGEST = 16
FIELDS = ("client_id", "weight", "ttft_slo_ms", "tpot_slo_ms")

texts = st.text("ab1-\u00e4\n\ud800", max_size=40)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**300),
    st.floats(),
    texts,
    st.lists(st.integers(), max_size=3),
    st.dictionaries(texts, st.integers(), max_size=2),
)


@given(st.dictionaries(st.sampled_from((*FIELDS, "other")), scalars))
def test_anything_is_taken_or_refused_by_name(extra):
    found, errors = forgiving(extra, longest_client_id=LONGEST)
    refused = {error.field for error in errors}
    assert refused <= extra.keys() & set(FIELDS)
    assert len(found.client.encode()) <= LONGEST
    assert 0.01 <= found.weight <= 100
    for target in (found.ttft_slo_ms, found.tpot_slo_ms):
        assert target is None or 0 < target <= LARGEST_SLO_MS
    for field, default in zip(FIELDS, ("", 1.0, None, None), strict=True):
        attribute = "client" if field == "client_id" else field
        if field in refused or extra.get(field) is None:
            assert getattr(found, attribute) == default
        else:
            assert getattr(found, attribute) == extra[field]
    if errors:
        with pytest.raises(AskingError) as caught:
            asking(extra, longest_client_id=LONGEST)
        assert len(str(caught.value)) < 400


def test_whole_numbers_and_bounds_are_taken():
    found = asking({"weight": 100, "ttft_slo_ms": LARGEST_SLO_MS}, longest_client_id=LONGEST)
    assert found == Asking(weight=100.0, ttft_slo_ms=LARGEST_SLO_MS)
    assert isinstance(found.weight, float)
    assert asking({}, longest_client_id=LONGEST) is NOTHING_ASKED


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, -1, True, "5", [5], 10**400])
def test_no_target_is_none_of_these(value):
    with pytest.raises(AskingError, match="ttft_slo_ms: given"):
        asking({"ttft_slo_ms": value}, longest_client_id=LONGEST)
