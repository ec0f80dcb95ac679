"""``--penstock-config``, ``PENSTOCK_CONFIG``, ``--schedule-policy``: how they join, and what is refused."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

import pytest

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang import flags
from penstock.plugins.sglang.settings import VARIABLE, inherited, parse, scheduler_config

STOCK = ["fcfs", "lpm"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def applied(monkeypatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(flags, "_apply", lambda: calls.append("applied"))
    return calls


def parsed(*words: str) -> Namespace:
    """The arguments as SGLang's parser, extended, gives them."""

    def stock(parser: ArgumentParser) -> None:
        parser.add_argument("--schedule-policy", choices=STOCK, default="fcfs", help="Policy.")
        parser.add_argument("--enable-priority-scheduling", action="store_true")
        parser.add_argument("--lora-drain-wait-threshold", type=float, default=0.0)
        parser.add_argument("--dllm-algorithm")
        parser.add_argument("--disaggregation-mode", default="null")
        parser.add_argument("--tp-size", type=int, default=1)
        parser.add_argument("--pp-size", type=int, default=1)

    parser = ArgumentParser()
    flags.add_cli_args(stock, parser)
    return parser.parse_args(words)


def config(**keys: object) -> str:
    return json.dumps({"scheduler": keys})


def test_nothing_asked_for_changes_nothing(applied):
    for words in ((), ("--schedule-policy", "lpm")):
        args = parsed(*words)
        before = dict(vars(args))
        flags.join(args)
        assert vars(args) == before
    assert applied == []
    assert inherited() == {}


def test_the_flag_alone_is_enough_and_reaches_children(applied):
    flags.join(parsed("--schedule-policy", "vtc"))
    assert applied == ["applied"]
    found = scheduler_config(inherited())
    assert found is not None
    assert found.policy == "vtc"


def test_the_section_alone_chooses_the_policy(applied):
    args = parsed("--penstock-config", config(quantum_tokens=7))
    flags.join(args)
    assert args.schedule_policy == "dlpm"
    found = scheduler_config(inherited())
    assert found is not None
    assert (found.policy, found.quantum_tokens) == ("dlpm", 7)


def test_a_file_says_the_same_as_its_text(applied, tmp_path):
    file = tmp_path / "penstock.json"
    file.write_text(config(policy="vtc"))
    assert parse("here", str(file)) == parse("here", file.read_text())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--penstock-config", "nowhere.json"], "--penstock-config: given 'nowhere.json'"),
        (["--penstock-config", "{"], "--penstock-config: allowed is a JSON object"),
        (["--penstock-config", '{"flowkv": {}}'], "given section 'flowkv', allowed on SGLang: scheduler"),
        (["--penstock-config", '{"scheduler": 1}'], "penstock.scheduler: given 1"),
        (["--penstock-config", config(polciy="vtc")], "did you mean policy?"),
        (["--penstock-config", config(policy="lpm")], "scheduler.policy: given 'lpm', allowed on SGLang"),
        (
            ["--penstock-config", config(trust_headers=True)],
            "scheduler.trust_headers: does nothing on SGLang",
        ),
        (["--schedule-policy", "dlpm", "--penstock-config", config(policy="vtc")], "give it once"),
        (["--schedule-policy", "lpm", "--penstock-config", config()], "contradicts --schedule-policy lpm"),
        (["--schedule-policy", "dlpm", "--enable-priority-scheduling"], "--enable-priority-scheduling"),
        (["--schedule-policy", "dlpm", "--lora-drain-wait-threshold", "1"], "--lora-drain-wait-threshold"),
        (["--schedule-policy", "dlpm", "--dllm-algorithm", "any"], "--dllm-algorithm"),
        (["--schedule-policy", "dlpm", "--disaggregation-mode", "decode"], "--disaggregation-mode"),
        (["--schedule-policy", "dlpm", "--tp-size", "2"], "--tp-size: given 2"),
        (["--schedule-policy", "dlpm", "--pp-size", "2"], "--pp-size: given 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(applied, words, reason):
    with pytest.raises(ConfigurationError) as refused:
        flags.join(parsed(*words))
    assert reason in str(refused.value)
    assert applied == []


def test_flag_and_variable_must_agree(applied, monkeypatch):
    monkeypatch.setenv(VARIABLE, config(quantum_tokens=7))
    flags.join(parsed("--penstock-config", config(quantum_tokens=7)))
    monkeypatch.setenv(VARIABLE, config(quantum_tokens=8))
    with pytest.raises(ConfigurationError, match="differ"):
        flags.join(parsed("--penstock-config", config(quantum_tokens=7)))


def test_a_refusal_is_one_line_and_an_exit(applied, capsys):
    with pytest.raises(SystemExit) as ended:
        flags.from_cli_args(
            lambda cls, args: pytest.fail("went on"), object, parsed("--penstock-config", "{")
        )
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
