"""What a reranker's run leaves behind: rows beside it, calibration, export, the collapse check."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conf.schema import LossConfig, ModelConfig, TrainConfig
from data.groups import GroupData
from data.records import RerankSet
from evals import final_rerank
from evals.final_rerank import check_dev, check_spread, evaluate_base, evaluate_dev, write_result
from evals.rerank import candidate_logits, reranker_scores, retriever_scores
from models.pretrained import load_towers
from models.reranker import load_reranker

WORDS = "red blue fish stone fox pear whale cloud river apple".split()
TOTALS = {"steps": 3, "examples_per_s": 2.0, "tokens_per_s": 9.0, "train_s": 1.0, "wall_s": 2.0}


def groups(name: str, num: int = 30, seed: int = 0, *, has_candidates: bool = True) -> RerankSet:
    """Queries of two words, six candidates each, one of which holds both."""
    rng = np.random.default_rng(seed)
    docs: dict[str, str] = {}
    queries, qrels, candidates = {}, {}, {}
    for i in range(num):
        two = rng.choice(WORDS, 2, replace=False)
        queries[f"q{i}"] = " ".join(two)
        own = {f"d{i}-{j}": " ".join(rng.choice(WORDS, 3)) for j in range(5)}
        own[f"d{i}-5"] = f"{two[0]} {rng.choice(WORDS)} {two[1]}"
        docs |= own
        qrels[f"q{i}"] = {d: int(d.endswith("-5")) for d in own}
        candidates[f"q{i}"] = list(own)
    given = candidates if has_candidates else None
    return RerankSet(
        name, list(docs), list(docs.values()), list(queries), list(queries.values()), qrels, given
    )


def config(base) -> TrainConfig:
    return TrainConfig(
        name="mine", task="rerank", model=ModelConfig(base=str(base)), loss=LossConfig(kind="bce")
    )


def some_data(**sets) -> GroupData:
    return GroupData(SimpleNamespace(), sets.get("dev", {}), sets.get("test", {}), {"rows": 3})


def spread_out(reranker, factor: float = 10.0):
    with torch.no_grad():
        for parameter in reranker.parameters():
            parameter.mul_(factor if parameter.ndim > 1 else 1)
    return reranker


class Track:
    """Takes what Tracker takes."""

    def finish(self, result=None, figures=(), table=None):
        self.result, self.figures, self.table = result, figures, table


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """(run directory, reranker, data, result.json, tracker) of a run that "trained" by luck."""
    run_dir = tmp_path_factory.mktemp("run")
    c = config(tiny_base)
    data = some_data(dev={"dev": groups("dev", 20, 1)}, test={"test": groups("test")})
    torch.manual_seed(0)
    reranker = load_reranker(tiny_base)
    base = evaluate_base(reranker, data, run_dir, precision="fp32")
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "dev/ndcg@10": 0.4}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    track = Track()
    spread_out(reranker)
    write_result(c, run_dir, reranker, data, base, track, dict(TOTALS), precision="fp32")
    result = json.loads((run_dir / "result.json").read_text())
    return run_dir, reranker, data, result, track


def test_result_has_the_rows_that_a_reranker_is_judged_against(finished):
    """A reranker that does not beat its own encoder as a retriever has no use: it must show."""
    _, _, _, result, track = finished
    assert (result["task"], result["test_set"], result["steps"]) == ("rerank", "test", 3)
    assert list(result["metrics"]) == ["random", "bm25", "retriever", "base", "tuned"]
    for of in result["metrics"].values():
        assert list(of) == ["mrr", "map", "ndcg@10"]
    tuned, metrics = result["metrics"]["tuned"], result["metrics"]
    for system, delta in result["delta_of"].items():
        want = tuned["mrr"] - metrics[system]["mrr"]
        assert delta["mrr"]["diff"] == pytest.approx(want, abs=1e-12) and delta["mrr"]["n"] == 30
    assert result["delta"] == result["delta_of"]["base"]
    low, high = result["ci95"]["bm25"]["mrr"]
    assert low < metrics["bm25"]["mrr"] < high
    assert metrics["bm25"]["mrr"] > 0.8  # the answer holds both words
    assert track.result == result and ["tuned", "mrr", tuned["mrr"]] in track.table[1]


def test_the_export_gives_calibrated_scores_and_the_same_order(finished):
    """Calibration fitted and then forgotten at export would show nowhere else."""
    run_dir, reranker, data, result, _ = finished
    dev = data.dev["dev"]
    temperature, bias = (result["calibration"][name] for name in ("temperature", "bias"))
    ours = reranker_scores(reranker, dev, dev.candidates)
    theirs = reranker_scores(load_reranker(run_dir / "export"), dev, dev.candidates)
    assert reranker.spec.temperature == temperature != 1.0
    assert reranker.spec.bias == bias != 0.0
    for query_id in ours:
        want = ours[query_id] / temperature + bias
        assert theirs[query_id] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert result["calibration"]["ece_after"] <= result["calibration"]["ece_before"]
    assert result["calibration"]["pairs"] == 120


def test_report_card_and_figures_show_the_result(finished):
    run_dir, _, _, result, _ = finished
    report = (run_dir / "report.md").read_text()
    for text in (
        "# mine",
        "30 queries with 6.0 candidates each",
        "tuned against the others",
        "120 dev pairs",
    ):
        assert text in report
    assert f"{result['metrics']['tuned']['mrr']:.3f}".removeprefix("0") in report
    assert {p.name for p in (run_dir / "figures").iterdir()} == {
        "training_curve.png", "score_distribution.png",
    }  # fmt: skip
    assert f"{result['metrics']['tuned']['mrr']:.4f}" in (run_dir / "export/README.md").read_text()


def test_a_resumed_run_reads_its_base_back(finished, tiny_base):
    """The model it has by then is no longer the untrained one."""
    run_dir, reranker, data, result, _ = finished
    base = evaluate_base(reranker, data, run_dir, precision="fp32")
    mean = np.mean(base["test"]["per_query"]["mrr"])
    assert mean == pytest.approx(result["metrics"]["base"]["mrr"], abs=1e-12)


def test_dev_is_a_mean_over_sets(tiny_base):
    reranker = load_reranker(tiny_base)
    data = some_data(dev={"a": groups("a", 8), "b": groups("b", 16, 2)})
    values = evaluate_dev(reranker, data, precision="fp32")
    alone = [
        evaluate_dev(reranker, some_data(dev={n: one}), precision="fp32")
        for n, one in data.dev.items()
    ]
    for name in ("mrr", "map", "ndcg@10", "spread"):
        assert values[f"dev/{name}"] == pytest.approx(np.mean([v[f"dev/{name}"] for v in alone]))
    assert values["dev/b/ndcg@10"] == alone[1]["dev/ndcg@10"]
    assert set(alone[0]) == {"dev/mrr", "dev/map", "dev/ndcg@10", "dev/spread"}


def test_a_set_without_candidates_gets_those_of_bm25_once(tiny_base):
    """Other candidates at each evaluation would move dev/ndcg@10 without any training."""
    one = groups("dev", 10, has_candidates=False)
    reranker = load_reranker(tiny_base)
    values = [evaluate_dev(reranker, some_data(dev={"dev": one}), precision="fp32")]
    filled = one.candidates
    assert 6 < max(map(len, filled.values())) <= final_rerank.FIRST_STAGE_K
    values.append(evaluate_dev(reranker, some_data(dev={"dev": one}), precision="fp32"))
    assert one.candidates is filled and values[0] == values[1]


def test_a_collapsed_reranker_fails_its_run_before_the_export(tiny_base, tmp_path):
    """One score for all candidates: metrics then show the tie-break and pass for a result."""
    c = config(tiny_base)
    data = some_data(test={"test": groups("test", 10)})
    reranker = load_reranker(tiny_base)
    base = evaluate_base(reranker, data, tmp_path, precision="fp32")
    with torch.no_grad():
        reranker.head.out.weight.zero_()
    with pytest.raises(ValueError, match=r"has collapsed.*lower optim\.lr.*listwise loss"):
        write_result(c, tmp_path, reranker, data, base, Track(), dict(TOTALS), precision="fp32")
    assert not (tmp_path / "export").exists() and not (tmp_path / "result.json").exists()


def test_collapse_is_told_from_small_scores(tiny_base):
    """Distilled from cosines, logits differ by hundredths and are right; half-way to a constant
    they differ as much and are chance."""
    c = config(tiny_base)
    check_spread({"tuned": 0.01, "base": 2.0}, is_chance=False, c=c)
    check_spread({"tuned": 1e-5, "base": 1e-5}, is_chance=True, c=c)  # a few steps of training
    for spread, is_chance in (
        ({"tuned": 0.01, "base": 2.0}, True),
        ({"tuned": 1e-7}, False),
        ({"tuned": 0.0, "base": 0.0}, False),
    ):
        with pytest.raises(ValueError, match="has collapsed"):
            check_spread(spread, is_chance=is_chance, c=c)


def test_collapse_is_seen_without_a_test_set(tiny_base, tmp_path):
    """By dev, whose order is chance and whose scores differ far less than at the first step; and
    without dev by what the last step logged."""
    c = config(tiny_base)
    c.examples_shown = 0
    reranker = load_reranker(tiny_base)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "spread": 2.0}\n{"step": 20, "spread": 1e-9}\n'
    )
    dev = {"dev": groups("dev", 10)}
    scores = reranker_scores(reranker, dev["dev"], dev["dev"].candidates)
    assert final_rerank.NO_SPREAD < final_rerank.spread_of(scores) < 0.2
    for sets in ({"dev": dev}, {}):
        args = (c, tmp_path, reranker, some_data(**sets), {}, Track(), dict(TOTALS))
        with pytest.raises(ValueError, match="has collapsed"):
            write_result(*args, precision="fp32")
        assert not (tmp_path / "export").exists()


def test_several_labels_are_calibrated_by_a_temperature(tiny_base, tmp_path):
    """The export gives logits / T: softmax of them has the least cross-entropy on dev."""
    c = config(tiny_base)
    c.model.num_labels, c.examples_shown = 2, 0
    reranker = spread_out(load_reranker(tiny_base, c.model), 3.0)
    dev = groups("dev", 20)
    data = some_data(dev={"dev": dev}, test={"test": groups("test", 10, seed=1)})
    base = evaluate_base(reranker, data, tmp_path, precision="fp32")
    (tmp_path / "metrics.jsonl").write_text("")
    before = candidate_logits(reranker, dev, dev.candidates)
    write_result(c, tmp_path, reranker, data, base, Track(), dict(TOTALS), precision="fp32")
    fitted = json.loads((tmp_path / "result.json").read_text())["calibration"]
    after = candidate_logits(load_reranker(tmp_path / "export"), dev, dev.candidates)
    assert fitted["temperature"] != 1.0 and fitted["bias"] == 0.0 and fitted["pairs"] == 120
    np.testing.assert_allclose(after, before / fitted["temperature"], rtol=1e-4, atol=1e-5)
    assert "of the softmax on 120 dev pairs" in (tmp_path / "export/README.md").read_text()
    assert "softmax(logits /" in (tmp_path / "report.md").read_text()


def test_the_row_of_the_base_as_a_retriever_has_the_prompts_of_the_run(tiny_base, tmp_path):
    """What a reranker must beat is its base at its best: read as the run's settings say."""
    c, one = config(tiny_base), groups("test", 10)
    c.model.query_prompt, c.model.passage_prompt = "red ", "whale "
    data = some_data(test={"test": one})
    row = final_rerank._baselines(c, data, one, "fp32", torch.device("cpu"))["retriever"]
    towers = load_towers(tiny_base)
    prompts = ("red ", "whale ")
    expected = retriever_scores(towers, one, one.candidates, precision="fp32", prompts=prompts)
    assert row == final_rerank._judged(one, expected)
    plain = retriever_scores(towers, one, one.candidates, precision="fp32")
    assert row["scores"] != final_rerank._judged(one, plain)["scores"]


def test_evaluation_that_cannot_be_had_is_refused_before_training(tiny_base):
    c = config(tiny_base)
    c.best_metric = "mrr@10"
    with pytest.raises(ValueError, match=r"best_metric \('mrr@10'\) must be one of mrr, map, ndcg"):
        check_dev(c, some_data())
    c.best_metric, c.eval_every = "mrr", 5
    with pytest.raises(ValueError, match="data has none"):
        check_dev(c, some_data())


def test_without_a_dev_set_scores_stay_as_they_are(tiny_base, tmp_path):
    data = some_data(test={"test": groups("test", 10)})
    reranker = spread_out(load_reranker(tiny_base))
    base = evaluate_base(reranker, data, tmp_path, precision="fp32")
    (tmp_path / "metrics.jsonl").write_text("")
    c = config(tiny_base)
    c.examples_shown = 0
    write_result(c, tmp_path, reranker, data, base, Track(), dict(TOTALS), precision="fp32")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["calibration"] is None and reranker.spec.temperature == 1.0
