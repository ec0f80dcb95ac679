"""A journal of results: what it finds again, and what it does not."""

from __future__ import annotations

import msgspec
import pytest

from penstock.benchmarks import journal
from penstock.benchmarks.journal import Journal, code_digest
from penstock.benchmarks.slo_run import Curve, Score, Setting, Task
from penstock.simulation.step_time import load_step_time

PACKAGES = ("schedulers",)
SCORE = Score(
    requests=2,
    tokens=20,
    attained={"deadline": 1},
    attained_tokens={"deadline": 10},
    tiers={"chat": (2, 1)},
    seconds=1.5,
)
CURVE: Curve = {0.1: [SCORE], 4.5: [SCORE, SCORE]}


def task(**changes: object) -> Task:
    given = Task(
        app="chat",
        setting=Setting(name="stock", kind="stock", engine={"mixed_chunk": True}),
        seeds=(1, 2),
        requests=20,
        step_time=load_step_time("opt-6.7b-a100"),
    )
    return msgspec.structs.replace(given, **changes)


def test_a_result_is_found_for_an_equal_task_alone(tmp_path):
    file = tmp_path / "journal"
    Journal(file, PACKAGES, "slo", "1.0").keep(task(), CURVE)
    again = Journal(file, PACKAGES, "slo", "1.0")
    assert again.find(task(), Curve) == CURVE
    assert again.find(task(seeds=(1, 3)), Curve) is None
    assert again.find(task(setting=Setting(name="stock", kind="stock")), Curve) is None
    assert Journal(file, PACKAGES, "slo", "1.1").find(task(), Curve) is None
    assert Journal(file, PACKAGES, "sglang-slo", "1.0").find(task(), Curve) is None


def test_a_result_of_other_code_does_not_count(tmp_path, monkeypatch):
    file = tmp_path / "journal"
    Journal(file, PACKAGES).keep(task(), CURVE)
    monkeypatch.setattr(journal, "code_digest", lambda packages: "other")
    assert Journal(file, PACKAGES).find(task(), Curve) is None
    assert code_digest(("schedulers",)) != code_digest(("simulation",))


def test_a_line_that_was_being_written_is_dropped_and_the_next_one_is_whole(tmp_path):
    file = tmp_path / "journal"
    Journal(file, PACKAGES).keep(task(), CURVE)
    with file.open("ab") as stream:
        stream.write(b'{"key": "cut o')
    Journal(file, PACKAGES).keep(task(requests=30), {})
    found = Journal(file, PACKAGES)
    assert found.find(task(), Curve) == CURVE
    assert found.find(task(requests=30), Curve) == {}


@pytest.mark.parametrize(("text", "place"), [("one\ntwo", "line 1"), ("one", "last line")])
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path, text, place):
    file = tmp_path / "notes"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"notes, {place}"):
        Journal(file, PACKAGES)
    assert file.read_text() == text


def test_without_a_file_nothing_is_kept():
    kept = Journal(None, PACKAGES)
    kept.keep(task(), CURVE)
    assert kept.find(task(), Curve) is None
