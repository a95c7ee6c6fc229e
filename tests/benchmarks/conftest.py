"""Runs a benchmark as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {
    "name",
    "peer",
    "precision",
    "device",
    "rate",
    "peer_rate",
    "ratio",
    "peak_mib",
    "peer_peak_mib",
}


@pytest.fixture
def run_benchmark(tmp_path):
    """run_benchmark(name, *options): the rows that `python -m benchmarks.<name>` writes, which have
    the keys that readers expect."""

    def run(name: str, *options: str) -> list[dict]:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", *options]
        done = subprocess.run(
            [*command, "--json", str(tmp_path / "rows.json")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert all(r.keys() >= KEYS for r in rows)
        return rows

    return run
