"""torchrun with two processes: the run of one process, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STEPS = 12
ENV = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(tiny_base: Path, name: str, *more: str, launcher: tuple[str, ...] = TORCHRUN) -> list:
    settings = [
        "+experiment=toy", "model=custom", f"model.base={tiny_base}", "model.max_query_length=32",
        "model.max_passage_length=32", "model.dropout=0", "loss.learn_temperature=true",
        "loss.symmetric=0.3", "model.projection.init=shared", f"optim.steps={STEPS}",
        "optim.batch_size=16", "log_every=1", "save_every=3", "eval_every=6", "examples_shown=0",
        "runtime.threads=1",
        "runtime.precision=fp32", "runtime.chunk_tokens=100", "runtime.activation_budget_mib=0.5",
        "wandb=disabled", f"name={name}",
    ]  # fmt: skip
    return [sys.executable, *launcher, str(ROOT / "train.py"), *settings, *more]


def run(folder: Path, args: list) -> str:
    done = subprocess.run(args, cwd=folder, env=ENV, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_dir(folder: Path, name: str) -> Path:
    (found,) = (folder / "runs" / name).glob("*/seed0")
    return found


def outcome(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """(last checkpoint, metrics without what depends on the clock)."""
    path = run_dir(folder, name)
    state = torch.load(path / "checkpoints" / f"step_{STEPS:08d}" / "state.pt", weights_only=True)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in r.items() if not k.startswith("time.")} for r in rows]


@pytest.fixture(scope="module")
def two(tiny_base, tmp_path_factory) -> Path:
    """A folder that holds the finished run `two`, made by two processes from nothing: they build
    the same token cache at the same moment."""
    folder = tmp_path_factory.mktemp("torchrun")
    output = run(folder, command(tiny_base, "two"))
    assert output.count("computing on cpu in fp32") == 1  # rank 0 alone speaks
    assert output.count("nDCG@10 on test") == 1
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(two, tiny_base):
    """Same loss curve, gradient norms, evaluation and weights, up to float32 rounding: everything
    that a rank could do by itself (its share of a mean, of the clipping, of early decisions)."""
    run(two, command(tiny_base, "one", launcher=()))
    (state, rows), (state_1, rows_1) = outcome(two, "two"), outcome(two, "one")
    assert [r["step"] for r in rows] == [r["step"] for r in rows_1]
    for row, row_1 in zip(rows, rows_1, strict=True):
        assert row.keys() == row_1.keys()
        for name in row.keys() - {"replayed_share"}:
            # AdamW's first steps divide a rounded gradient by itself: more than rounding, far less
            # than a wrong mean
            assert row[name] == pytest.approx(row_1[name], rel=1e-4, abs=1e-6), name
        assert "loss" not in row or 0 < row["replayed_share"] < 1
    for name, weight in state["towers"].items():
        torch.testing.assert_close(weight, state_1["towers"][name], rtol=1e-3, atol=2e-5, msg=name)
    result = json.loads((run_dir(two, "two") / "result.json").read_text())
    shares = [r["replayed_share"] for r in rows if "loss" in r]
    assert result["replayed_share"] == pytest.approx(sum(shares) / len(shares))


@pytest.mark.slow
def test_a_killed_run_of_two_resumes_bit_for_bit(two, tiny_base):
    """SIGKILL to one rank: torchrun ends the other, a checkpoint may be half-written. Rank 1 has no
    state of its own: what it needs comes from rank 0's checkpoint."""
    process = subprocess.Popen(command(tiny_base, "killed"), cwd=two, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list((two / "runs").glob("killed/*/seed0/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.002)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode != 0, output
    assert not (run_dir(two, "killed") / "result.json").exists()
    run(two, command(tiny_base, "killed", "resume=true"))
    (state, rows), (whole_state, whole_rows) = outcome(two, "killed"), outcome(two, "two")
    assert rows == whole_rows
    assert all(torch.equal(w, whole_state["towers"][n]) for n, w in state["towers"].items())
    for i, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, whole_state["optimizer"]["state"][i][name])
