"""The bench of sparse decode on a GPU: refusal without one, and its rig in small through the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from penstock.benchmarks.sparse import bench
from penstock.benchmarks.sparse_device import Case, Stand, claims
from penstock.benchmarks.sparse_keys import made_up


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused():
    result = CliRunner().invoke(bench, ["--device", "cuda"])
    assert result.exit_code == 2
    assert "given cuda, but torch" in result.output
    assert "no CUDA device" in result.output


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this run")
def test_every_way_to_attend_is_the_same_attention():
    layer = made_up("peaky", seed=1, tokens=300, steps=1, heads=1, group=2, size=64)
    stand = Stand(Case(2, 300, dtype=torch.float32), layer, torch.device("cpu"))
    row = stand.row(copying=1e9)
    assert 0 < row["pages read"] <= 1
    assert row["attained"] == 1
    dense = {name: call().flatten() for name, call in stand.dense().items()}
    torch.testing.assert_close(dense["torch"], dense["all pages"], rtol=1e-4, atol=1e-5)
    assert stand.read_bytes() == int(stand.step.reads.lengths.sum()) * 2 * 64 * 4
    assert len(list(claims([row]))) == 3
