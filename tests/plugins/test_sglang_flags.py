"""``--penstock-config``, ``PENSTOCK_CONFIG``, ``--schedule-policy``: how they join, and what is refused."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace

import pytest

from penstock.plugins.askers import digest_of
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.sglang import flags
from penstock.plugins.sglang.flowkv_settings import POST_CAPTURE, RELEASE_TIMEOUT, flowkv_config
from penstock.plugins.sglang.settings import VARIABLE, inherited, parse, scheduler_config
from penstock.plugins.sglang.sparse_settings import settle, sparse_config
from penstock.plugins.sglang.suffix_settings import BRANCHES, branches_of, suffix_config

STOCK = ["fcfs", "lpm"]
BACKENDS = ["torch_native", "triton", "flashinfer"]
SWITCHES = (
    "enable-two-batch-overlap",
    "enable-pdmux",
    "prefill-only-disable-kv-cache",
    "enable-hisparse",
    "enable-unified-memory",
    "enable-memory-saver",
    "disaggregation-enable-kv-checksum",
    "enable-pd-role-switch",
    "disable-radix-cache",
    "disaggregation-decode-enable-radix-cache",
    "enable-dp-attention",
    "enable-mixed-chunk",
    "speculative-adaptive",
)
SUFFIX = ("--speculative-algorithm", "suffix")
FLOWKV = (
    "--disaggregation-transfer-backend",
    "flowkv",
    "--disaggregation-mode",
    "prefill",
    "--page-size",
    "16",
)
TACTIC = ("--attention-backend", "tactic")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    for name in (RELEASE_TIMEOUT, POST_CAPTURE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def applied(monkeypatch) -> list[str]:
    calls: list[str] = []

    def apply(config, *, ranks: bool, transfers: bool, drafts: bool, sparse: bool) -> None:
        asked = {
            "applied": config is not None,
            "ranks": ranks,
            "flowkv": transfers,
            "suffix": drafts,
            "sparse": sparse,
        }
        calls.extend(name for name, wanted in asked.items() if wanted)

    monkeypatch.setattr(flags, "_apply", apply)
    return calls


def parsed(*words: str) -> Namespace:
    """The arguments as SGLang's parser, extended, gives them."""

    def stock(parser: ArgumentParser) -> None:
        parser.add_argument("--schedule-policy", choices=STOCK, default="fcfs", help="Policy.")
        parser.add_argument("--enable-priority-scheduling", action="store_true")
        parser.add_argument("--lora-drain-wait-threshold", type=float, default=0.0)
        parser.add_argument("--dllm-algorithm")
        parser.add_argument("--disaggregation-mode", default="null")
        parser.add_argument(
            "--disaggregation-transfer-backend", choices=["mooncake"], default="mooncake", help=""
        )
        parser.add_argument("--disaggregation-decode-host-receive-threshold", type=float, default=1.0)
        for name in ("attention", "prefill-attention", "decode-attention"):
            parser.add_argument(f"--{name}-backend", choices=BACKENDS, help="")
        parser.add_argument("--device")
        parser.add_argument("--kv-cache-dtype", default="auto")
        parser.add_argument("--page-size", type=int)
        for name in ("attn-cp", "dcp"):
            parser.add_argument(f"--{name}-size", type=int, default=1)
        parser.add_argument("--speculative-algorithm", help="Algorithm.")
        for name in ("draft-model-path", "ngram-external-corpus-path"):
            parser.add_argument(f"--speculative-{name}")
        for name in ("num-steps", "num-draft-tokens", "eagle-topk"):
            parser.add_argument(f"--speculative-{name}", type=int)
        for name in SWITCHES:
            parser.add_argument(f"--{name}", action="store_true")
        parser.add_argument("--chunked-prefill-size", type=int)
        parser.add_argument("--tokenizer-worker-num", type=int, default=1)
        for name in ("tp-size", "pp-size", "nnodes", "scheduler-recv-interval"):
            parser.add_argument(f"--{name}", type=int, default=1)

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


@pytest.mark.parametrize(
    "words",
    [
        ("--schedule-policy", "dlpm", "--tp-size", "2", "--nnodes", "2", "--scheduler-recv-interval", "4"),
        ("--schedule-policy", "vtc", "--pp-size", "2"),
        ("--schedule-policy", "slo", "--tp-size", "4"),
    ],
)
def test_several_ranks_share_a_clock(applied, words):
    flags.join(parsed(*words))
    assert applied == ["applied", "ranks"]


def test_ranks_alone_ask_for_nothing(applied):
    flags.join(parsed("--tp-size", "2"))
    assert applied == []


def test_the_section_alone_chooses_the_policy(applied):
    args = parsed("--penstock-config", config(quantum_tokens=7))
    flags.join(args)
    assert args.schedule_policy == "dlpm"
    found = scheduler_config(inherited())
    assert found is not None
    assert (found.policy, found.quantum_tokens) == ("dlpm", 7)


@pytest.mark.parametrize(
    ("policy", "role"), [("dlpm", "prefill"), ("dlpm", "decode"), ("vtc", "decode"), ("slo", "prefill")]
)
def test_a_policy_beside_a_role_is_both(applied, policy, role):
    args = parsed(*FLOWKV, "--disaggregation-mode", role, "--schedule-policy", policy)
    flags.join(args)
    assert (args.schedule_policy, args.disaggregation_mode) == (policy, role)
    assert set(inherited()) == {"scheduler", "flowkv"}


def test_a_file_says_the_same_as_its_text(applied, tmp_path):
    file = tmp_path / "penstock.json"
    file.write_text(config(policy="vtc"))
    assert parse("here", str(file)) == parse("here", file.read_text())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--penstock-config", "nowhere.json"], "--penstock-config: given 'nowhere.json'"),
        (["--penstock-config", "{"], "--penstock-config: allowed is a JSON object"),
        (["--penstock-config", '{"sparse": {}}'], "given section 'sparse', allowed on SGLang: scheduler"),
        (["--penstock-config", '{"suffix": {}}'], "without --speculative-algorithm SUFFIX"),
        (["--penstock-config", '{"flowkv": {}}'], "without --disaggregation-transfer-backend flowkv"),
        (["--penstock-config", '{"scheduler": 1}'], "penstock.scheduler: given 1"),
        (["--penstock-config", config(polciy="vtc")], "did you mean policy?"),
        (["--penstock-config", config(policy="lpm")], "scheduler.policy: given 'lpm', allowed on SGLang"),
        (
            ["--penstock-config", config(speculation={})],
            "scheduler.speculation: does nothing on SGLang",
        ),
        (["--schedule-policy", "dlpm", "--penstock-config", config(policy="vtc")], "give it once"),
        (["--schedule-policy", "lpm", "--penstock-config", config()], "contradicts --schedule-policy lpm"),
        (["--schedule-policy", "dlpm", "--enable-priority-scheduling"], "--enable-priority-scheduling"),
        (["--schedule-policy", "dlpm", "--lora-drain-wait-threshold", "1"], "--lora-drain-wait-threshold"),
        (["--schedule-policy", "dlpm", "--dllm-algorithm", "any"], "--dllm-algorithm"),
        (["--schedule-policy", "slo", "--disaggregation-mode", "decode"], "nothing to plan"),
        (
            ["--schedule-policy", "slo", "--disaggregation-mode", "prefill", "--enable-pd-role-switch"],
            "nothing to plan",
        ),
        (["--schedule-policy", "slo", "--chunked-prefill-size", "-1"], "--chunked-prefill-size: given -1"),
        (["--schedule-policy", "slo", "--speculative-algorithm", "NGRAM"], "--speculative-algorithm"),
        (
            ["--penstock-config", config(trust_headers=True), "--tokenizer-worker-num", "2"],
            "--tokenizer-worker-num: given 2",
        ),
        (["--penstock-config", config(policy="slo", slo={"pace": "slow"})], "scheduler.slo.pace"),
        (["--schedule-policy", "slo", "--pp-size", "2"], "--pp-size: given 2"),
        (
            ["--schedule-policy", "vtc", "--pp-size", "2", "--disaggregation-mode", "decode"],
            "--pp-size: given 2",
        ),
        (["--schedule-policy", "dlpm", "--pp-size", "2", "--enable-pd-role-switch"], "--pp-size: given 2"),
        (["--schedule-policy", "slo", "--tp-size", "2", "--nnodes", "2"], "--nnodes: given 2"),
        (
            ["--schedule-policy", "slo", "--tp-size", "2", "--scheduler-recv-interval", "4"],
            "--scheduler-recv-interval: given 4",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(applied, words, reason):
    with pytest.raises(ConfigurationError) as refused:
        flags.join(parsed(*words))
    assert reason in str(refused.value)
    assert applied == []


def test_flowkv_is_one_more_transfer_backend_and_its_section_reaches_children(applied):
    flags.join(parsed(*FLOWKV, "--penstock-config", '{"flowkv": {"transfer_timeout_s": 7}}'))
    assert applied == ["flowkv"]
    found = flowkv_config(inherited(), host="10.0.0.7")
    assert (found.transfer_timeout_s, found.host) == (7, "10.0.0.7")
    assert float(os.environ[RELEASE_TIMEOUT]) > 7
    assert (
        parsed("--disaggregation-transfer-backend", "mooncake").disaggregation_transfer_backend == "mooncake"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--disaggregation-mode", "null"], "given --disaggregation-mode null, allowed: prefill, decode"),
        (["--page-size", "1"], "--page-size: given 1"),
        (["--pp-size", "2"], "--pp-size: given 2"),
        (["--dcp-size", "2"], "--dcp-size: given 2"),
        (["--speculative-algorithm", "EAGLE"], "--speculative-algorithm contradicts"),
        (["--disaggregation-enable-kv-checksum"], "--disaggregation-enable-kv-checksum contradicts"),
        (["--disaggregation-decode-host-receive-threshold", "0.5"], "host-receive-threshold contradicts"),
        (["--enable-pd-role-switch"], "leaks pages in SGLang"),
        (["--enable-memory-saver"], "--enable-memory-saver contradicts"),
        (["--penstock-config", '{"flowkv": {"lease_s": 5}}'], "flowkv.lease_s: does nothing on SGLang"),
        (["--penstock-config", '{"flowkv": {"digests": "off"}}'], "did you mean digest?"),
    ],
)
def test_what_flowkv_cannot_stand_beside_is_refused_by_name(applied, words, reason):
    with pytest.raises(ConfigurationError) as refused:
        flags.join(parsed(*FLOWKV, *words))
    assert reason in str(refused.value)
    assert applied == []


@pytest.mark.parametrize("cache", ["--disable-radix-cache", "--disaggregation-decode-enable-radix-cache"])
def test_roles_may_change_where_sglang_loses_no_page(applied, cache):
    flags.join(parsed(*FLOWKV, "--enable-pd-role-switch", cache))
    assert applied == ["flowkv"]


def test_suffix_is_an_algorithm_and_its_section_reaches_children(applied):
    flags.join(parsed(*SUFFIX, "--penstock-config", '{"suffix": {"shared_tokens": 7}}'))
    assert applied == ["suffix"]
    assert suffix_config(inherited()).shared_tokens == 7


def test_suffix_beside_a_policy_that_is_fair_is_both(applied):
    flags.join(parsed(*SUFFIX, "--schedule-policy", "dlpm"))
    assert applied == ["applied", "suffix"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--speculative-num-draft-tokens", "1"], "--speculative-num-draft-tokens: given 1"),
        (["--speculative-eagle-topk", "0"], "--speculative-eagle-topk: given 0"),
        (["--speculative-eagle-topk", "2", "--page-size", "4"], "--speculative-eagle-topk: given 2 with"),
        (["--speculative-num-steps", "3"], "--speculative-num-steps contradicts"),
        (["--speculative-draft-model-path", "any"], "--speculative-draft-model-path contradicts"),
        (["--speculative-ngram-external-corpus-path", "any"], "external-corpus-path contradicts"),
        (["--speculative-adaptive"], "--speculative-adaptive contradicts"),
        (["--enable-mixed-chunk"], "--enable-mixed-chunk contradicts"),
        (["--enable-dp-attention"], "--enable-dp-attention contradicts"),
        (["--pp-size", "2"], "--pp-size: given 2"),
        (["--disaggregation-mode", "decode"], "--disaggregation-mode decode contradicts"),
        (["--schedule-policy", "slo"], "slo contradicts --speculative-algorithm"),
        (["--penstock-config", '{"suffix": {"context_tokens": 0}}'], "suffix.context_tokens: given 0"),
        (["--penstock-config", '{"suffix": {"depth": 3}}'], "suffix.depth: unknown key"),
    ],
)
def test_what_suffix_cannot_stand_beside_is_refused_by_name(applied, words, reason):
    with pytest.raises(ConfigurationError) as refused:
        flags.join(parsed(*SUFFIX, *words))
    assert reason in str(refused.value)
    assert applied == []


@pytest.mark.parametrize(
    ("words", "branches"),
    [
        ([], BRANCHES),
        (["--page-size", "1", "--speculative-eagle-topk", "2"], 2),
        (["--page-size", "16"], 1),
        (["--page-size", "16", "--attention-backend", "flashinfer"], BRANCHES),
    ],
)
def test_drafts_branch_where_sglang_verifies_branches(words, branches):
    assert branches_of(parsed(*SUFFIX, *words)) == branches


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


def test_keys_of_clients_reach_children_as_digests_only(applied):
    key = "a-secret-key"
    flags.join(parsed("--penstock-config", config(clients={key: {"client": "gold"}})))
    assert key not in os.environ[VARIABLE]
    found = scheduler_config(inherited())
    assert found is not None
    ((name, client),) = found.clients.items()
    assert (digest_of(name), client.client) == (digest_of(key), "gold")


def test_an_embedded_server_without_plugins_is_refused_where_headers_count(applied, monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    flags.join(parsed("--schedule-policy", "dlpm"))
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigurationError, match="SGLANG_RUST_SERVER"):
        flags.join(parsed("--penstock-config", config(trust_headers=True)))


def sparse(**keys: object) -> list[str]:
    return ["--penstock-config", json.dumps({"sparse_attention": keys})]


@pytest.mark.parametrize(
    "words",
    [
        TACTIC,
        ["--decode-attention-backend", "tactic"],
        ["--attention-backend", "torch_native", "--decode-attention-backend", "tactic"],
        sparse(),
        [*TACTIC, *sparse(selector="tactic")],
    ],
)
def test_sparse_attention_is_asked_for_by_flag_or_section_and_leaves_prompts_to_sglang(applied, words):
    args = parsed(*words)
    flags.join(args)
    assert applied == ["sparse"]
    assert args.attention_backend in (None, "torch_native")
    assert args.decode_attention_backend == "tactic"
    assert args.page_size == 16
    assert sparse_config(inherited()) is not None
    before = dict(vars(args))
    settle(args)
    assert vars(args) == before


def test_keys_of_sparse_attention_and_a_page_size_stay_as_given(applied):
    args = parsed(*TACTIC, "--page-size", "64", *sparse(mass=0.8, dense_layers=0))
    flags.join(args)
    assert args.page_size == 64
    found = sparse_config(inherited())
    assert found is not None
    assert (found.mass, found.dense_layers) == (0.8, 0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (sparse(mass=0.0), "sparse_attention.mass: given 0.0"),
        (sparse(mass=1.5), "sparse_attention.mass: given 1.5"),
        (sparse(selector="quest"), "sparse_attention.selector: given 'quest', allowed: tactic"),
        (sparse(masss=0.9), "did you mean mass?"),
        ([*TACTIC, "--page-size", "1"], "--page-size: given 1"),
        (
            [*TACTIC, "--page-size", "8", *sparse(summary_tokens=16)],
            "at least sparse_attention.summary_tokens, 16",
        ),
        ([*TACTIC, "--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype: given fp8_e5m2, allowed"),
        ([*TACTIC, "--device", "cuda"], "--device: given cuda, allowed"),
        ([*TACTIC, "--speculative-algorithm", "NGRAM"], "--speculative-algorithm contradicts"),
        ([*TACTIC, "--enable-pdmux"], "--enable-pdmux contradicts"),
        ([*TACTIC, "--dcp-size", "2"], "--dcp-size: given 2"),
        (["--attention-backend", "triton", *sparse()], "--attention-backend: given triton"),
        ([*TACTIC, "--prefill-attention-backend", "triton"], "--prefill-attention-backend: given triton"),
        ([*TACTIC, "--decode-attention-backend", "triton"], "--decode-attention-backend: given triton"),
    ],
)
def test_what_sparse_attention_cannot_be_beside_is_refused_by_name(applied, words, reason):
    with pytest.raises(ConfigurationError) as refused:
        flags.join(parsed(*words))
    assert reason in str(refused.value)
    assert applied == []
