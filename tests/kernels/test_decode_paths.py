"""The table of decode paths: what is taken, and what each refusal says."""

from __future__ import annotations

import msgspec
import pytest

from penstock.kernels.decode_paths import Device, Task, choose_path

HOPPER = Device(name="H200", capability=(9, 0), triton=True, flashinfer="0.7.2")
BARE = msgspec.structs.replace(HOPPER, flashinfer="")
AMPERE = msgspec.structs.replace(HOPPER, name="A100", capability=(8, 0))
OLD = msgspec.structs.replace(HOPPER, name="V100", capability=(7, 0))
PLAIN = Task(estimated=False)


@pytest.mark.parametrize(
    ("device", "task", "path"),
    [
        (HOPPER, Task(), "triton"),
        (HOPPER, PLAIN, "xqa"),
        (BARE, PLAIN, "triton"),
        (AMPERE, PLAIN, "triton"),
        (HOPPER, Task(estimated=False, page_tokens=48), "triton"),
        (HOPPER, Task(estimated=False, head_size=72), "triton"),
        (HOPPER, Task(estimated=False, dtype="float32"), "triton"),
        (HOPPER, Task(estimated=False, dtype="float8_e4m3fn"), None),
        (HOPPER, Task(head_size=512), None),
        (OLD, Task(), None),
        (OLD, PLAIN, None),
    ],
)
def test_the_path_that_is_taken(device, task, path):
    assert choose_path(device, task).path == path


def test_what_the_host_plans_is_taken_only_outside_of_steps():
    without = msgspec.structs.replace(AMPERE, triton=False)
    outside = Task(captured=False)
    assert choose_path(without, outside).path == "variable-block-sparse"
    assert choose_path(without, Task(captured=False, per_head=False)).path == "block-sparse"
    refused = choose_path(without, Task()).refused
    assert refused["triton"] == "Triton is not installed"
    assert (
        refused["block-sparse"]
        == "its plan waits for the host in every layer and step; one mask for all KV heads"
    )


def test_refusals_say_what_was_given_and_what_is_allowed():
    refused = choose_path(OLD, Task(head_size=300, page_tokens=256)).refused
    assert "compute capability 7.0, needed: 8.0" in refused["triton"]
    assert "head size 300, allowed: 16 to 256" in refused["triton"]
    assert "pages of 256 tokens, allowed: at most 128" in refused["triton"]
    assert "compute capability 7.0, allowed: 9, 10 and 12" in refused["xqa"]
    assert "no log-sum-exp" in choose_path(HOPPER, Task()).refused["xqa"]


def test_without_a_gpu_the_engine_keeps_its_kernel():
    choice = choose_path(None, Task())
    assert choice.path is None
    assert "no CUDA device" in choice.reason
