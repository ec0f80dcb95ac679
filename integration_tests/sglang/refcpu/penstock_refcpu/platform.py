"""What SGLang is told about the device. Imported by SGLang alone, once it has chosen this platform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class ReferenceCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU that can do nothing special, so that SGLang takes its torch-native path everywhere.

    As an in-tree CPU it would ask for kernels that no package offers; as one from outside it does not.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return True

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from penstock_refcpu.speculation import extend_cache_locs

        return extend_cache_locs

    def init_backend(self) -> None:
        # The modules that they touch ask for the platform when they are imported.
        from penstock_refcpu import adapters, speculation

        speculation.install()
        adapters.install()
