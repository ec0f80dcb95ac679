"""Each patch of vLLM is still necessary on the installed version; one that is not should be removed."""

from __future__ import annotations

import ast

import pytest

from penstock.patches.vllm import (
    builds,
    command_line,
    cpu_backend,
    cpu_layouts,
    distribution_version,
    handed_out_blocks,
    stat_logging,
    worker_stats,
)
from penstock.plugins.trees import SourceTree, installed_tree
from penstock.plugins.vllm.examination import BLOCK_OUTERMOST, CPU_BACKENDS, declared_layouts


@pytest.fixture(scope="module")
def source() -> SourceTree:
    tree = installed_tree("vllm")
    if tree is None:
        pytest.skip("needs an installed vLLM")
    return tree


def text_of(source, module, *path):
    node = source.function(module, path) if path else source.parse(module)
    assert node is not None
    return ast.unparse(node)


def test_cpu_backend_does_not_declare_the_block_outermost_layout(source):
    (target,) = CPU_BACKENDS.values()
    assert cpu_layouts.PATCH.target.startswith(target)
    assert BLOCK_OUTERMOST not in declared_layouts(source, target)


def test_command_line_has_no_option_for_the_connector_and_no_hook_for_plugins(source):
    module, _, path = command_line.extending(print).target.partition(":")
    assert "'--kv-connector'" not in text_of(source, module, *path.split("."))
    build = text_of(source, module, "AsyncEngineArgs", "add_cli_args")
    assert "load_general_plugins()" in build


def test_command_line_asks_for_a_distribution_that_the_cpu_wheel_is_not(source):
    assert distribution_version.PATCH.needed is builds.only_repackaged
    assert "importlib.metadata.version('vllm')" in text_of(source, "vllm.entrypoints.cli.main")


def test_statistics_of_a_scheduler_have_no_field_for_foreign_ones(source):
    assert stat_logging.PATCH.target == "vllm.v1.metrics.loggers:StatLoggerManager.record"
    tree = source.parse("vllm.v1.metrics.stats")
    (stats,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SchedulerStats"]
    open_fields = {
        node.target.id
        for node in stats.body
        if isinstance(node, ast.AnnAssign) and "Any" in ast.unparse(node.annotation)
    }
    assert open_fields <= {"kv_connector_stats", "ec_connector_stats"}


def test_cpu_platform_does_not_know_custom_backends(source):
    module, _, path = cpu_backend.PATCH.target.partition(":")
    assert "CUSTOM" not in text_of(source, module, *path.split("."))


def test_attention_metadata_does_not_say_whose_blocks_are_new(source):
    assert handed_out_blocks.watching(print).target == "vllm.v1.worker.gpu_worker:Worker.execute_model"
    tree = source.parse("vllm.v1.attention.backend")
    (common,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CommonAttentionMetadata"]
    fields = {node.target.id for node in common.body if isinstance(node, ast.AnnAssign)}
    assert "block_table_tensor" in fields
    assert not {name for name in fields if "new_block" in name or "req_ids" in name}


def test_outputs_of_a_step_have_no_field_for_foreign_statistics(source):
    worker, scheduler = worker_stats.carrying(dict)
    assert worker.target == "vllm.v1.worker.gpu_worker:Worker.sample_tokens"
    assert scheduler.target == "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"
    tree = source.parse("vllm.v1.outputs")
    (output,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ModelRunnerOutput"]
    fields = [node for node in output.body if isinstance(node, ast.AnnAssign)]
    assert "req_ids" in {node.target.id for node in fields}
    assert not [node.target.id for node in fields if "Any" in ast.unparse(node.annotation)]
