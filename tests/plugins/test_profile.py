"""``penstock profile`` without an engine: the run ends in time, a file and a table come of it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from penstock.plugins import cli, profile
from penstock.schedulers.slo.profile_fit import MeasuredStep
from penstock.schedulers.slo.profile_plan import Room
from penstock.schedulers.slo.profiles import Profile, find_profile
from penstock.schedulers.slo.step_time import StepFeatures, StepTimeModel

TRUTH = Profile(base_s=2e-3, token_s=4e-5, request_s=3e-5, context_s=1e-7)


class Engine:
    """Runs a batch in no time; says that each step took what ``TRUTH`` says."""

    description = "a made-up engine"
    room = Room(16, 512, 1024, 20_000)

    def __init__(self, arguments, seed, processor_time=False):
        self.arguments, self.processor_time = tuple(arguments), processor_time

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, number, batch, until_s):
        features = [StepFeatures(batch.decodes, batch.decodes, batch.decodes * batch.context)] * 4
        features += [
            StepFeatures(batch.decodes + chunk, batch.decodes + 1, batch.decodes * batch.context)
            for chunk in batch.chunks
        ] * 3
        model = StepTimeModel(TRUTH)
        return [
            MeasuredStep(one, model.seconds(one), number, batch.decodes) for one in features if one.tokens
        ]


@pytest.fixture
def made_up(monkeypatch):
    engines = []

    def start(*given, **more):
        engines.append(Engine(*given, **more))
        return engines[-1]

    module = SimpleNamespace(ProfiledEngine=start)
    monkeypatch.setitem(sys.modules, "made_up_engine", module)
    monkeypatch.setattr(profile, "ENGINE", "made_up_engine")
    return engines


def run(*arguments):
    return CliRunner().invoke(cli.main, ["profile", *map(str, arguments)])


def test_a_file_comes_of_it_that_predicts_what_was_measured(made_up, tmp_path):
    output = tmp_path / "mine.json"
    result = run("--model", "m", "--minutes", 0.01, "--output", output, "--", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert made_up[0].arguments == ("--model", "m", "--dtype", "float32")
    found = find_profile(str(output))
    features = StepFeatures(300, 9, 4000)
    assert StepTimeModel(found).seconds(features) == pytest.approx(
        StepTimeModel(TRUTH).seconds(features), rel=0.01
    )
    assert "a made-up engine" in found.source
    for said in ("error P50", "error P90", "decodes and prompts", str(output), "--additional-config"):
        assert said in result.output


def test_time_bounds_the_run_and_what_it_did_not_reach_is_counted():
    class Slow(Engine):
        def run(self, number, batch, until_s):
            clock.now += 10.0
            return super().run(number, batch, until_s)

    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profile, "time", clock)
        told: list[str] = []
        found = profile.measure(Slow((), 0), 45.0, told.append)
    assert clock.now == 50.0
    assert len(told) == 5
    assert len({step.batch for step in found.steps}) == 5
    plan = len(profile.batches(Engine.room))
    # The fifth was cut short.
    assert found.missed == plan - 4


def test_too_short_a_time_is_said_and_leaves_no_file(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: [])
    result = run("--model", "m", "--minutes", 0.01, "--output", tmp_path / "mine.json")
    assert result.exit_code == 1
    assert "0 steps of 0 sizes were measured, needed: 24" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said_before_an_engine_starts(made_up, tmp_path):
    result = run("--model", "m", "--output", tmp_path / "none" / "mine.json")
    assert result.exit_code == 2
    assert "is no folder" in result.output
    assert made_up == []


def test_an_engine_that_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "ENGINE", "penstock_no_such_package")
    result = run("--model", "m", "--output", tmp_path / "mine.json")
    assert result.exit_code == 1
    assert "needs the package penstock_no_such_package" in result.output
