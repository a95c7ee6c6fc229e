"""A finished run as a row of results/: numbers kept, paths of the machine left out."""

import json
import sys

import pytest

from conf.cli import main
from conf.schema import TrainConfig


@pytest.mark.slow
def test_a_finished_run_is_logged_without_paths(tiny_base, tmp_path, monkeypatch):
    """The row must hold what result.json says; results/ is published, so no path may leak."""
    from evals import log
    from train import train

    monkeypatch.chdir(tmp_path)
    words = [
        *("train.py", "+experiment=toy", "model=custom", f"model.base={tiny_base}"),
        *("optim.steps=2", "loss.dims=[8]", "model.max_passage_length=32", "wandb=disabled"),
        f"data.cache_dir={tmp_path}/secret",
    ]
    monkeypatch.setattr(sys, "argv", words)
    main(TrainConfig, "train", train)
    (run,) = (tmp_path / "runs/toy").glob("*/seed0")
    monkeypatch.setattr(log, "RESULTS", tmp_path)
    (tmp_path / "README.md").write_text("# Log\n")
    monkeypatch.setattr(sys, "argv", ["log", str(run), "--note", "it runs"])
    log.main()
    text = (tmp_path / "toy.json").read_text()
    found, result = json.loads(text), json.loads((run / "result.json").read_text())
    for name in ("base", "tuned"):
        kept = found["metrics"][name]["8"]["ndcg@10"]
        assert kept == pytest.approx(result["metrics"][name]["8"]["ndcg@10"], abs=1e-4)
    assert "secret" not in text and str(tmp_path) not in text
    assert "it runs" in (tmp_path / "README.md").read_text()


def test_a_rerankers_rows_stand_in_a_table_of_their_own():
    """Metrics without dims, differences to each system; a later retriever's row must not land
    there."""
    from evals import log

    of = {"mrr": 0.51234, "map": 0.5, "ndcg@10": 0.6}
    delta = {"mrr": {"diff": 0.1}, "ndcg@10": {"diff": 0.2}, "map": {"diff": 0.3}}
    result = {
        "metrics": {"random": of, "bm25": of, "tuned": of},
        "delta": delta,
        "delta_of": {"bm25": delta},
    }
    found = log.kept(result)
    assert found["metrics"]["tuned"] == {"ndcg@10": 0.6, "mrr": 0.5123, "map": 0.5}
    assert found["delta_of"]["bm25"]["mrr"] == {"diff": 0.1}
    assert list(log.rerank_row(result).values()) == ["0.512 / 0.600"] * 2 + ["-", "0.512 / 0.600"]
    text = "# Log\n\n| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| 2 |\n"
    text = log.with_row(text, "| a |", "| 3 |")
    assert text == "# Log\n\n| a |\n|---|\n| 1 |\n| 3 |\n\n| b |\n|---|\n| 2 |\n"
