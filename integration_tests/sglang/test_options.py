"""Our options on SGLang's own parser: what ``--help`` lists, and what a ``--config`` file may say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARSE = """
import contextlib, io, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
listed = io.StringIO()
with contextlib.redirect_stdout(listed), contextlib.suppress(SystemExit):
    prepare_server_args(["--help"])
settings = prepare_server_args(["--config", sys.argv[1]])
settings.resolve_once()
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
algorithm = SpeculativeAlgorithm.from_string(settings.resolved_dict()["speculative_algorithm"])
print(json.dumps({
    "help": listed.getvalue(),
    "algorithm": type(algorithm).__name__,
    "settings": {k: v for k, v in settings.resolved_dict().items() if k.startswith("speculative_")},
    "children": os.environ["PENSTOCK_CONFIG"],
}))
"""


@pytest.fixture(scope="module")
def parsed(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process makes of ``--help`` and of a file that asks for SUFFIX."""
    file: Path = tmp_path_factory.mktemp("config") / "serve.yaml"
    file.write_text(
        f"model-path: {model}\n"
        "device: cpu\n"
        "speculative-algorithm: suffix\n"
        "speculative-num-draft-tokens: 6\n"
        """penstock-config: '{"suffix": {"shared_tokens": 1000}}'\n""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "option",
    ["--penstock-config JSON|FILE", "SUFFIX (drafts", "dlpm (fair", "flowkv (few", "tactic (decodes"],
)
def test_help_lists_our_option_and_our_values(parsed, option):
    assert option in parsed["help"]


def test_a_file_asks_for_suffix_as_flags_do(parsed):
    assert parsed["algorithm"] == "SuffixAlgorithm"
    assert parsed["settings"]["speculative_num_draft_tokens"] == 6
    assert parsed["settings"]["speculative_eagle_topk"] == 4, "as none were given"
    assert json.loads(parsed["children"]) == {"suffix": {"shared_tokens": 1000}}
