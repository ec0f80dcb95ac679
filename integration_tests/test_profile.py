"""``penstock profile`` on the tiny model: a real engine's steps become a prior that a scheduler takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from penstock.benchmarks.servers import console_script
from penstock.plugins.configuration import scheduler_config
from penstock.schedulers.slo.profiles import find_profile
from penstock.simulation.step_time import Load, load_step_time

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8")


def profile(model: str, output: Path, minutes: float, *more: str) -> subprocess.CompletedProcess[str]:
    command = [console_script("penstock"), "profile", "--model", model, "--minutes", str(minutes)]
    return subprocess.run(
        [*command, "--output", str(output), "--", *ARGUMENTS, *more],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_few_seconds_of_a_real_engine_become_a_prior(model, tmp_path):
    output = tmp_path / "tiny.json"
    done = profile(model, output, 0.2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error P90" in done.stdout
    found = find_profile(str(output))
    assert Path(model).name in found.source
    # A prompt of a thousand tokens takes longer than a token does, on any machine.
    step = load_step_time(str(output))
    assert 0 < step(Load(0, 1, 1, 64)) < step(Load(1000, 1, 2, 64)) < 600
    section = {"penstock": {"scheduler": {"policy": "slo", "slo": {"profile": str(output)}}}}
    assert scheduler_config(section).slo.profile == str(output)


def test_a_scheduler_among_the_arguments_is_refused(model, tmp_path):
    scheduler = ("--scheduler-cls", "penstock.plugins.vllm.request_scheduler.make_scheduler")
    done = profile(model, tmp_path / "tiny.json", 0.2, *scheduler)
    assert done.returncode == 1
    assert "a scheduler is given among the engine's arguments" in done.stderr
    assert not (tmp_path / "tiny.json").exists()
