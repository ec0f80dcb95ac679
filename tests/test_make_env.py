"""The environment's set-up, with pip and venv replaced by a record of what they were asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ["torch==2.13.0+cpu", "torchvision; x", "TorchAudio", "torchcodec>=0.14", "msgspec"]


@pytest.fixture
def tool(monkeypatch, tmp_path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_env", ROOT / "tools" / "make_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text("[project]")
    for file in (module.SGLANG_REQUIREMENTS, module.REFERENCE_PLATFORM / "pyproject.toml"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("msgspec==0.22.0\n")
    monkeypatch.setattr(module, "ROOT", root)
    return module


@pytest.fixture
def asked(tool, monkeypatch) -> Asked:
    record = Asked()
    monkeypatch.setattr(tool.subprocess, "run", record)
    return record


class Asked(list[str]):
    """Stands in for ``subprocess.run``: one line a call; a line that holds ``refused`` fails."""

    refused: str | None = None

    def __call__(self, command, **_: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(word for word in command[1:] if word != "--quiet")
        if " -r " in f" {line} ":
            line += " with " + Path(command[-1]).read_text()
        self.append(line)
        if "-m venv" in line:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        failed = self.refused is not None and self.refused in line
        return subprocess.CompletedProcess(command, int(failed), stdout=json.dumps(REQUIREMENTS))

    def about(self, word: str) -> list[str]:
        return [line for line in self if word in line]


def refresh(tool: ModuleType, folder: Path, engine: str = "cpu") -> None:
    tool.Environment(folder, engine).refresh()


def test_a_second_run_does_nothing(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env")
    asked.clear()
    refresh(tool, tmp_path / "env")
    assert asked == []


def test_a_changed_project_is_installed_again_in_the_same_environment(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env")
    asked.clear()
    (tool.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'")
    refresh(tool, tmp_path / "env")
    assert asked.about("[dev]")
    assert not asked.about("-m venv")


def test_another_engine_starts_anew(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env")
    (tmp_path / "env" / "old").touch()
    refresh(tool, tmp_path / "env", "gpu")
    assert not (tmp_path / "env" / "old").exists()
    assert asked.about(f" vllm=={tool.VLLM_VERSION}")


def test_torch_s_own_index_is_asked_only_where_the_default_one_has_no_cpu_build(tool, asked, tmp_path):
    refresh(tool, tmp_path / "one")
    assert not asked.about(tool.CPU_WHEELS)
    asked.refused = f"install torch=={tool.TORCH_VERSION}+cpu"
    refresh(tool, tmp_path / "two")
    (line,) = asked.about(tool.CPU_WHEELS)
    assert line.endswith(f"torch=={tool.TORCH_VERSION}+cpu")


def test_builds_that_do_not_fit_are_never_asked_for_and_removed_if_present(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env")
    (line,) = asked.about(" -r ")
    assert "msgspec" in line
    assert not [word for word in tool.UNFIT if word in line.lower()]
    (line,) = asked.about("uninstall")
    assert all(word in line for word in tool.UNFIT)


def test_nothing_is_called_done_after_a_failure_and_the_next_run_goes_on(tool, asked, tmp_path):
    asked.refused = "[dev]"
    with pytest.raises(tool.SetupError, match="failed"):
        refresh(tool, tmp_path / "env")
    asked.refused = None
    asked.clear()
    refresh(tool, tmp_path / "env")
    assert asked.about("[dev]")


def test_a_machine_without_venv_is_told_what_to_install(tool, asked, tmp_path, capsys):
    asked.refused = "-m venv"
    status = tool.main(["--venv", str(tmp_path / "env"), "--engine", "cpu"])
    assert status == 1
    assert "python3-venv" in capsys.readouterr().err
    assert not (tmp_path / "env").exists()


def test_sglang_comes_without_the_packages_that_it_asks_for_itself(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env", "sglang")
    (line,) = asked.about(f"sglang=={tool.SGLANG_VERSION}")
    assert "--no-deps" in line
    (line,) = asked.about(" -r ")
    assert "--no-deps" in line
    assert "msgspec==0.22.0" in line
    assert asked.about(str(tool.REFERENCE_PLATFORM))
    assert asked.about("[dev]")
    assert not asked.about("vllm")


def test_a_changed_pin_is_installed_again_in_the_same_environment(tool, asked, tmp_path):
    refresh(tool, tmp_path / "env", "sglang")
    asked.clear()
    (tool.ROOT / tool.SGLANG_REQUIREMENTS).write_text("msgspec==0.23.0\n")
    refresh(tool, tmp_path / "env", "sglang")
    assert asked.about("with msgspec==0.23.0")
    assert not asked.about("-m venv")


@pytest.mark.parametrize(
    ("output", "code", "engine"), [("GPU 0: H200", 0, "gpu"), ("", 0, "cpu"), ("GPU 0: H200", 9, "cpu")]
)
def test_a_gpu_counts_when_its_driver_answers(tool, monkeypatch, output, code, engine):
    monkeypatch.setattr(tool.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], code, stdout=output)
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: answer)
    assert tool.choose_engine() == engine
    monkeypatch.setattr(tool.shutil, "which", lambda _: None)
    assert tool.choose_engine() == "cpu"
