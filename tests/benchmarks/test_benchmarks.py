"""The benchmarks run on a tiny model, and what they write has the keys that readers of it
expect."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.turns import append_csv, row

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "encode"])
def test_a_benchmark_runs_both_sides(name, tiny_base, tmp_path):
    """One round against the real peer: a worker that dies, or a rate of the wrong thing, shows."""
    size = (
        ["--pairs", "32", "--batch", "8"] if name == "step" else ["--texts", "24", "--passes", "2"]
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--base",
            str(tiny_base),
            "--precision",
            "fp32",
            "--length",
            "32",
            "--rounds",
            "1",
            "--device",
            "cpu",
            *size,
            "--json",
            str(tmp_path / "rows.json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "rows.json").read_text())
    assert found.keys() >= KEYS
    assert found["rate"] > 0 and found["peer_rate"] > 0 and found["peak_mib"] > 50
    assert found["ratio"] == pytest.approx(found["rate"] / found["peer_rate"], rel=0.01)


def test_ratio_is_the_median_of_the_rounds():
    """A slow minute meets both sides of its round: ratios first, then the median."""
    ours = [{"rate": r, "peak_mib": 1, "device": "cpu"} for r in (10.0, 2.0, 8.0)]
    peer = [{"rate": r, "peak_mib": 2, "device": "cpu"} for r in (5.0, 1.0, 2.0)]
    found = row("x", "peer", "fp32", {"rook": ours, "peer": peer})
    assert found["ratio"] == 2.0 and found["ratio_max"] == 4.0


def test_csv_keeps_old_rows_when_a_column_is_new(tmp_path):
    """Measurements are appended for years; a new column must not shift the old ones."""
    path = tmp_path / "rows.csv"
    append_csv(path, [{"a": 1, "b": 2}])
    append_csv(path, [{"a": 3, "c": "4,5"}])
    assert list(csv.DictReader(path.open())) == [
        {"a": "1", "b": "2", "c": ""},
        {"a": "3", "b": "", "c": "4,5"},
    ]
