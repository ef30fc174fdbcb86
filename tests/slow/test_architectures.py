# SPDX-License-Identifier: Apache-2.0
"""Every causal model class of transformers that builds small, under our adapters and under PEFT's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_more_classes_pass_than_with_peft(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/architectures.py", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    counts, results = found["counts"], found["results"]
    assert counts["ours"] > counts["peft"]
    assert counts["built"] > 0.9 * counts["classes"]
    worse = {n: r["ours"] for n, r in results.items() if "build" not in r and r["ours"] and not r["peft"]}
    assert worse == {}
    known = ("has no gradient", "has a gradient of zero")  # the model's own doing: no loss reaches the layer
    assert [r["ours"] for r in results.values() if r.get("ours") and not r["ours"].endswith(known)] == []
