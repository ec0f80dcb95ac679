"""The declared seams are the ones that the adapter really uses, and the installed vLLM has them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import patches, plugins
from penstock.plugins.doctor_report import examine
from penstock.plugins.seams import State, Use, check
from penstock.plugins.signatures import Definition
from penstock.plugins.trees import SourceTree, installed_tree
from penstock.plugins.vllm.features import (
    DRAFT_CONTROL,
    FEATURES,
    REQUEST_SCHEDULER,
    SHARED_PREFIX_ATTENTION,
    SPARSE_ATTENTION,
)
from penstock.plugins.vllm.flowkv_seams import CONNECTOR
from penstock.plugins.vllm.sparse_seams import GPU_ATTENTION

BASE = ("vllm.distributed.kv_transfer.kv_connector.v1.base", ("KVConnectorBase_V1",))
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn:CPUAttention"
FOLDERS = [Path(plugins.__path__[0]) / "vllm", Path(patches.__path__[0]) / "vllm"]


@pytest.fixture(scope="module")
def source() -> SourceTree:
    tree = installed_tree("vllm")
    if tree is None:
        pytest.skip("needs an installed vLLM")
    return tree


class Renamed:
    """A tree in which one name is gone."""

    def __init__(self, tree: SourceTree, name: str) -> None:
        self.tree, self.name = tree, name

    def lookup(self, module: str, path: tuple[str, ...]) -> Definition | None:
        return None if f"{module}:{'.'.join(path)}" == self.name else self.tree.lookup(module, path)


SEAMS = sorted(
    {(seam.name, seam.optional) for feature in FEATURES.values() for seam in feature.all_seams()},
)


@pytest.mark.parametrize(("name", "optional"), [seam for seam in SEAMS if seam[0].startswith("vllm")])
def test_renaming_one_symbol_turns_off_the_features_that_declare_it(source, name, optional):
    declaring = {
        feature.name
        for feature in FEATURES.values()
        if any(seam.name == name and not seam.optional for seam in feature.all_seams())
    }
    states = {
        feature.name: examine(feature, Renamed(source, name))
        for feature in FEATURES.values()
        if feature.name != "repackaged-version"
    }
    off = {name: report.moved for name, report in states.items() if report.state == "off"}
    assert off.keys() == (set() if optional else declaring)
    for (moved,) in off.values():
        assert moved.startswith(name)


def test_every_hook_that_the_connector_overrides_is_a_seam(source):
    ours = SourceTree(Path(plugins.__path__[0]).parent)
    module = ours.parse("plugins.vllm.connector")
    assert module is not None
    (connector,) = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "FlowKVConnector"]
    methods = {node.name for node in connector.body if isinstance(node, ast.FunctionDef)}
    upstream = {name for name in methods if source.lookup(BASE[0], (*BASE[1], name)) is not None}
    declared = {seam.name.rpartition(".")[2] for seam in CONNECTOR if "KVConnectorBase_V1" in seam.name}
    assert upstream - declared == set()


def methods_of(module: str, name: str) -> set[str]:
    """The methods that a class of ours defines, and those that it sets on an instance."""
    tree = SourceTree(Path(plugins.__path__[0]).parent).parse(module)
    assert tree is not None
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    own = {node.name for node in found.body if isinstance(node, ast.FunctionDef)}
    return own | {
        node.targets[0].attr
        for node in ast.walk(found)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in own
    }


@pytest.mark.parametrize(
    ("feature", "module", "ours", "owner"),
    [
        (REQUEST_SCHEDULER, "request_scheduler behind_model", "RequestScheduling BehindTheModel", SCHEDULER),
        (REQUEST_SCHEDULER, "request_queue", "OrderedQueue", "vllm.v1.core.sched.request_queue:RequestQueue"),
        (DRAFT_CONTROL, "draft_control", "DraftControlling", SCHEDULER),
        (SHARED_PREFIX_ATTENTION, "prefix_backend", "PrefixCPUBackend", f"{CPU_ATTENTION}Backend"),
        (SHARED_PREFIX_ATTENTION, "prefix_backend", "PrefixCPUImpl", f"{CPU_ATTENTION}BackendImpl"),
        (SHARED_PREFIX_ATTENTION, "prefix_backend", "PrefixCPUBuilder", f"{CPU_ATTENTION}MetadataBuilder"),
        (SPARSE_ATTENTION, "sparse_backend", "SparseCPUBackend", f"{CPU_ATTENTION}Backend"),
        (SPARSE_ATTENTION, "sparse_backend", "SparseCPUImpl", f"{CPU_ATTENTION}BackendImpl"),
        (SPARSE_ATTENTION, "sparse_backend", "SparseCPUBuilder", f"{CPU_ATTENTION}MetadataBuilder"),
    ],
)
def test_every_method_that_a_feature_overrides_is_a_seam(source, feature, module, ours, owner):
    upstream_module, _, name = owner.partition(":")
    classes = zip(module.split(), ours.split(), strict=True)
    methods = set().union(*(methods_of(f"plugins.vllm.{where}", name) for where, name in classes))
    upstream = {method for method in methods if source.lookup(upstream_module, (name, method)) is not None}
    declared = {
        seam.name.rpartition(".")[2]
        for seam in feature.all_seams()
        if seam.name.startswith(f"{owner}.") and seam.use is Use.OVERRIDE
    }
    assert upstream == declared


def test_what_sparse_attention_stands_on_on_gpus_is_there(source):
    assert not [found for seam in GPU_ATTENTION if (found := check(seam, source)).state is not State.HOLDS]


@pytest.mark.parametrize(
    ("module", "part", "stock"),
    [
        ("sparse_flash", "Flash", "flash_attn:FlashAttention"),
        ("sparse_triton", "Triton", "triton_attn:TritonAttention"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "upstream"), [("Backend", "Backend"), ("Impl", "Impl"), ("Builder", "MetadataBuilder")]
)
def test_every_method_that_is_mixed_into_a_gpu_backend_is_a_seam(source, module, part, stock, kind, upstream):
    owner, _, name = stock.partition(":")
    methods = methods_of("plugins.vllm.sparse_gpu", f"SparseGPU{kind}")
    methods |= methods_of(f"plugins.vllm.{module}", f"Sparse{part}{kind}")
    path = f"vllm.v1.attention.backends.{owner}", f"{name}{upstream}"
    there = {method for method in methods if source.lookup(path[0], (path[1], method)) is not None}
    declared = {seam.name.rpartition(".")[2] for seam in GPU_ATTENTION if seam.use is Use.OVERRIDE}
    assert there - declared == set()


def test_every_abstract_hook_is_overridden(source):
    module = source.parse(BASE[0])
    assert module is not None
    (base,) = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == BASE[1][0]]
    abstract = {
        node.name
        for node in base.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in node.decorator_list)
    }
    declared = {seam.name.rpartition(".")[2] for seam in CONNECTOR}
    assert abstract
    assert abstract - declared == set()


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Names that a file imports from vLLM and cannot do without."""
    tree = ast.parse(file.read_text())
    guarded = {
        id(node) for attempt in ast.walk(tree) if isinstance(attempt, ast.Try) for node in attempt.body
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("vllm.")
            and id(node) not in guarded
        ):
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_every_imported_name_exists(source):
    names = {name for folder in FOLDERS for file in folder.glob("*.py") for name in imported(file)}
    assert len(names) > 10
    missing = {
        f"{module}.{name}"
        for module, name in names
        if source.lookup(module, (name,)) is None and source.parse(f"{module}.{name}") is None
    }
    assert missing == set()
