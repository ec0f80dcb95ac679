"""What NIXL finds on this machine, printed as one JSON line. Runs as a process of its own.

Starting UCX can hang or crash on a machine with a broken fabric; whoever asks runs
``python -m penstock.plugins.transport_probe`` with a time limit and lives on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

UCP_FEATURE_RMA = 1 << 1
UCP_PARAM_FIELD_FEATURES = 1 << 0
UCP_PARAMS_BYTES = 512
"""Larger than ``ucp_params_t`` of any release: fields that the mask leaves out are not read."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe saw."""

    plugins: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    """Plugins that could be started."""
    ucx_version: str = ""
    ucx_devices: tuple[str, ...] = ()
    error: str = ""


def probe(wanted: tuple[str, ...] = ("UCX",)) -> Findings:
    """Load NIXL, start the wanted backends and ask UCX for its devices."""
    try:
        # By name: the product knows NIXL in one file, and this process is none of the product's.
        api = importlib.import_module("nixl._api")
    except ImportError as missing:
        return Findings(error=str(missing))
    agent = api.nixl_agent("penstock-doctor", api.nixl_agent_config(backends=[]))
    plugins = tuple(agent.get_plugin_list())
    started, error = _start(agent, [name for name in wanted if name in plugins])
    version, devices = _ucx() if "UCX" in started else ("", ())
    return Findings(
        plugins=plugins, backends=tuple(started), ucx_version=version, ucx_devices=devices, error=error
    )


def _start(agent: Any, names: list[str]) -> tuple[list[str], str]:
    failed = importlib.import_module("nixl._bindings").nixlBackendError
    started: list[str] = []
    for name in names:
        try:
            agent.create_backend(name)
        except failed as error:
            return started, f"{name}: {error}"
        started.append(name)
    return started, ""


def _ucx() -> tuple[str, tuple[str, ...]]:
    """Version and ``transport/device`` names, from the very library that NIXL has loaded."""
    library = _loaded("libucp")
    if library is None:
        return "", ()
    ucp = ctypes.CDLL(library)
    numbers = [ctypes.c_uint() for _ in range(3)]
    ucp.ucp_get_version(*map(ctypes.byref, numbers))
    major, minor, release = (number.value for number in numbers)
    text = _context_info(ucp, major, minor)
    devices = re.findall(r"resource\s+\d+\s+:.*--\s+(\S+)", text)
    return f"{major}.{minor}.{release}", tuple(devices)


def _loaded(name: str) -> str | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line)
    return next((path for path in paths if Path(path).name.startswith(name)), None)


def _context_info(ucp: ctypes.CDLL, major: int, minor: int) -> str:
    params = ctypes.create_string_buffer(UCP_PARAMS_BYTES)
    masks = (ctypes.c_uint64 * 2).from_buffer(params)
    masks[0], masks[1] = UCP_PARAM_FIELD_FEATURES, UCP_FEATURE_RMA
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    if ucp.ucp_config_read(None, None, ctypes.byref(config)) != 0:
        return ""
    if ucp.ucp_init_version(major, minor, params, config, ctypes.byref(context)) != 0:
        return ""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    with tempfile.TemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
        ucp.ucp_context_print_info(context, stream)
        libc.fclose(stream)
        file.seek(0)
        return file.read().decode(errors="replace")


def main() -> None:
    """Print the findings; everything that the libraries say goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        findings = probe(tuple(sys.argv[1:]) or ("UCX",))
    sys.stdout.write(msgspec.json.encode(findings).decode() + "\n")


if __name__ == "__main__":
    main()
