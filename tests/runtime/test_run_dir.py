"""Run directories: one a run, never overwritten, resumable, complete."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema import EvaluateConfig, OptimConfig, TrainConfig
from runtime.run_dir import (
    MAX_PART,
    overrides_part,
    prepare_run_dir,
    read_config,
    release_run_dir,
    run_path,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path):
    """Prepare a run directory as one process would, and let go of it at once."""

    def start(overrides=(), **settings):
        c = TrainConfig(runs_dir=str(tmp_path / "runs"), **settings)
        run_dir = prepare_run_dir(c, overrides)
        release_run_dir(run_dir)
        return run_dir

    return start


def part(*overrides, swept=(), cls=TrainConfig, name="run"):
    return overrides_part(overrides, cls, name=name, swept=swept)


# ------------------------------------------------------------------------------------------ names


def test_name_holds_what_changes_results_and_nothing_else():
    assert (
        part()
        == part("seed=3", "name=x", "resume=true", "wandb=online", "runtime=gpu")
        == "default"
    )
    assert part("data=local", "data.root=/a/b", "+experiment=toy", "log_every=1") == "default"
    assert part("model.base=a/b", "runtime.threads=2", "data.cache_dir=x") == "default"
    assert part("hydra.verbose=true", "hydra/launcher=x") == "default"
    assert part("optim.batch_size=64", "optim.lr=1e-4") == "batch_size-64+lr-0.0001"
    assert part("loss.dims=[384,128]", "model=mpnet") == "loss.dims-384_128+model-mpnet"


def test_one_setting_has_one_name_however_it_is_typed():
    """Hydra gives a sweep's arm 0.0001 for 1e-4: it must be found again by one plain command."""
    assert part("optim.lr=1e-4") == part("optim.lr=0.0001") == part("++optim.lr=1.0e-04")
    assert part("optim.lr=1e-4", "optim.epochs=2") == part("optim.epochs=2", "optim.lr=1e-4")


def test_settings_with_the_same_last_part_do_not_meet():
    """model.query_prompt and data.query_prompt would both be query_prompt-x."""
    names = {part(f"{s}.query_prompt=x") for s in ("model", "data")}
    assert len(names) == 2
    assert part("dims=[8]") != part("loss.dims=[8]")


@pytest.mark.parametrize(
    "one, other",
    [("a b", "a_b"), ("a/b", "a_b"), ("a=b", "a-b"), ("query: ", "query:"), ("x" * 300, "x" * 301)],
)
def test_values_that_lose_characters_still_differ(one, other):
    """Replacing characters, or cutting, makes equal names of different values."""
    assert part(f'model.query_prompt="{one}"') != part(f'model.query_prompt="{other}"')


@pytest.mark.parametrize(
    "value",
    ["a=b", "a/b", "\u0646\u0635 \u0637\u0648\u064a\u0644 " * 30, "x" * 500, "../..", "a\nb"],
)
def test_name_is_short_and_safe_for_a_file_system_and_the_command_line(value, tmp_path):
    name = part(
        f'model.query_prompt="{value}"', "optim.lr=1", "optim.warmup=0.5", "loss=matryoshka"
    )
    assert len(name.encode()) <= MAX_PART
    assert not set(name) & set("=/,\n \\'\"") and name not in (".", "..")
    (tmp_path / name).mkdir()


def test_swept_keys_are_always_in_the_name():
    assert part("data.root=/x/a", swept={"data.root"}) != part(
        "data.root=/y/a", swept={"data.root"}
    )
    assert part("runtime.threads=1", swept={"runtime.threads"}) == "threads-1"
    assert part("+experiment=toy", swept={"experiment"}, name="mine") == "experiment-toy"
    assert part("+experiment=toy", swept={"experiment"}, name="toy") == "default"
    assert part('model="m/x"', swept={"model"}, cls=EvaluateConfig).startswith("model-x-")


def test_path_is_name_overrides_seed():
    c = TrainConfig(name="mine", seed=7, runs_dir="r")
    assert run_path(c, ["optim.lr=1"]) == Path("r/mine/lr-1/seed7")


# ------------------------------------------------------------------------------- what is written


def test_config_reads_back_to_the_same_values(start):
    """YAML reads 1e3 as a number, `no` as false and drops a trailing space if asked carelessly."""
    c = TrainConfig(name="1e3", optim=OptimConfig(lr=1e-5))
    c.model.query_prompt, c.model.passage_prompt = "query: ", "${name} no"
    c.data.columns, c.data.filter = (
        {"query": "\u0639\u0646\u0648\u0627\u0646"},
        {"label": 0, "kind": "1"},
    )
    run_dir = start(
        **{f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "runs_dir"}
    )
    found = read_config(run_dir)
    assert found == dataclasses.asdict(c) | {"runs_dir": found["runs_dir"]}
    assert "\u0639\u0646\u0648\u0627\u0646" in (run_dir / "config.yaml").read_text(encoding="utf-8")


def test_environment_has_commit_versions_and_no_host_name(start):
    run_dir = start(["optim.lr=1"])
    env = json.loads((run_dir / "env.json").read_text())
    assert env["packages"]["numpy"] and env["python"].startswith("3.") and "threads" in env
    assert (
        os.uname().nodename not in (run_dir / "env.json").read_text()
        or len(os.uname().nodename) < 4
    )
    assert (run_dir / "overrides.txt").read_text() == "optim.lr=1\n"


def test_git_state_holds_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    """Against a checkout made here: the project's own may have no commit yet."""
    import runtime.run_dir as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "runtime" / "run_dir.py"))
    assert module._git_state() is None or "commit" in module._git_state()
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]

    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-q", "-m", "first")
    assert module._git_state()["is_dirty"] is False and len(module._git_state()["commit"]) == 40
    (tmp_path / "a.txt").write_text("two\n" * 100_000)
    (tmp_path / "b.txt").write_text("new")
    state = module._git_state()
    assert state["is_dirty"] and "+two" in state["diff"] and state["untracked"] == ["b.txt"]
    assert state["diff_is_cut"] and len(state["diff"]) == module.MAX_DIFF


def test_atomic_write_leaves_old_or_new_and_no_rest(tmp_path, monkeypatch):
    """A full disk in the middle of a write must not cost the old file."""
    path = tmp_path / "result.json"
    write_json_atomic(path, {"a": "\u00e9"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "\u00e9"}
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": float("nan")})

    os.link(path, tmp_path / "reader")  # whoever has the old file open must keep it whole
    write_text_atomic(path, "new")
    assert json.loads((tmp_path / "reader").read_text(encoding="utf-8")) == {"a": "\u00e9"}
    (tmp_path / "reader").rename(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_text_atomic(path, "new")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "\u00e9"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_atomic_write_survives_sigkill_at_any_moment(tmp_path):
    """Kill a real process that writes again and again: the file is one of the whole versions."""
    path = tmp_path / "f.txt"
    code = (
        "import sys; from pathlib import Path; from runtime.run_dir import write_bytes_atomic\n"
        "n = 0\nwhile True:\n    n += 1\n"
        "    write_bytes_atomic(Path(sys.argv[1]), bytes([65 + n % 26]) * 300_000)\n"
    )
    for delay_s in (0.3, 0.35, 0.4):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay_s - 0.3)
        child.kill()
        child.wait()
        content = path.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1
    write_bytes_atomic(path, b"after")
    assert path.read_bytes() == b"after"


# -------------------------------------------------------------------- starting twice, and resuming


def checkpoint(run_dir, step=10):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_text("x")


def test_finished_run_is_never_overwritten(start):
    run_dir = start()
    (run_dir / "result.json").write_text("{}")
    before = {p: p.read_bytes() for p in run_dir.iterdir()}
    with pytest.raises(ValueError, match=r"already holds result.json; add resume=true .* name="):
        start()
    assert start(resume=True) == run_dir
    with pytest.raises(ValueError, match=r"optim.lr: 2e-05 in .*config.yaml, 0.5 now"):
        start(resume=True, optim=OptimConfig(lr=0.5))
    assert {p: p.read_bytes() for p in run_dir.iterdir()} == before


def test_unfinished_run_with_checkpoints_asks_for_resume(start):
    run_dir = start()
    checkpoint(run_dir, 10)
    checkpoint(run_dir, 9)
    (run_dir / "error.txt").write_text("power cut")
    (run_dir / "metrics.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(ValueError, match=r"last checkpoint step_00000010.*resume=true.*name="):
        start()
    assert (run_dir / "error.txt").exists(), "a refused start changes nothing"
    start(resume=True, log_every=3, keep_checkpoints=9)  # cannot change results
    assert (run_dir / "metrics.jsonl").exists() and not (run_dir / "error.txt").exists()
    env = json.loads((run_dir / "env.json").read_text())
    assert env["continues"]["checkpoint"] == "step_00000010" and env["continues"]["earlier"]


def test_resume_with_other_settings_lists_the_differences(start):
    run_dir = start()
    checkpoint(run_dir)
    c = TrainConfig()
    c.data.columns = {"query": "q"}
    with pytest.raises(ValueError) as error:
        start(resume=True, eval_every=5, data=c.data)
    assert "eval_every: 0 in" in str(error.value) and "data.columns" in str(error.value)
    assert "5 now" in str(error.value) and "optim" not in str(error.value)


def test_resume_with_another_typed_setting_warns_that_it_begins_anew(start, caplog):
    """What is typed is part of the path: there is nothing to resume there, and an info line is all
    that told it from a resumed run."""
    typed = ["optim.lr=0.5"], {"optim": OptimConfig(lr=0.5)}
    fresh = start(*typed[:1], resume=True, **typed[1])
    checkpoint(fresh)
    begun = start(["eval_every=5"], resume=True, eval_every=5)
    wanted = (
        "holds no checkpoint to resume and starts from the beginning; unfinished runs beside it"
        " do:\n"
        f"  {fresh} (step_00000010)\n"
        "    eval_every: 0 there, 5 now\n"
        "    optim.lr: 0.5 there, 2e-05 now\n"
        "to continue one, stop this and give its command again"
    )
    assert wanted in caplog.text
    caplog.clear()
    assert start(*typed[:1], resume=True, **typed[1]) == fresh
    assert start(["eval_every=5"], resume=True, eval_every=5) == begun, "it has begun, on purpose"
    start(["eval_every=6"], resume=True, eval_every=6, seed=1)  # a run of its own
    (fresh / "result.json").write_text("{}")
    start(["eval_every=7"], resume=True, eval_every=7)
    assert "unfinished runs" not in caplog.text


def test_no_warning_beside_a_running_run_and_in_a_sweep(start, tmp_path, caplog):
    """Scripts give resume=true to every arm, and the arms before it may be half done."""
    c = TrainConfig(runs_dir=str(tmp_path / "runs"), resume=True)
    other = prepare_run_dir(c, ["eval_every=5"])
    checkpoint(other)
    try:
        start(["eval_every=6"], resume=True, eval_every=6)
    finally:
        release_run_dir(other)
    c.eval_every = 7
    arm = prepare_run_dir(c, ["eval_every=7"], swept={"eval_every"})
    release_run_dir(arm)
    assert "unfinished runs beside it" not in caplog.text
    start(["eval_every=8"], resume=True, eval_every=8)
    assert "unfinished runs beside it" in caplog.text


def test_config_of_older_code_can_be_resumed(start):
    """A setting that came later counts as its default."""
    run_dir = start()
    checkpoint(run_dir)
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("  layer_decay: 1.0\n", ""))
    assert "layer_decay" not in path.read_text()
    start(resume=True)


def test_run_that_failed_before_its_first_checkpoint_starts_anew(start):
    """Its rows, and what it computed with other settings, would mix with the new run's."""
    run_dir = start()
    for name in ("metrics.jsonl", "error.txt", "base.json"):
        (run_dir / name).write_text("{}")
    (run_dir / "checkpoints" / ".step_1.123").mkdir(parents=True)  # killed while it saved
    start(optim=OptimConfig(lr=0.5))
    assert sorted(p.name for p in run_dir.iterdir()) == [
        ".lock", "config.yaml", "env.json", "overrides.txt"
    ]  # fmt: skip
    assert read_config(run_dir)["optim"]["lr"] == 0.5


def test_foreign_folder_is_not_emptied(start, tmp_path):
    """A user may point runs_dir at a folder that happens to hold the same path."""
    folder = tmp_path / "runs/run/default/seed0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    start()
    assert (folder / "thesis.txt").read_text() == "mine"


def test_unwritable_place_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made.*runs_dir="):
        prepare_run_dir(TrainConfig(runs_dir=str(tmp_path / "file")))


def test_second_process_is_refused_and_a_kill_frees_the_directory(tmp_path, start):
    """Two writers would mix their checkpoints; a lock that outlives a kill would block the
    resume.
    """
    code = (
        "import sys, time; from conf.schema import TrainConfig\n"
        "from runtime.run_dir import prepare_run_dir\n"
        "prepare_run_dir(TrainConfig(runs_dir=sys.argv[1])); print('held', flush=True)\n"
        # a forked worker that lives on must not keep the lock
        "import os; os.fork() or (time.sleep(4), os._exit(0)); time.sleep(60)\n"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "runs")]
    child = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"in use by another process.*name="):
            start()
        time.sleep(0.2)  # let it fork
        child.send_signal(signal.SIGKILL)
        child.wait()
        start()
    finally:
        child.kill()
        child.stdout.close()


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    """Under torchrun every process comes here; only rank 0 may touch the disk."""
    monkeypatch.setenv("RANK", "1")
    run_dir = prepare_run_dir(TrainConfig(runs_dir=str(tmp_path / "runs")))
    assert run_dir == tmp_path / "runs/run/default/seed0" and not run_dir.exists()
