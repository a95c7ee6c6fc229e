"""Whole runs on a few rows, in this process: what they leave is what they did."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import train as program
from conf.schema import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    SourceConfig,
    TrainConfig,
    WandbConfig,
)
from evals import final
from evals.retrieval import encode_sets, score
from models.pretrained import load_towers
from models.reranker import load_reranker
from runtime.clock import Clock
from runtime.run_dir import check_same_data
from runtime.track import read_rows
from train import train

WORDS = "amber basalt cobalt dune ember fjord glacier harbour island juniper krill lagoon".split()


def write_rows(path, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        words = " ".join(rng.choice(WORDS, 3))
        lines.append(json.dumps({"query": f"{words} {i}", "positive": f"{i} about {words}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def config(tiny_base, tmp_path) -> TrainConfig:
    root = tmp_path / "pairs.jsonl"
    write_rows(root, 80)
    return TrainConfig(
        model=ModelConfig(base=str(tiny_base), max_query_length=48, max_passage_length=48),
        data=DataConfig(root=str(root), cache_dir=str(tmp_path / "cache")),
        optim=OptimConfig(steps=6, batch_size=8, lr=1e-3),
        runtime=RuntimeConfig(precision="fp32"),
        wandb=WandbConfig(mode="disabled"),
        examples_shown=0,
        log_every=4,
    )


def run(c: TrainConfig, folder) -> dict:
    folder.mkdir(exist_ok=True)
    train(c, folder)
    return json.loads((folder / "result.json").read_text())


def test_the_export_has_the_prompts_that_were_trained_and_judged(config, tmp_path):
    """Prompts of a data set are as good as the model's: the export read back, with nothing said
    about prompts, gives the number on its card."""
    config.data.query_prompt, config.data.passage_prompt = "find this: ", "text: "
    result = run(config, tmp_path / "run")
    towers = load_towers(str(tmp_path / "run" / "export"))
    assert (towers.spec.query_prompt, towers.spec.passage_prompt) == ("find this: ", "text: ")
    from data.datasets import open_data

    sources = replace(config.data, query_prompt=None, passage_prompt=None)
    data = open_data(sources, towers.spec, towers.tokenizer_query, towers.tokenizer_passage)
    embedded = encode_sets(towers, data.test, prompts={"test": (None, None)}, precision="fp32")
    found = score(*embedded["test"], data.test["test"], [towers.width])[towers.width].metrics.means
    expected = result["metrics"]["tuned"][str(towers.width)]
    assert found["ndcg@10"] == pytest.approx(expected["ndcg@10"], abs=1e-9)


def test_differing_prompts_of_data_sets_are_exported_by_name(config, tmp_path):
    """No single pair of prompts is right for both sets: the folder names all of them."""
    other = tmp_path / "other.jsonl"
    write_rows(other, 60, seed=1)
    root, config.data.root = config.data.root, None
    config.data.sets = {
        "a": SourceConfig(root=root, query_prompt="a: "),
        "b": SourceConfig(root=str(other), query_prompt="b: "),
    }
    run(config, tmp_path / "run")
    export = tmp_path / "run" / "export"
    settings = json.loads((export / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {
        "query": "", "document": "", "a-query": "a: ", "a-document": "", "b-query": "b: ",
        "b-document": "",
    }  # fmt: skip
    card = (export / "README.md").read_text()
    assert "| prompts of a | 'a: ' and '' |" in card and 'prompt_name="a-query"' in card


def rerank_config(config: TrainConfig, tmp_path, **sets) -> TrainConfig:
    """The same, of a reranker; sets: name -> settings of a data set."""
    loss = LossConfig(kind="softmax", temperature=1.0)
    model = ModelConfig(base=config.model.base, max_pair_length=64)
    data = replace(config.data, random_negatives=3)
    if sets:
        root, data.root = data.root, None
        data.sets = {name: SourceConfig(root=root, **keys) for name, keys in sets.items()}
    return replace(config, task="rerank", loss=loss, model=model, data=data)


def test_a_reranker_s_export_has_the_prompts_of_its_data(config, tmp_path):
    """It is calibrated with them; a folder without them would score other texts."""
    c = rerank_config(config, tmp_path)
    c.data.query_prompt, c.data.passage_prompt = "find this: ", "text: "
    run(c, tmp_path / "run")
    spec = load_reranker(str(tmp_path / "run" / "export")).spec
    assert (spec.query_prompt, spec.passage_prompt) == ("find this: ", "text: ")
    c = rerank_config(config, tmp_path, a={"query_prompt": "a: "}, b={"query_prompt": "b: "})
    run(c, tmp_path / "sets")
    card = (tmp_path / "sets" / "export" / "README.md").read_text()
    assert "| prompts of a | 'a: ' and '' |" in card and "put those of the nearest set" in card


def test_a_run_goes_on_with_its_own_data_only(config, tmp_path):
    """A file that changed since the checkpoint would train on other rows without a word."""
    run(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()  # as after a kill during the last evaluation
    run(config, tmp_path / "run")
    write_rows(tmp_path / "pairs.jsonl", 70)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ValueError, match="cannot be resumed: its data changed since it began"):
        run(config, tmp_path / "run")


def test_the_same_data_are_noted_once(tmp_path):
    check_same_data(tmp_path, "a" * 32)
    check_same_data(tmp_path, "a" * 32)
    with pytest.raises(ValueError, match="content aaaaaaaaaaaa"):
        check_same_data(tmp_path, "b" * 32)
    assert json.loads((tmp_path / "data.json").read_text())["digest"] == "a" * 32


def test_a_resumed_run_counts_on(config, tmp_path):
    """Rates and seconds are of the whole run, not of the process that finished it."""
    first = run(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run(config, tmp_path / "run")
    assert again["train_s"] >= 0.9 * first["train_s"] > 0
    assert again["examples_per_s"] > 0 and again["wall_s"] > again["train_s"]
    clock = Clock(began=0.0, earlier={"train_s": 5.0, "wall_s": 9.0, "examples": 50, "tokens": 100})
    assert 5 <= clock.totals()["train_s"] < 6
    assert clock.totals()["examples_per_s"] == pytest.approx(10, rel=0.1)
    assert clock.rates()["time.pairs_per_s"] == 0


def test_a_run_that_stops_early_logs_its_last_step(config, tmp_path):
    """Its final loss and mean similarities would be those of some step before."""
    config.eval_every, config.early_stopping, config.optim.lr = 3, 1, 1e-12
    config.optim.steps = 11
    result = run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert result["steps"] == 6  # nothing is learned: the second evaluation is no better
    assert [row["step"] for row in rows if "loss" in row] == [4, 6]
    assert [row["step"] for row in rows if "dev/ndcg@10" in row] == [3, 6]


def test_a_step_is_logged_with_the_temperature_of_its_loss(config, unjudged, tmp_path):
    """It was the one after the step, beside a loss and a diagonal that the one before divided."""
    config.loss = LossConfig(temperature=0.05, learn_temperature=True)
    config.optim.steps, config.optim.temperature_lr, config.log_every = 3, 0.5, 1
    run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    first, second, third = (row["temperature"] for row in rows)
    assert first == pytest.approx(0.05, rel=1e-6)
    assert abs(second - first) > 0.01 and abs(third - second) > 0.001


# ------------------------------------------------------------------------------------------ signals


def signalled(fn, number: int = signal.SIGTERM, at: int = 1):
    """fn, whose call number `at` begins with a signal to this process; .calls counts them."""

    def wrapped(*args, **options):
        wrapped.calls += 1
        if wrapped.calls == at:
            os.kill(os.getpid(), number)
        return fn(*args, **options)

    wrapped.calls = 0
    return wrapped


@pytest.fixture
def unjudged(monkeypatch) -> None:
    """Nothing is evaluated before and after the loop."""

    def write_result(c, run_dir, *_, **__):
        (run_dir / "result.json").write_text('{"is_done": true}')

    monkeypatch.setattr(final, "evaluate_base", lambda *_, **__: {})
    monkeypatch.setattr(final, "write_result", write_result)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("where", "said"),
    [("evaluate_base", "no step is saved yet in .*; start again with the same command"),
     ("write_result", "saved at step 6 in .*; go on with the same command and resume=true")],
)  # fmt: skip
def test_a_signal_outside_the_loop_ends_the_run_with_a_word(
    where, said, number, config, tmp_path, monkeypatch, unjudged
):
    """SIGTERM's own action says nothing, and hours of training look lost."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(final, where, signalled(getattr(final, where), number))
        with pytest.raises(SystemExit, match=f"{number.name}: {said}"):
            run(config, tmp_path / "run")
    assert signal.getsignal(number) is before
    assert run(config, tmp_path / "run")["is_done"]


def saved(run_dir, step: int) -> tuple[dict, list[dict]]:
    """(checkpoint, rows) without what depends on the clock."""
    path = run_dir / "checkpoints" / f"step_{step:08d}" / "state.pt"
    state = torch.load(path, weights_only=True)
    state["progress"].pop("clock")
    rows = read_rows(run_dir / "metrics.jsonl")
    return state, [{k: v for k, v in row.items() if not k.startswith("time.")} for row in rows]


@pytest.mark.parametrize(
    ("where", "at", "step", "dev_evaluations"),
    [("train_step", 2, 2, 0), ("evaluate_dev", 1, 2, 1), ("evaluate_dev", 3, 6, 3),
     ("train_step", 6, 6, 2)],
)  # fmt: skip
@pytest.mark.parametrize("early_stopping", [0, 2])
def test_a_signal_saves_before_a_dev_evaluation_which_the_resumed_run_makes_up_for(
    where, at, step, dev_evaluations, early_stopping, config, tmp_path, monkeypatch, unjudged
):
    """After an evaluation of minutes a cluster has killed the run; one that is left out for good
    would change what is best, and when to stop."""
    config.eval_every, config.early_stopping = 2, early_stopping
    config.save_every, config.keep_checkpoints = 2, 9
    if early_stopping:  # nothing is learned: stops at step 6
        config.optim.lr, config.optim.steps = 1e-12, 11

    def evaluate_dev(towers, *_, precision):  # another value for other weights
        return {"dev/ndcg@10": sum(p.double().sum().item() for p in towers.parameters())}

    monkeypatch.setattr(final, "evaluate_dev", evaluate_dev)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        judge = signalled(evaluate_dev, at=at if where == "evaluate_dev" else 0)
        patch.setattr(final, "evaluate_dev", judge)
        if where == "train_step":
            patch.setattr(program, where, signalled(program.train_step, at=at))
        with pytest.raises(SystemExit, match=rf"saved at step {step} of \d+ in .* resume=true"):
            run(config, tmp_path / "cut")
        assert judge.calls == dev_evaluations
    assert [row["step"] for row in read_rows(tmp_path / "cut" / "metrics.jsonl")][-1:] != [step]
    run(config, tmp_path / "cut")
    for number in range(2, 7, 2):
        (cut, rows), (whole, rows_whole) = (saved(tmp_path / n, number) for n in ("cut", "whole"))
        assert rows == rows_whole
        if number != step:
            assert cut["progress"] == whole["progress"]
        for name, weight in whole["towers"].items():
            assert torch.equal(cut["towers"][name], weight)
    links = [os.readlink(tmp_path / n / "checkpoints" / "best") for n in ("cut", "whole")]
    assert links[0] == links[1]


def test_shared_questions_are_a_warning_and_in_the_report(config, tmp_path, caplog):
    """A leak that stands in a JSON file alone is published."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        write_rows(folder / f"{name}.jsonl", 30, seed=name == "dev")
    config.data.root = str(folder)
    run(config, tmp_path / "run")
    assert "train and test share 30 exact queries" in caplog.text
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- texts shared by splits: train and dev" in report
    assert "train and test: 30 exact queries, 30 exact positives" in report


def test_dims_wider_than_the_model_are_refused_before_any_work(config, tmp_path):
    config.dims = [999]
    with pytest.raises(ValueError, match=r"dims \(999\) must be <= 16"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "base.json").exists()


def test_a_run_without_a_test_split_says_so_and_what_to_do(config, tmp_path, capsys):
    """An empty table leaves a user guessing what went wrong."""
    config.data.test_fraction = 0.0
    config.eval_every = 3
    result = run(config, tmp_path / "run")
    assert result["metrics"] == {} and result["test_set"] is None
    best = max(
        (r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "dev/ndcg@10" in r),
        key=lambda r: r["dev/ndcg@10"],
    )
    said = f"Best on dev: ndcg@10 {best['dev/ndcg@10']:.3f} at step {best['step']}."
    markdown = (tmp_path / "run" / "report.md").read_text()
    for text in (markdown, capsys.readouterr().out):
        assert said in text and f"python evaluate.py model={tmp_path / 'run'} data=<data>" in text
    assert "| dim" not in markdown and "Differences" not in markdown
