"""Every file in conf/experiment/ composes, says what it is for, and holds deltas only."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from conf.cli import CONF_DIR, list_experiments, main, task_of
from conf.schema import TrainConfig


def compose(monkeypatch, *args) -> TrainConfig:
    configs = []
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    main(TrainConfig, "train", lambda c, run_dir: configs.append(c))
    return configs[0]


def flatten(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items()
            for k, v in flatten(inner, f"{prefix}.{name}".strip(".")).items()}  # fmt: skip


@pytest.mark.parametrize("name", list_experiments())
def test_experiment_composes_and_its_values_arrive(name, tmp_path, monkeypatch):
    """A value under the wrong section or a missing package line would be lost."""
    monkeypatch.chdir(tmp_path)
    args = [] if name == "toy" else ["data.root=somewhere"]  # toy data come from nowhere
    c = compose(monkeypatch, f"+experiment={name}", *args)
    assert c.name == name, "the run directory is found by the experiment's name"
    content = yaml.load((CONF_DIR / "experiment" / f"{name}.yaml").read_text(), get_yaml_loader())
    content.pop("defaults")
    for key, value in flatten(content).items():
        found = c
        for part in key.split("."):
            found = getattr(found, part)
        if key == "data.curriculum":  # stages: what is not written is null
            found = [{k: v for k, v in asdict(s).items() if v is not None} for s in found]
        assert found == value, key


@pytest.mark.parametrize("name", list_experiments())
def test_experiment_says_question_run_and_expect(name):
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    head = text[: text.index("\ndefaults:")]
    for word in ("# @package _global_", "# Question: ", "# Run: ", "# Expect: "):
        assert word in head
    assert f"+experiment={name}" in head


@pytest.mark.parametrize("name", list_experiments())
def test_experiment_can_be_run_small(name, tmp_path, monkeypatch):
    """Tests train two steps of each on a tiny model and toy data: nothing may stand in the way."""
    monkeypatch.chdir(tmp_path)
    is_rerank = task_of(name) == "rerank"
    c = compose(
        monkeypatch, f"+experiment={name}", "model=custom", "model.base=tiny", "data=toy",
        *([] if is_rerank else ["loss.dims=[8,4]", "loss.dim_weights=[]"]),
        "optim.steps=2", "optim.batch_size=4", "runtime=cpu", "wandb=disabled",
    )  # fmt: skip
    assert c.data.format == "toy" and c.data.root is None and not c.data.columns
    assert c.loss.dims == ([] if is_rerank else [8, 4])
    assert c.model.base == "tiny" and c.optim.steps == 2
    assert Path("runs").is_dir()
