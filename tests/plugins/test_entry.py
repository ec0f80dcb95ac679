"""What loading the plugin costs and changes, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

GENEROUS_MS = 20


def run(code: str, **variables: str) -> dict:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **variables}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADING = """
import importlib.metadata, json, sys, time
(general,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="penstock")
(platform,) = importlib.metadata.entry_points(group="vllm.platform_plugins", name="penstock")
before, start = set(sys.modules), time.process_time()
general.load()()
answer = platform.load()()
spent_ms = (time.process_time() - start) * 1000
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"spent_ms": spent_ms, "new": sorted(new - sys.stdlib_module_names), "answer": answer}))
"""


def test_loading_is_quick_and_imports_nothing_of_others():
    found = run(LOADING)
    assert found["new"] == ["penstock"]
    assert found["answer"] is None
    assert found["spent_ms"] < GENEROUS_MS


ENGINE = """
import json, os, sys, time
from vllm import LLM
import vllm.entrypoints.cli.serve, vllm.v1.engine.core
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from penstock.patches.vllm import cpu_layouts
from penstock.plugins import ledger
from penstock.plugins.vllm import entry

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("vllm", "importlib", "argparse"):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({(name, key, member): held for member, held in vars(value).items()})
    return found

def layouts():
    return [layout.name for layout in CPUAttentionBackend.supported_kv_cache_layouts()]

def states():
    return {entry.feature: entry.state for entry in ledger.entries()}

registry, before, start = dict(KVConnectorFactory._registry), attributes(), time.process_time()
entry.register(); entry.platform(); entry.register()
spent_ms, after = (time.process_time() - start) * 1000, attributes()
nothing_configured = {
    "compared": len(before),
    "changed": sorted(str(k) for k in before.keys() | after.keys() if before.get(k) is not after.get(k)),
    "new": sorted(KVConnectorFactory._registry.keys() - registry.keys()),
    "kept": all(KVConnectorFactory._registry[name] is loader for name, loader in registry.items()),
    "spent_ms": spent_ms,
    "adapter": "penstock.plugins.vllm.connector" in sys.modules,
    "layouts": layouts(),
    "states": states(),
}

os.environ["PENSTOCK_FEATURES"] = "flowkv"
entry.register()
inherited = {"layouts": layouts(), "states": states()}

cpu_layouts.PATCH.remove()
ledger._entries.clear()
CPUAttentionBackend.supported_layouts = vars(CPUAttentionBackend)["supported_kv_cache_layouts"]
del CPUAttentionBackend.supported_kv_cache_layouts
try:
    entry.register()
    error = None
except RuntimeError as caught:
    error = f"{type(caught).__name__}: {caught}"
renamed = {"error": error, "states": states()}
print(json.dumps({"nothing_configured": nothing_configured, "inherited": inherited, "renamed": renamed}))
"""


@pytest.fixture(scope="module")
def engine_process() -> dict:
    return run(ENGINE, VLLM_PLUGINS="")


def test_nothing_configured_changes_no_upstream_attribute(engine_process):
    found = engine_process["nothing_configured"]
    assert found["compared"] > 10_000
    assert found["changed"] == []
    assert found["new"] == ["FlowKVConnector", "flowkv"]
    assert found["kept"]
    assert not found["adapter"]
    assert found["layouts"] == ["LBHNC"]
    assert found["states"] == {}
    assert found["spent_ms"] < GENEROUS_MS


def test_process_started_by_one_that_uses_flowkv_is_ready_before_it_lays_out_memory(engine_process):
    assert engine_process["inherited"] == {"layouts": ["LBHNC", "BLHNC"], "states": {"flowkv": "active"}}


def test_renamed_symbol_stops_a_process_that_needs_it_with_one_line(engine_process):
    found = engine_process["renamed"]
    target = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.supported_kv_cache_layouts"
    assert found["error"].startswith("FeatureError: flowkv cannot be applied to vllm ")
    assert target in found["error"]
    assert "\n" not in found["error"]
    assert found["states"] == {"flowkv": "off"}


COMMAND = """
import importlib.metadata, json, sys
sys.argv = ["vllm", "serve", "--help=Penstock"]
import vllm.entrypoints.cli.main as cli, vllm.engine.arg_utils as arg_utils
originals = (arg_utils.EngineArgs.add_cli_args, importlib.metadata.version)
import contextlib, io
shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    cli.main()
from penstock.patches.attribute import original_of
print(json.dumps({
    "help": shown.getvalue(),
    "wrapped": original_of(vars(arg_utils.EngineArgs)["add_cli_args"]) is not None,
    "version": importlib.metadata.version("vllm"),
    "asked_for": __import__("os").environ.get("PENSTOCK_FEATURES"),
    "adapter": "penstock.plugins.vllm.connector" in sys.modules,
}))
"""


def test_command_line_gets_the_options_and_no_feature():
    found = run(COMMAND)
    for option in ("--kv-connector NAME", "--kv-role", "--flowkv-port", "--flowkv-host"):
        assert option in found["help"]
    assert found["wrapped"]
    assert found["version"].startswith("0.")
    assert found["asked_for"] is None
    assert not found["adapter"]
