"""Every experiment trains two steps, on a tiny random model and generated text."""

import json
import sys

import pytest

from conf.cli import list_experiments, main, task_of
from conf.schema import TrainConfig

OWN = {
    "retrieval": (
        "model.max_query_length=32", "model.max_passage_length=32", "loss.dims=[8,4]",
        "loss.dim_weights=[]",
    ),
    "rerank": ("model.max_pair_length=48", "data.random_negatives=2"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list_experiments())
def test_experiment_trains_two_steps(name, tiny_base, tmp_path, monkeypatch):
    """A config that composes may still name something that the code does not have."""
    train = pytest.importorskip("train").train
    monkeypatch.chdir(tmp_path)
    args = [
        f"+experiment={name}", "model=custom", f"model.base={tiny_base}", "data=toy",
        *OWN[task_of(name)], "model.freeze=[]",
        "optim.steps=2", "optim.batch_size=4", "runtime=cpu", "runtime.precision=fp32",
        "wandb=disabled", "log_every=1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    main(TrainConfig, "train", train)
    (result,) = tmp_path.glob(f"runs/{name}/*/seed0/result.json")
    rows = (result.parent / "metrics.jsonl").read_text().splitlines()
    losses = {row["step"]: row["loss"] for row in map(json.loads, rows) if "loss" in row}
    assert losses.keys() == {1, 2} and all(0 < loss < 20 for loss in losses.values())
    assert json.loads(result.read_text())["steps"] == 2
