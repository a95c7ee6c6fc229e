"""torchrun with two processes: what errors and signals look like."""

import signal
import subprocess
import sys
import time

import pytest

from tests.test_torchrun import ENV, ROOT, TORCHRUN, command, run_dir

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import torch
from conf.cli import main
from conf.schema import TrainConfig
from runtime.distributed import init_ranks

def fail(text):
    raise ValueError(text)

def job(c, run_dir):
    ranks = init_ranks("cpu")
    if c.name == "everywhere":
        with ranks.together():
            fail("all of them")
    if c.name == "main":
        ranks.on_main(fail, "the main one")
    if c.name == "alone" and ranks.rank == 1:
        fail("one alone")
    total = ranks.all_reduce_sum(torch.ones(1)).item()
    (run_dir / f"rank{{ranks.rank}}.txt").write_text(str(total))

main(TrainConfig, "train", job)
"""


@pytest.mark.slow
def test_failures_are_said_once_and_leave_nobody_waiting(tmp_path):
    """In a sweep, what fails on all ranks ends one run and the next begins. What fails on one rank
    alone cannot be told to the others, who wait for it in a collective: all end."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    names = "everywhere,main,good,alone,never"
    args = [sys.executable, *TORCHRUN, str(program), "-m", "data=toy", f"name={names}"]
    done = subprocess.run(args, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=120)  # fmt: skip
    output = done.stdout
    assert done.returncode != 0
    for said in ("rank 0: all of them\n", "rank 0: the main one\n", "rank 1: one alone\n"):
        assert output.count(said) == 1, output
    for once in ("all of them", "the main one", "one alone"):
        assert output.count(once) == 1, output
    folders = {name: next((tmp_path / "runs").glob(f"{name}/*/seed0"), None)
               for name in names.split(",")}  # fmt: skip
    assert [(folders["good"] / f"rank{r}.txt").read_text() for r in (0, 1)] == ["2.0", "2.0"]
    for name, text in (("everywhere", "all of them"), ("alone", "one alone")):
        assert (folders[name] / "error.txt").read_text().startswith(text)
    assert folders["never"] is None


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_says_how_to_go_on(tiny_base, tmp_path):
    """What a cluster sends: every rank must stop after the same step, or one waits for ever."""
    args = command(tiny_base, "stopped", "optim.steps=100000", "save_every=0", "eval_every=0")
    process = subprocess.Popen(
        args, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list((tmp_path / "runs").glob("stopped/*/seed0/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=90)[0].decode()
    assert process.returncode != 0
    assert output.count("resume=true") == 1 and output.count("saved at step") == 1, output
    assert list((run_dir(tmp_path, "stopped") / "checkpoints").glob("step_*/state.pt"))
