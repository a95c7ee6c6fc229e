"""metrics.jsonl is exact and always there; W&B may fail in any way."""

import json
import logging
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from conf.schema import TrainConfig, WandbConfig
from runtime import track
from runtime.track import Tracker, close_open_trackers, read_rows

ROOT = Path(__file__).resolve().parents[2]
OFF = WandbConfig(mode="disabled")


class FakeRun:
    def __init__(self, **kwargs):
        self.kwargs, self.rows, self.summary, self.exit_code, self.url = kwargs, [], {}, None, "url"

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self, exit_code=0):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: no service, no files, every call recorded."""
    fake = types.ModuleType("wandb")
    fake.runs = []
    fake.Settings = lambda **kwargs: kwargs
    fake.Image = lambda path: ("image", path)
    fake.Table = lambda columns, data: ("table", columns, data)
    fake.login = lambda **kwargs: True

    def init(**kwargs):
        fake.runs.append(FakeRun(**kwargs))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_rows_are_json_objects_in_order_with_clock_values_under_time(tmp_path):
    t = Tracker(OFF, tmp_path)
    t.log(1, loss=np.float32(0.5), n=np.int64(3), **{"ndcg@10": 0.25, "time.pairs_per_s": 9.0})
    t(2, loss=float("nan"), part=[1, np.float64(2.5)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    clock = [row.pop("time.elapsed_s") for row in rows]
    assert rows == [
        {"step": 1, "loss": 0.5, "n": 3, "ndcg@10": 0.25, "time.pairs_per_s": 9.0},
        {"step": 2, "loss": None, "part": [1, 2.5]},
    ]
    assert 0 <= clock[0] <= clock[1]
    t.finish()


@pytest.mark.slow
def test_torch_scalars_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    t = Tracker(OFF, tmp_path)
    t.log(1, loss=torch.tensor(0.5, requires_grad=True))
    t.close()
    assert read_rows(t.path)[0]["loss"] == 0.5


def test_two_runs_differ_under_time_alone(tmp_path):
    """Resumed and uninterrupted runs are compared byte for byte after dropping `time.*`."""
    lines = []
    for name in "ab":
        (tmp_path / name).mkdir()
        t = Tracker(OFF, tmp_path / name)
        for step in range(5):
            t.log(step, loss=1 / 3 / (step + 1), lr=1e-5)
        t.close()
        rows = read_rows(t.path)
        lines.append(
            [json.dumps({k: v for k, v in r.items() if not k.startswith("time.")}) for r in rows]
        )
    assert lines[0] == lines[1]


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 9}', "\x00\x00\x00", "[1]\n"])
def test_truncate_cuts_rows_past_the_checkpoint_and_a_half_written_tail(tmp_path, tail):
    """A kill leaves rows that the checkpoint does not know, and perhaps half a line."""
    whole = '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.30000000000000004}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "loss": 7}\n' + tail)
    t = Tracker(OFF, tmp_path)
    t.truncate(2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole, "kept rows keep every byte"
    t.log(3, loss=1)
    t.close()
    assert [row["step"] for row in read_rows(t.path)] == [1, 2, 3]


def test_rows_survive_sigkill(tmp_path):
    """A row that log() returned from is on file, though the process never closed it."""
    code = (
        "import sys, os, signal; from pathlib import Path\n"
        "from runtime.track import Tracker; from conf.schema import WandbConfig\n"
        "t = Tracker(WandbConfig(mode='disabled'), Path(sys.argv[1]))\n"
        "for step in range(1, 8): t.log(step, loss=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_wandb_gets_settings_rows_result_figures_and_table(tmp_path, wandb):
    figure = tmp_path / "curve.png"
    figure.write_bytes(b"png")
    c = TrainConfig()
    t = Tracker(c.wandb, tmp_path, c)
    t.log(1, loss=0.5)
    t.log(2, loss=None)
    result = {"metrics": {"base": {"384": {"ndcg@10": 0.7}}}, "seed": 0}
    t.finish(result, [figure, tmp_path / "missing.png"], (["dim", "base"], [["384", 0.7]]))
    (run,) = wandb.runs
    assert run.kwargs["mode"] == "offline" and run.kwargs["config"]["optim"]["lr"] == 2e-5
    assert run.kwargs["dir"] == str(tmp_path)
    assert run.rows[0][0] == 1 and run.rows[0][1]["loss"] == 0.5 and "loss" not in run.rows[1][1]
    assert run.summary == {"result/metrics/base/384/ndcg@10": 0.7, "result/seed": 0}
    assert run.rows[2][1] == {
        "figures/curve": ("image", str(figure)),
        "result_table": ("table", ["dim", "base"], [["384", 0.7]]),
    }
    assert run.exit_code == 0


def test_wandb_run_is_rebuilt_from_metrics_after_a_kill(tmp_path, wandb):
    """W&B's own file is lost or short; the new run must hold every kept row once, in order."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n')
    older = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    older.mkdir(parents=True)
    t = Tracker(WandbConfig(), tmp_path)
    t.truncate(1)
    t.log(2, loss=3)
    t.finish()
    steps = [(step, values["loss"]) for step, values in wandb.runs[0].rows]
    assert steps == [(1, 1), (2, 3)]
    assert not older.exists(), "two files with the same rows would be synced as two runs"


def test_error_closes_the_wandb_run_as_failed(tmp_path, wandb):
    """The next run of a sweep would find it open."""
    t = Tracker(WandbConfig(), tmp_path)
    t.log(1, loss=1)
    close_open_trackers()
    assert wandb.runs[0].exit_code == 1 and wandb.runs[0].rows
    assert track._open_trackers == []


def raises(*args, **kwargs):
    raise RuntimeError("quota\nexceeded")


@pytest.mark.parametrize("fault", ["init", "log", "finish", "import", "folder", "no key", "table"])
def test_wandb_failing_in_any_way_never_stops_training(tmp_path, wandb, monkeypatch, caplog, fault):
    """Every call of W&B may raise; the reason is logged once and metrics.jsonl goes on."""
    mode = "offline"
    if fault == "init":
        wandb.init = raises
    elif fault == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif fault == "folder":
        (tmp_path / "wandb").write_text("a file in the way")
    elif fault == "no key":
        mode, wandb.login = "online", lambda **kwargs: False
    elif fault == "table":
        wandb.Table = raises
    else:
        monkeypatch.setattr(FakeRun, fault, raises)
    with caplog.at_level(logging.WARNING):
        t = Tracker(WandbConfig(mode=mode), tmp_path)
        for step in range(5):
            t.log(step, loss=step)
        t.finish({"a": 1}, table=(["a"], [[1]]))
    assert [row["step"] for row in read_rows(t.path)] == list(range(5))
    messages = [r.message for r in caplog.records if "W&B" in r.message]
    assert len(messages) == 1 and "\n" not in messages[0]
    wanted = {"import": "ModuleNotFound", "folder": "File exists", "no key": "wandb login"}
    assert wanted.get(fault, "quota exceeded") in messages[0]


def test_online_without_server_writes_the_offline_file(tmp_path, wandb, caplog):
    def init(mode, **kwargs):
        if mode == "online":
            raise TimeoutError("no answer")
        wandb.runs.append(FakeRun(mode=mode, **kwargs))
        return wandb.runs[-1]

    wandb.init = init
    t = Tracker(WandbConfig(mode="online"), tmp_path)
    t.log(1, loss=1)
    t.finish()
    assert wandb.runs[0].kwargs["mode"] == "offline" and wandb.runs[0].rows
    assert "no answer" in caplog.text


def test_slow_wandb_does_not_hold_training_up(tmp_path, wandb, monkeypatch, caplog):
    """Its server may take a minute; steps take milliseconds."""
    inner = wandb.init

    def init(**kwargs):
        time.sleep(1.0)
        return inner(**kwargs)

    wandb.init = init
    monkeypatch.setitem(track.FINISH_TIMEOUT_S, "offline", 0.05)
    begin_s = time.perf_counter()
    t = Tracker(WandbConfig(), tmp_path)
    for step in range(100):
        t.log(step, loss=step)
    t.finish({})
    assert time.perf_counter() - begin_s < 0.7, "below the second that init takes"
    assert "left behind" in caplog.text and len(read_rows(t.path)) == 100


def test_disabled_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    t = Tracker(OFF, tmp_path)
    t.log(1, loss=1)
    t.finish({})
    assert not (tmp_path / "wandb").exists()


def test_other_ranks_write_nothing(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("RANK", "3")
    t = Tracker(WandbConfig(), tmp_path)
    t.truncate(1)
    t.log(1, loss=1)
    t.finish({})
    assert list(tmp_path.iterdir()) == [] and not wandb.runs


def test_metrics_that_cannot_be_written_are_a_message(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"metrics.jsonl cannot be written"):
        Tracker(OFF, tmp_path)


@pytest.mark.slow
def test_real_wandb_offline_writes_under_the_run_directory_and_is_silent(tmp_path):
    """With the package itself: settings names change between its versions."""
    pytest.importorskip("wandb")
    code = (
        "import sys, time; from pathlib import Path; from runtime.track import Tracker\n"
        "from conf.schema import TrainConfig\n"
        "c = TrainConfig(); t = Tracker(c.wandb, Path(sys.argv[1]), c)\n"
        "begin = time.perf_counter()\n"
        "for step in range(20): t.log(step, loss=step)\n"
        "assert time.perf_counter() - begin < 1.0, 'W&B holds the first steps up'\n"
        "t.finish({'a': {'b': 1}}, table=(['x'], [[1]]))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    run_dir = tmp_path / "run (1)=x"
    run_dir.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    (wandb_file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert wandb_file.stat().st_size > 1000
    assert list(home.iterdir()) == []
