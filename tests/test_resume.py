"""Real processes, killed and resumed: the end must not show it."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime import checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 24


RETRIEVER = (
    "model.max_query_length=32", "model.max_passage_length=32", "loss.learn_temperature=true",
)  # fmt: skip
WORKS = {
    "retriever": RETRIEVER,
    "mined anew": (
        *RETRIEVER, "mine_every=5", "mine.fraction=null", "mine.near_duplicate=null",
    ),
    "reranker": (
        "task=rerank", "loss=softmax", "data.random_negatives=3", "model.max_pair_length=48",
        "best_metric=mrr",
    ),
}  # fmt: skip


def command(tiny_base: Path, name: str, *more: str, work: str = "retriever") -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "+experiment=toy",
        "model=custom",
        f"model.base={tiny_base}",
        *WORKS[work],
        f"optim.steps={STEPS}",
        "optim.batch_size=16",
        "model.dropout=0.2",
        "log_every=1",
        "save_every=3",
        "eval_every=8",
        "runtime.threads=1",
        "runtime.precision=fp32",
        "wandb=disabled",
        f"name={name}",
        *more,
    ]


def run_dir(folder: Path, name: str) -> Path:
    (found,) = (folder / "runs" / name).glob("*/seed0")
    return found


def outcome(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """(final weights, loss and optimiser state; metrics without what depends on the clock)."""
    run = run_dir(folder, name)
    state = torch.load(run / "checkpoints" / f"step_{STEPS:08d}" / "state.pt", weights_only=True)
    assert state["progress"].pop("clock")["examples"] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in row.items() if not k.startswith("time.")} for row in rows]


def assert_same(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_a_run_killed_at_random_points_ends_bit_for_bit_the_same(work, tiny_base, tmp_path):
    """SIGKILL asks nobody: a checkpoint half-written, a metrics row half-written, a best link not
    yet moved. Mined negatives must be those of the weights that are gone."""
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    subprocess.run(
        command(tiny_base, "whole", work=work),
        cwd=tmp_path, check=True, capture_output=True, env=env,
    )  # fmt: skip
    rng = random.Random(0)
    kills = resumed = 0
    for attempt in range(40):
        args = command(tiny_base, "killed", *(["resume=true"] if attempt else []), work=work)
        process = subprocess.Popen(
            args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
        )
        if kills < 4:
            _kill_when_training(process, tmp_path, rng, mid_checkpoint=kills % 2 == 1)
            kills += process.returncode == -signal.SIGKILL
        else:
            process.wait()
        resumed += attempt > 0
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read().decode()
    assert kills >= 3 and resumed >= 3
    (state, rows), (whole_state, whole_rows) = (
        outcome(tmp_path, "killed"),
        outcome(tmp_path, "whole"),
    )
    assert_same(state, whole_state)
    assert rows == whole_rows
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
    mined = [file.name for file in sorted(run_dir(tmp_path, "killed").glob("mined/*"))]
    due = range(5, STEPS, 5) if work == "mined anew" else ()
    assert mined == [f"step_{step:08d}.npy" for step in due]


def _kill_when_training(
    process: subprocess.Popen, folder: Path, rng: random.Random, *, mid_checkpoint: bool
) -> None:
    """SIGKILL at a random moment after some new row, or while a checkpoint's temporary folder is
    there."""

    def rows() -> int:
        files = list((folder / "runs").glob("killed/*/seed0/metrics.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else 0

    before, wanted = rows(), rng.randint(1, 5)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if mid_checkpoint:
            ready = any((folder / "runs").glob("killed/*/seed0/checkpoints/.step_*"))
        else:
            ready = rows() >= before + wanted
        if ready:
            time.sleep(0 if mid_checkpoint else rng.random() * 0.02)
            process.kill()
            break
        time.sleep(0.0005)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, tiny_base, tmp_path):
    """A cluster's SIGTERM and a user's Ctrl-C must lose nothing, and the message must be enough to
    continue."""
    args = command(tiny_base, "stopped", "optim.steps=100000", "save_every=0", "eval_every=0")
    process = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list((tmp_path / "runs").glob("stopped/*/seed0/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode not in (0, -number), output
    assert "resume=true" in output and "saved at step" in output
    assert "Traceback" not in output
    assert list((run_dir(tmp_path, "stopped") / "checkpoints").glob("step_*/state.pt"))


@pytest.mark.parametrize("size", [4, 500, 14_950])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(size, tmp_path):
    """torch.save speaks of positions in a file instead, and the half-written one takes the rest of
    the disk."""
    model, loss_fn = torch.nn.Linear(2 * size, 1), torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = {"best_value": None, "best_step": None, "bad_evaluations": 0}
    state = (model, loss_fn, optimizer, progress)
    checkpoint.save(tmp_path, 2, *state, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * size, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            checkpoint.save(tmp_path, 4, *state, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"checkpoint of step 4 cannot be written to {tmp_path / 'checkpoints' / 'step_00000004'}"
        " (File too large); free space and go on with resume=true; last good: step_00000002"
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert checkpoint.save(tmp_path, 4, *state, keep=2).is_dir()
