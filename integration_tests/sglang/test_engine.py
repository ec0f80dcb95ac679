"""``sglang.Engine`` takes no options of plugins: ``PENSTOCK_CONFIG`` asks for a policy there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROMPT = list(range(20, 60))
TOKENS = 6

# SGLang starts its processes anew, and they import the program.
PROGRAM = """
import json, sys

def main():
    from sglang import Engine
    engine = Engine(
        model_path=sys.argv[1], device="cpu", dtype="float32", max_total_tokens=4000, sleep_on_idle=True,
        log_level="info",
    )
    def ask(client):
        sampling = {"temperature": 0, "max_new_tokens": %d, "ignore_eos": True}
        sampling["custom_params"] = {"client_id": client}
        return engine.generate(input_ids=%r, sampling_params=sampling)
    try:
        ask(5)
    except ValueError as error:
        refused = str(error)
    print(json.dumps({"ids": ask("alice")["output_ids"], "refused": refused}))
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def test_a_program_asks_by_the_variable(model: str, greedy, tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM % (TOKENS, PROMPT))
    done = subprocess.run(
        [sys.executable, str(program), model],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PENSTOCK_CONFIG": '{"scheduler": {"policy": "vtc"}}'},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == greedy(PROMPT, TOKENS)
    assert "client_id: given 5" in found["refused"]
    assert "penstock: waiting requests are ordered by vtc" in done.stdout + done.stderr
