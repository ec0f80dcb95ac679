"""What holds for the repository as a whole: imports, names, packaging, sizes, versions."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from penstock.connectors.config import FlowKVConfig

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOST_LINES_A_FILE = 400
MOST_LINES_A_FUNCTION = 60


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


check_imports = load_tool("check_imports")
ROOMS = check_imports.ROOMS


def sources() -> list[Path]:
    return [file for room in (*ROOMS, "tools") for file in sorted((ROOT / room).rglob("*.py"))]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_imports_go_in_the_right_direction():
    assert check_imports.check(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "reason"),
    [
        ("schedulers/fair.py", "import torch", "not torch"),
        ("schedulers/fair.py", "from penstock.connectors import runs", "may not import connectors"),
        ("connectors/plan.py", "import vllm.config", "no engine"),
        ("connectors/plan.py", "import nixl", "only connectors/transports/nixl.py"),
        ("connectors/plan.py", "def late():\n    from zmq import Context", "only connectors/control.py"),
        ("connectors/plan.py", "from penstock.plugins.vllm import entry", "may not import plugins"),
        ("connectors/plan.py", "import connectors.runs", "bare name"),
        ("routers/proxy.py", "from kernels import attention", "bare name"),
        ("simulation/engine.py", "import vllm", "no engine"),
        ("plugins/features.py", "from vllm import config", "no engine"),
        ("plugins/vllm/entry.py", "import sglang.srt", "allowed here: vllm"),
        ("plugins/features.py", "from penstock.plugins import vllm", "nothing imports an adapter"),
        ("plugins/sglang/entry.py", "from ..vllm import entry", "nothing imports an adapter"),
        ("patches/vllm/one.py", "from penstock.plugins import features", "may not import plugins"),
        ("tests/test_x.py", "import plugins", "bare name"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(tmp_path, path, line, reason):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(f"import os\n{line}\n")
    faults = check_imports.check(tmp_path)
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}:")
    assert reason in faults[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("schedulers/fair.py", "import numpy as np"),
        ("connectors/control.py", "import zmq"),
        ("connectors/transports/nixl.py", "from nixl import _api"),
        ("connectors/plan.py", "from . import runs"),
        ("plugins/vllm/entry.py", "import vllm"),
        ("plugins/vllm/entry.py", "from penstock.plugins.vllm import flags"),
        ("plugins/vllm/entry.py", "from penstock.connectors.runs import Run"),
        ("simulation/vllm.py", "import vllm"),
        ("simulation/vllm_engine.py", "import vllm"),
        ("benchmarks/flowkv.py", "import vllm, nixl, zmq"),
    ],
)
def test_an_import_in_the_right_direction_is_not(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert check_imports.check(tmp_path) == []


@pytest.mark.parametrize("name", [*ROOMS, "benchmarks", "integration_tests", "tools"])
def test_no_room_is_importable_by_its_bare_name(tmp_path, name):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.find_spec({name!r})\n"
        "places = [] if spec is None else [spec.origin or '', *(spec.submodule_search_locations or [])]\n"
        f"sys.exit(any(place.startswith({str(ROOT)!r}) and '/.venv' not in place for place in places))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel that is built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", "dist"], cwd=copy, check=True)
    (built,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_source_file_and_nothing_outside_the_package(wheel):
    wanted = {f"penstock/{relative(file)}" for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert wanted <= set(wheel)
    assert {name.partition("/")[0] for name in wheel} == {
        "penstock",
        f"penstock-{PROJECT['project']['version']}.dist-info",
    }


def test_the_wheel_is_typed_and_holds_its_data_and_licence(wheel):
    assert {f"penstock/{room}/py.typed" for room in ROOMS} <= set(wheel)
    assert "penstock/benchmarks/corpus.txt" in wheel
    assert "penstock/benchmarks/needle/weights/model.safetensors" in wheel
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [PROJECT["project"]["version"]])


def test_the_documented_keys_of_flowkv_are_the_keys_it_takes():
    text = (ROOT / "docs/flowkv.md").read_text()
    table = re.search(r"<!-- keys.*?-->(.*?)<!-- end of keys -->", text, re.DOTALL)
    assert table is not None
    documented = re.findall(r"^\| `(\w+)` \|", table.group(1), re.MULTILINE)
    assert documented == list(FlowKVConfig.__struct_fields__)


@pytest.mark.parametrize("file", sources(), ids=relative)
def test_files_and_functions_stay_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_A_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", [*sources(), *sorted((ROOT / "docs").rglob("*.md"))], ids=relative)
def test_no_text_names_a_place_on_somebody_s_machine(file):
    assert not re.search(r"(?<![\w.])/(?:work|root|home/\w+)/", file.read_text())


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("file", documents(), ids=relative)
def test_links_between_documents_lead_somewhere(file):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", file.read_text()):
        assert (file.parent / target).exists(), f"{target} is missing"
