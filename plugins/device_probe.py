"""Which kernels would do sparse decode here, and read shared prefixes once; printed as JSON.

Asked in a process of its own, since it imports torch.
"""

from __future__ import annotations

import sys

import msgspec

from penstock.kernels import decode_paths
from penstock.kernels.decode_paths import Device, Task, choose_path, device_here
from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.shared_prefix import paths
from penstock.kernels.shared_prefix.paths import choose_prefix_path


class Decode(msgspec.Struct, frozen=True):
    """The GPU of this machine, or None, and the choices for a layer in the shape of Llama 3.1 8B."""

    device: Device | None
    choice: decode_paths.Choice
    prefix: paths.Choice


def main() -> None:
    """Look, and print."""
    device = device_here()
    found = Decode(device, choose_path(device, Task()), choose_prefix_path(device, numba=HAS_NUMBA))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
