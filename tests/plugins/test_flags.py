"""The one flag, in every form, through vLLM's own parser."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from penstock.plugins import features, ledger

pytest.importorskip("vllm", reason="needs an installed vLLM")


@pytest.fixture(scope="module")
def parser():
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from penstock.plugins.vllm import flags

    load_general_plugins()
    parser = FlexibleArgumentParser(prog="vllm serve")
    subparser = parser.add_subparsers().add_parser("serve")
    subparser.add_argument("model_tag", nargs="?")
    subparser.add_argument("--config")
    from vllm.engine.arg_utils import AsyncEngineArgs

    flags.extend(AsyncEngineArgs.add_cli_args(subparser))
    return parser


@pytest.fixture
def parse(parser):
    def parse(*arguments: str):
        namespace = parser.parse_args(["serve", "model", *arguments])
        assert pickle.loads(pickle.dumps(namespace)).kv_transfer_config == namespace.kv_transfer_config
        from vllm.engine.arg_utils import AsyncEngineArgs

        names = {name for name in AsyncEngineArgs.__dataclass_fields__ if hasattr(namespace, name)}
        assert "kv_transfer_config" in names
        return namespace.kv_transfer_config

    return parse


@pytest.fixture
def refuse(parser, capsys):
    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(["serve", "model", *arguments])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refuse


JSON = {"kv_connector": "flowkv", "kv_role": "kv_producer", "kv_connector_extra_config": {"port": 7000}}
DOTTED = [
    "--kv-transfer-config.kv_connector=flowkv",
    "--kv-transfer-config.kv_role",
    "kv_producer",
    "--kv-transfer-config.kv_connector_extra_config.port",
    "7000",
]
SHORT = ["--kv-connector", "flowkv", "--kv-role", "kv_producer", "--flowkv-port", "7000"]
FORMS = {
    "short": SHORT,
    "underscores": ["--kv_connector=flowkv", "--kv_role=kv_producer", "--flowkv_port=7000"],
    "reversed": ["--flowkv-port=7000", "--kv-role=kv_producer", "--kv-connector=flowkv"],
    "json": ["--kv-transfer-config", json.dumps(JSON)],
    "dotted": DOTTED,
    "both": [*SHORT, "--kv-transfer-config", json.dumps(JSON)],
    "both, json first": ["--kv-transfer-config", json.dumps(JSON), *SHORT],
    "short and dotted": [*DOTTED[-2:], "--kv-connector=flowkv", "--kv-role=kv_producer"],
    "class name": ["--kv-connector=FlowKVConnector", *SHORT[2:]],
    "class name and alias": ["--kv-connector=FlowKVConnector", "--kv-transfer-config", json.dumps(JSON)],
}


@pytest.mark.parametrize("arguments", FORMS.values(), ids=FORMS)
def test_every_form_means_the_same(parse, arguments):
    config = parse(*arguments)
    assert config.kv_connector in ("flowkv", "FlowKVConnector")
    assert config.kv_role == "kv_producer"
    assert config.kv_connector_extra_config == {"port": 7000}
    assert os.environ[features.ASKED_FOR] == "flowkv"


YAML = {
    "short": "kv-connector: flowkv\nkv-role: kv_producer\nflowkv-port: 7000\n",
    "nested": "kv-transfer-config:\n  kv_connector: flowkv\n  kv_role: kv_producer\n"
    "  kv_connector_extra_config:\n    port: 7000\n",
    "mixed": "kv-connector: flowkv\nkv-role: kv_producer\n"
    "kv-transfer-config:\n  kv_connector_extra_config:\n    port: 7000\n",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml_means_the_same(parse, tmp_path, text):
    (tmp_path / "serve.yaml").write_text(text)
    config = parse("--config", str(tmp_path / "serve.yaml"))
    assert (config.kv_connector, config.kv_role) == ("flowkv", "kv_producer")
    assert config.kv_connector_extra_config == {"port": 7000}


def test_command_line_wins_over_yaml_where_both_use_the_short_option(parse, tmp_path):
    (tmp_path / "serve.yaml").write_text("kv-connector: flowkv\nflowkv-port: 7000\n")
    config = parse("--config", str(tmp_path / "serve.yaml"), "--flowkv-port", "7001")
    assert config.kv_connector_extra_config == {"port": 7001}


def test_nothing_given_is_nothing(parse):
    assert parse() is None
    assert features.ASKED_FOR not in os.environ


def test_one_flag_alone_serves_both_roles(parse):
    config = parse("--kv-connector", "flowkv")
    assert (config.kv_connector, config.kv_role) == ("flowkv", "kv_both")
    assert config.kv_load_failure_policy == "fail"


def test_short_option_of_flowkv_is_enough(parse):
    config = parse("--flowkv-lease-s", "20", "--flowkv-host", "10.0.0.1")
    assert config.kv_connector == "flowkv"
    assert config.kv_connector_extra_config == {"lease_s": 20.0, "host": "10.0.0.1"}


def test_other_fields_of_the_json_are_kept(parse):
    rest = {"kv_load_failure_policy": "recompute", "kv_port": 9, "engine_id": "me"}
    config = parse("--kv-connector", "flowkv", "--kv-transfer-config", json.dumps(rest))
    assert {key: getattr(config, key) for key in rest} == rest


@pytest.mark.parametrize("name", ["NixlConnector", "ExampleConnector", "OffloadingConnector"])
def test_stock_connectors_have_the_flag_too(parse, name):
    assert parse("--kv-connector", name).kv_connector == name
    assert features.ASKED_FOR not in os.environ


def test_connector_of_someone_elses_module(parse):
    extra = json.dumps({"kv_connector_module_path": "their.module"})
    config = parse("--kv-connector", "Theirs", "--kv-transfer-config", extra)
    assert (config.kv_connector, config.kv_connector_module_path) == ("Theirs", "their.module")


NIXL = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
REFUSED = [
    (
        ["--kv-connector", "flowkv", "--kv-transfer-config", NIXL],
        "--kv-connector flowkv contradicts --kv-transfer-config, where kv_connector is NixlConnector",
    ),
    (
        ["--kv-transfer-config", json.dumps(JSON), "--kv-role", "kv_consumer"],
        "--kv-role kv_consumer contradicts --kv-transfer-config, where kv_role is kv_producer",
    ),
    (
        ["--kv-transfer-config", json.dumps(JSON), "--flowkv-port", "7001"],
        "flowkv.port: --flowkv-* says 7001, kv_connector_extra_config says 7000; give it once",
    ),
    (
        [
            "--kv-connector=flowkv",
            "--flowkv-port=1",
            '--additional-config={"penstock":{"flowkv":{"port":2}}}',
        ],
        "flowkv.port: additional_config says 2, kv_connector_extra_config says 1; give it once",
    ),
    (["--kv-connector", "Nixl"], "--kv-connector: given Nixl, allowed: "),
    (["--kv-role", "kv_both"], "--kv-role: given kv_both, but no connector"),
    (
        ["--kv-connector=NixlConnector", "--flowkv-port=1"],
        "--flowkv-port: given, but the KV connector is Nixl",
    ),
    (["--kv-connector=flowkv", "--flowkv-port=70000"], "flowkv.port: given 70000, allowed: int <= 65535"),
    (["--kv-connector=flowkv", "--flowkv-lease-s=3"], "flowkv.heartbeat_s: given 5.0, allowed: less than"),
    (
        ["--kv-connector=flowkv", "--kv-transfer-config.kv_connector_extra_config.prot=1"],
        "did you mean port?",
    ),
    (["--kv-connector=flowkv", '--additional-config={"penstock":{"flow":{}}}'], "penstock.flow: unknown key"),
    (
        ["--kv-connector=flowkv", "--flowkv-digest=some"],
        "flowkv.digest: given 'some', allowed: full, off, sampled",
    ),
    (["--kv-connector=flowkv", "--flowkv-port=many"], "flowkv.port: given 'many', allowed: int"),
    (["--kv-connector=flowkv", "--flowkv-lease-s=nan"], "flowkv.lease_s: given nan, allowed: float"),
    (["--kv-connector=flowkv", "--kv-role=both"], "--kv-role: given both, allowed: kv_producer"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_contradiction_or_impossible_value_is_one_line(refuse, arguments, message):
    assert message in refuse(*arguments)


def test_moved_seam_stops_the_command_that_asked_for_the_feature(refuse, parse, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.delattr(KVConnectorBase_V1, "request_finished")
    line = refuse("--kv-connector", "flowkv")
    assert "flowkv cannot be applied to vllm" in line
    assert "KVConnectorBase_V1.request_finished: not found" in line
    assert parse("--kv-connector", "NixlConnector").kv_connector == "NixlConnector"
    assert parse() is None


def test_looking_the_class_up_is_asking_for_it(monkeypatch):
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in ("flowkv", "FlowKVConnector"):
        config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        assert KVConnectorFactory.get_connector_class(config).__name__ == "FlowKVConnector"
    assert os.environ[features.ASKED_FOR] == "flowkv"
    assert {entry.feature: entry.state for entry in ledger.entries()} == {"flowkv": "active"}


def test_class_is_refused_when_a_seam_moved(monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    monkeypatch.setattr(FreeKVCacheBlockQueue, "popleft_n", lambda self, n, group: [])
    with pytest.raises(
        features.FeatureError, match=r"popleft_n: expected \(self, n\), found \(self, n, group\)"
    ):
        KVConnectorFactory.get_connector_class_by_name("flowkv")
    assert features.ASKED_FOR not in os.environ


def test_moved_registry_leaves_flowkv_off_and_vllm_running(monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from penstock.plugins.vllm import entry

    registry = {name: load for name, load in KVConnectorFactory._registry.items() if "low" not in name}
    monkeypatch.setattr(KVConnectorFactory, "_registry", registry)
    monkeypatch.setattr(KVConnectorFactory, "register_connector", classmethod(lambda cls, name, path: None))
    entry.register()
    assert [(entry.feature, entry.state) for entry in ledger.entries()] == [("flowkv", "off")]
    assert "register_connector: expected" in ledger.entries()[0].reason
    assert "flowkv" not in registry


FACTORY = "penstock.plugins.vllm.request_scheduler.make_scheduler"
DLPM = {"penstock": {"scheduler": {"policy": "dlpm"}}}


@pytest.fixture
def parse_all(parser):
    def parse_all(*arguments: str):
        namespace = parser.parse_args(["serve", "model", *arguments])
        assert pickle.loads(pickle.dumps(namespace)) == namespace
        return namespace

    return parse_all


SCHEDULER_FORMS = {
    "flag": ["--request-scheduler", "dlpm"],
    "json": ["--additional-config", json.dumps(DLPM)],
    "both": ["--request-scheduler=dlpm", "--additional-config", json.dumps(DLPM)],
    "dotted": ["--additional-config.penstock.scheduler.policy", "dlpm"],
    "class": ["--scheduler-cls", FACTORY],
    "class and flag": ["--scheduler-cls", FACTORY, "--request_scheduler", "dlpm"],
}


@pytest.mark.parametrize("arguments", SCHEDULER_FORMS.values(), ids=SCHEDULER_FORMS)
def test_every_form_asks_for_the_scheduler(parse_all, arguments):
    found = parse_all(*arguments)
    assert found.scheduler_cls == FACTORY
    assert found.additional_config == DLPM
    assert os.environ[features.ASKED_FOR] == "request-scheduler"


def test_other_keys_of_the_json_are_kept(parse_all):
    given = {"mine": 1, "penstock": {"scheduler": {"quantum_tokens": 500.0}, "flowkv": {"lanes": 1}}}
    found = parse_all("--request-scheduler", "vtc", "--additional-config", json.dumps(given))
    given["penstock"]["scheduler"]["policy"] = "vtc"
    assert found.additional_config == given


def test_no_scheduler_is_asked_for_unless_it_is(parse_all):
    found = parse_all()
    assert (found.scheduler_cls, found.additional_config) == (None, {})
    found = parse_all("--additional-config", json.dumps({"penstock": {"flowkv": {}}}))
    assert found.scheduler_cls is None
    assert features.ASKED_FOR not in os.environ


CONTRADICTIONS = {
    "policy": (
        ["--request-scheduler", "vtc", "--additional-config", json.dumps(DLPM)],
        ("scheduler.policy", "'dlpm'", "'vtc'", "give it once"),
    ),
    "class": (
        ["--request-scheduler", "vtc", "--scheduler-cls", "mine.Scheduler"],
        ("--request-scheduler vtc contradicts --scheduler-cls mine.Scheduler",),
    ),
    "class and json": (
        ["--additional-config", json.dumps(DLPM), "--scheduler-cls", "mine.Scheduler"],
        ("penstock.scheduler", "contradicts --scheduler-cls mine.Scheduler"),
    ),
    "priority": (
        ["--request-scheduler", "dlpm", "--scheduling-policy", "priority"],
        ("--request-scheduler dlpm contradicts --scheduling-policy priority",),
    ),
    "unknown policy": (
        ["--request-scheduler", "dlpn"],
        ("scheduler.policy", "'dlpn'", "dlpm, fcfs, lpm, slo, vtc"),
    ),
    "unknown key": (
        ["--request-scheduler=dlpm", "--additional-config", '{"penstock": {"scheduler": {"quantum": 1}}}'],
        ("scheduler.quantum", "did you mean quantum_tokens?"),
    ),
    "impossible value": (
        ["--additional-config", '{"penstock": {"scheduler": {"quantum_tokens": -1}}}'],
        ("scheduler.quantum_tokens", "-1", "> 0"),
    ),
    "no object": (["--additional-config", '{"penstock": {"scheduler": 3}}'], ("penstock.scheduler", "3")),
}


@pytest.mark.parametrize(("arguments", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_about_the_scheduler_is_one_line(refuse, arguments, said):
    line = refuse(*arguments)
    assert all(part in line for part in said), line


def test_a_parser_of_a_server_gains_the_middleware_first(parser, parse_all):
    from argparse import Namespace

    from penstock.plugins.vllm import scheduler_flags

    namespace = Namespace(request_scheduler="lpm", middleware=["mine.Middleware"])
    for _ in range(2):
        scheduler_flags.join(namespace)
    assert namespace.middleware == [scheduler_flags.MIDDLEWARE, "mine.Middleware"]


def test_sparse_attention_is_a_backend_and_a_section(parser):
    section = {"penstock": {"sparse_attention": {"mass": 0.8}}}
    for arguments in (["--sparse-attention", "tactic"], []):
        namespace = parser.parse_args(["serve", "m", *arguments, "--additional-config", json.dumps(section)])
        assert namespace.attention_backend == "CUSTOM"
        ours = namespace.additional_config["penstock"]["sparse_attention"]
        assert ours == {"mass": 0.8, "selector": "tactic"}
    assert "sparse-attention" in os.environ[features.ASKED_FOR].split(",")


def test_without_it_the_backend_is_whatever_was_given(parser):
    assert parser.parse_args(["serve", "m"]).attention_backend is None
    given = parser.parse_args(["serve", "m", "--attention-backend", "CPU_ATTN"])
    assert given.attention_backend == "CPU_ATTN"
    assert features.ASKED_FOR not in os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention-backend", "CPU_ATTN"], "--sparse-attention contradicts --attention-backend CPU_ATTN"),
        (
            ["--additional-config", '{"penstock": {"sparse_attention": {"mass": 1.5}}}'],
            "sparse_attention.mass: given 1.5, allowed:",
        ),
        (
            ["--additional-config", '{"penstock": {"sparse_attention": {"key_bits": 4}}}'],
            "sparse_attention.key_bits: unknown key",
        ),
    ],
)
def test_what_contradicts_sparse_attention_is_refused(refuse, arguments, message):
    assert message in refuse("--sparse-attention", "tactic", *arguments)


def test_an_unknown_selector_is_refused_with_the_known_ones(refuse):
    line = refuse("--sparse-attention", "magic")
    assert "sparse_attention.selector: given 'magic', allowed: tactic" in line


def test_shared_prefixes_are_a_backend_and_a_section(parser):
    section = {"penstock": {"shared_prefix_attention": {"least_blocks": 4}}}
    for arguments in (["--shared-prefix-attention", "cascade"], []):
        namespace = parser.parse_args(["serve", "m", *arguments, "--additional-config", json.dumps(section)])
        assert namespace.attention_backend == "CUSTOM"
        ours = namespace.additional_config["penstock"]["shared_prefix_attention"]
        assert ours == {"least_blocks": 4, "method": "cascade"}
    assert "shared-prefix-attention" in os.environ[features.ASKED_FOR].split(",")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--attention-backend", "CPU_ATTN"],
            "--shared-prefix-attention contradicts --attention-backend CPU_ATTN",
        ),
        (["--sparse-attention", "tactic"], "both choose what a decode step reads; give one of them"),
        (
            ["--additional-config", '{"penstock": {"sparse_attention": {}}}'],
            "both choose what a decode step reads; give one of them",
        ),
        (
            ["--additional-config", '{"penstock": {"shared_prefix_attention": {"least_requests": 1}}}'],
            "shared_prefix_attention.least_requests: given 1, allowed:",
        ),
        (
            ["--additional-config", '{"penstock": {"shared_prefix_attention": {"levels": 2}}}'],
            "shared_prefix_attention.levels: unknown key",
        ),
    ],
)
def test_what_contradicts_shared_prefixes_is_refused(refuse, arguments, message):
    assert message in refuse("--shared-prefix-attention", "cascade", *arguments)


def test_an_unknown_method_for_shared_prefixes_is_refused_with_the_known_ones(refuse):
    line = refuse("--shared-prefix-attention", "tree")
    assert "shared_prefix_attention.method: given 'tree', allowed: cascade" in line


def test_shared_prefixes_are_refused_where_vllm_is_not_for_cpus(refuse, monkeypatch):
    from penstock.plugins.vllm import shared_prefix

    monkeypatch.setattr(shared_prefix, "is_cpu_build", lambda: False)
    line = refuse("--shared-prefix-attention", "cascade")
    assert "shared prefixes: given a vLLM that is not for CPUs, allowed: vLLM for CPUs" in line
