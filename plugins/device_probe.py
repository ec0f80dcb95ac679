"""Which kernel would do sparse decode here, printed as JSON: asked in a process of its own, since it imports
torch."""

from __future__ import annotations

import sys

import msgspec

from penstock.kernels.decode_paths import Choice, Device, Task, choose_path, device_here


class Decode(msgspec.Struct, frozen=True):
    """The GPU of this machine, or None, and the choice for a layer in the shape of Llama 3.1 8B."""

    device: Device | None
    choice: Choice


def main() -> None:
    """Look, and print."""
    device = device_here()
    sys.stdout.buffer.write(msgspec.json.encode(Decode(device, choose_path(device, Task()))))


if __name__ == "__main__":
    main()
