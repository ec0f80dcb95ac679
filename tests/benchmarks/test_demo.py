from __future__ import annotations

import json

import msgspec
import pytest
from click.testing import CliRunner

from penstock.benchmarks import demo as module
from penstock.benchmarks.asks import Answer, churn_asks, sample_asks
from penstock.benchmarks.demo import Outcome, demo, judge, summary
from penstock.benchmarks.processes import ServerError
from penstock.benchmarks.scrape import Transfers


def answer(*token_ids: int, first_token_s: float | None = 0.01) -> Answer:
    return Answer(token_ids=token_ids, text="", prompt_tokens=9, total_s=0.1, first_token_s=first_token_s)


ANSWERS = (answer(1, 2, 3), answer(4, 5, 6, first_token_s=None))
PLAIN = Outcome(setup="plain", answers=ANSWERS)
MOVED = Transfers(count=2, descriptors=4.0, bytes=4096.0, transfer_s=0.004, post_s=0.001)
GOOD = Outcome(setup="flowkv", answers=ANSWERS, moved=MOVED)


def holds(outcome: Outcome) -> bool:
    return all(claim.holds for claim in judge([PLAIN, outcome]))


def test_equal_tokens_and_moved_prompts_hold():
    assert holds(GOOD)


@pytest.mark.parametrize(
    "answers",
    [
        (answer(1, 2, 3), answer(4, 5, 7)),
        (answer(1, 2, 3), answer(4, 5)),
        (answer(1, 2, 3), answer()),
    ],
)
def test_one_token_that_differs_breaks_the_demo(answers):
    assert not holds(msgspec.structs.replace(GOOD, answers=answers))


def test_two_empty_answers_are_not_called_equal():
    empty = Outcome(setup="plain", answers=(answer(),))
    assert empty.equal(empty) == 0


@pytest.mark.parametrize("moved", [None, Transfers(), msgspec.structs.replace(MOVED, count=1)])
def test_right_answers_without_a_transfer_are_no_success(moved):
    assert not holds(msgspec.structs.replace(GOOD, moved=moved))


def test_the_summary_gives_means_per_transfer():
    plain, good = summary([PLAIN, GOOD])
    assert plain["tokens equal"] == good["tokens equal"] == 2
    assert good["descriptors each"] == 2.0
    assert good["KiB each"] == 2.0
    assert good["transfer ms"] == pytest.approx(2.0)
    assert plain["descriptors each"] is None
    assert good["TTFT median ms"] == pytest.approx(10.0)


def test_prompts_share_no_beginning():
    prompts = [ask.prompt for ask in (*sample_asks(), *churn_asks())]
    assert len({prompt[:12] for prompt in prompts}) == len(prompts)
    assert {(ask.chat, ask.stream) for ask in sample_asks()} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert churn_asks(seed=1) == churn_asks(seed=1) != churn_asks(seed=2)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ensure_model", lambda: "m")
    monkeypatch.setattr(module, "console_script", lambda name: name)
    monkeypatch.setattr(module.Stage, "plain", lambda self, asks: PLAIN)

    def run(apart, *arguments: str):
        monkeypatch.setattr(module.Stage, "apart", apart)
        return CliRunner().invoke(demo, ["--connector", "flowkv", "--logs", str(tmp_path), *arguments])

    return run


def test_success_is_exit_code_0_and_json(run, tmp_path):
    result = run(lambda self, connector, asks: GOOD, "--json", str(tmp_path / "demo.json"))
    assert result.exit_code == 0
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["bench"] == "demo"
    assert [row["setup"] for row in written["rows"]] == ["plain", "flowkv"]


def test_a_difference_is_exit_code_1(run):
    result = run(lambda self, connector, asks: msgspec.structs.replace(GOOD, answers=(answer(1), answer(2))))
    assert result.exit_code == 1
    assert "differs" in result.output


def test_a_server_that_fails_is_exit_code_1_and_says_why(run):
    def fail(self, connector, asks):
        raise ServerError("flowkv-decode ended with code 1")

    result = run(fail)
    assert result.exit_code == 1
    assert "flowkv-decode ended with code 1" in result.output


def test_ctrl_c_is_exit_code_130(run):
    def interrupt(self, connector, asks):
        raise KeyboardInterrupt

    assert run(interrupt).exit_code == 130


def test_without_an_engine_the_demo_says_what_is_missing(run, monkeypatch):
    def missing(name):
        raise ServerError(f"the command {name!r} is not installed")

    monkeypatch.setattr(module, "console_script", missing)
    result = run(lambda self, connector, asks: GOOD)
    assert result.exit_code == 1
    assert "the command 'vllm' is not installed" in result.output
