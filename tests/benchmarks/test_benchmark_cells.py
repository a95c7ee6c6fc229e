"""One bad side must not end the run: on a lent device there is no second one."""

import sys

import pytest

from benchmarks import infonce_cells
from benchmarks.infonce_cells import Cell, run_cells
from benchmarks.infonce_sides import Case

BAD_SIDES = """
import os, sys, time
import torch
from benchmarks import infonce_cells
from benchmarks.infonce_sides import SIDES, Side

def fails(*given):
    raise RuntimeError("no kernel for\\n this shape")

def is_full(*given):
    torch.empty(1)
    raise torch.OutOfMemoryError("tried to allocate")

infonce_cells.Bench._memory_gib = lambda bench: 139.0
for name, compute in {"fails": fails, "dies": lambda *_: os._exit(7), "is_full": is_full,
                      "hangs": lambda *_: time.sleep(600)}.items():
    SIDES[name] = Side(compute)
infonce_cells.work()
"""
CASE = Case("one-sided", "fp32", 48, 64, 16)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(BAD_SIDES)
    monkeypatch.setattr(infonce_cells, "WORKER", (sys.executable, str(path)))
    monkeypatch.setenv("PYTHONPATH", str(infonce_cells.ROOT))


@pytest.mark.slow
def test_a_side_that_fails_dies_or_hangs_has_a_row_and_the_next_is_measured(worker):
    """Each in its own way takes the process along, or not; its neighbours keep their numbers and
    nobody gets the blame of another."""
    sides = ["dense", "fails", "is_full", "dense", "dies", "dense", "hangs", "dense"]
    seen = []
    found = run_cells(
        [Cell(CASE, side) for side in sides],
        device="cpu",
        cell_limit_s=4,
        report=lambda cell, answer: seen.append(cell.side),
    )
    assert seen == sides
    notes = dict(zip(sides, (f["note"] for f in found), strict=True))
    assert notes["fails"] == "RuntimeError: no kernel for this shape"
    assert notes["is_full"] == "out of memory (139 GiB)"
    assert notes["dies"].startswith("process ended with 7")
    assert notes["hangs"] == "over 4 s"
    for side, answer in zip(sides, found, strict=True):
        assert ("ms" in answer) == (side == "dense")
        if side == "dense":
            assert answer["p20_ms"] <= answer["ms"] <= answer["p80_ms"]
            assert answer["gradient_error"] < 1e-5 and answer["calls"] >= 1


def test_what_does_not_begin_in_time_says_so():
    """A part of the run has its seconds; the rest is named, not forgotten."""
    found = run_cells([Cell(CASE, "dense")] * 2, device="cpu", limit_s=0)
    assert found == [{"note": "not run: no time left"}] * 2
