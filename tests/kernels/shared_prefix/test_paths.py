"""Which kernel a device gets for shared prefixes."""

from __future__ import annotations

import pytest

from penstock.kernels.decode_paths import Device
from penstock.kernels.shared_prefix.paths import choose_prefix_path


def test_a_cpu_has_the_compiled_kernel_where_numba_is():
    assert choose_prefix_path(None, numba=True).path == "compiled"
    missing = choose_prefix_path(None, numba=False)
    assert missing.path is None
    assert "Numba" in missing.reason


@pytest.mark.parametrize(("flashinfer", "reason"), [("", "not installed"), ("0.7.2", "no backend")])
def test_a_gpu_has_none_and_each_way_is_refused_with_its_reason(flashinfer, reason):
    device = Device(name="H200", capability=(9, 0), triton=True, flashinfer=flashinfer)
    found = choose_prefix_path(device, numba=True)
    assert found.path is None
    assert set(found.refused) == {"compiled", "flashinfer-cascade", "triton"}
    assert reason in found.refused["flashinfer-cascade"]
