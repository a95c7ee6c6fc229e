"""What a reranker's run says about itself: as evals/final.py, for groups of candidates.

Shapes: P pairs.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from conf.schema import ModelConfig, TrainConfig
from data.datasets import prompts_of
from data.groups import GroupData
from data.records import RerankSet
from evals import figures, report
from evals.bm25 import bm25_hits
from evals.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibration_error,
    fit_calibration,
    fit_temperature,
    label_calibration_error,
)
from evals.metrics import RERANK_NAMES
from evals.publish import card_of, costs, means_of, publish
from evals.rerank import (
    Scores,
    bm25_scores,
    candidate_logits,
    evaluate_candidates,
    random_scores,
    retriever_scores,
    scores_of,
)
from evals.significance import bootstrap_ci95
from models.export_reranker import export_reranker
from models.pretrained import load_towers
from models.reranker import Reranker, is_reranker
from models.towers import Towers
from runtime.run_dir import write_json_atomic
from runtime.track import Tracker, read_rows

log = logging.getLogger(__name__)

FIRST_HITS = 10  # kept a query and system, for the examples of the report
FIRST_STAGE_K = 50  # BM25's, where a set brings no candidates
# Collapsed: the spread of scores is rounding, or has shrunk to this share of the untrained model's
# while the order is no better than chance.
NO_SPREAD, SHRUNK = 1e-6, 0.1


def evaluate_base(reranker: Reranker, data: GroupData, run_dir: Path, *, precision: str) -> dict:
    """Per-query metrics of the untrained model on the test sets; read back when a run resumes.

    {set: {"query_ids": [..], "per_query": {metric: [..]}, "first_hits": {query id: [document
    ids]}, "scores": {"positive": [..], "negative": [..]}, "spread": ..}}
    """
    path = run_dir / "base.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    base = {
        name: _judged(one, _scores(reranker, data, one, precision, "base"))
        for name, one in data.compared.items()
    }
    write_json_atomic(path, base)
    return base


def check_dev(c: TrainConfig, data: GroupData) -> None:
    """Raise ValueError, before any work, when evaluation during training cannot be had."""
    if c.best_metric not in RERANK_NAMES:
        raise ValueError(
            f"best_metric ({c.best_metric!r}) must be one of {', '.join(RERANK_NAMES)} for"
            " task=rerank"
        )
    if c.eval_every and not data.dev:
        raise ValueError(
            "eval_every needs dev queries, but the data has none; set eval_every=0 or"
            " data.dev_fraction"
        )


def evaluate_dev(reranker: Reranker, data: GroupData, *, precision: str) -> dict[str, float]:
    """dev/<metric> and dev/spread, means over dev sets; each set's own nDCG@10 beside them when
    there are several.
    """
    found = {}
    for name, one in data.dev.items():
        judged = _judged(one, _scores(reranker, data, one, precision))
        found[name] = means_of(judged["per_query"]) | {"spread": judged["spread"] or 0.0}
    values = {
        f"dev/{key}": float(np.mean([of[key] for of in found.values()]))
        for key in (*RERANK_NAMES, "spread")
    }
    if len(found) > 1:
        values |= {f"dev/{name}/ndcg@10": of["ndcg@10"] for name, of in found.items()}
    return values


def write_result(
    c: TrainConfig,
    run_dir: Path,
    reranker: Reranker,
    data: GroupData,
    base: dict,
    track: Tracker,
    totals: dict[str, float],
    *,
    precision: str,
) -> None:
    """Evaluate, calibrate, export, report: export/, figures/, report.md and, last of all,
    result.json.

    totals  steps, examples_per_s, tokens_per_s, train_s of the loop; wall_s up to its end
    Raises ValueError, before the export, when the scores have collapsed to one.
    """
    tuned = {
        name: _judged(one, _scores(reranker, data, one, precision, "tuned"))
        for name, one in data.test.items()
    }
    dev_logits = {n: _logits(reranker, data, one, precision) for n, one in data.dev.items()}
    systems = {
        name: _baselines(c, data, one, precision, _device(reranker))
        | ({"base": base[name]} if name in base else {})
        | {"tuned": tuned[name]}
        for name, one in data.test.items()
    }
    sets = {name: _set_result(of, data.test[name], c.seed) for name, of in systems.items()}
    first = next(iter(sets), None)
    for one in sets.values():
        check_spread(one["spread"], is_chance=not _beats(one["delta_of"]["random"]), c=c)
    if not sets:
        _check_spread_of_training(c, run_dir, reranker, data, dev_logits)
    result: dict = {"name": c.name, "task": c.task, "seed": c.seed}
    result |= sets[first] if first else {"metrics": {}, "delta": {}}
    result |= {"test_set": first, "other_sets": {n: s for n, s in sets.items() if n != first}}
    result |= costs(run_dir, totals) | {"data": data.report}
    result["calibration"] = _calibrate(reranker, data, dev_logits)

    export_reranker(reranker, run_dir / "export", card_of(c, result))
    examples = ""
    if first and c.examples_shown:
        before = "retriever" if "retriever" in systems[first] else "bm25"
        hits = [systems[first][name]["first_hits"] for name in (before, "tuned")]
        examples = report.examples_text(
            *hits, data.test[first], names=(report.label_of(before), "tuned"),
            count=c.examples_shown, seed=c.seed,
        )  # fmt: skip
    tables, shown = {}, {}
    for name, of in sets.items():
        args = of["metrics"], of["ci95"], of["delta_of"]
        table, against = report.rerank_tables(*args, markdown=True)
        tables |= {f"{name}: {of['size']}": table, f"{name}: tuned against the others": against}
        shown[f"{name}: {of['size']}"] = "\n\n".join(report.rerank_tables(*args))
    if fitted := result["calibration"]:
        share = f"sigmoid(logit / {fitted['temperature']:.3g} {fitted['bias']:+.3g})"
        if reranker.spec.num_labels > 1:
            share = f"softmax(logits / {fitted['temperature']:.3g})"
        tables["Calibration"] = (
            f"{share}, fitted on"
            f" {fitted['pairs']:,} dev pairs"
            " and folded into the last layer of export/: expected calibration error"
            f" {fitted['ece_before']:.3f} before, {fitted['ece_after']:.3f} after."
        )
    rows = [[s, m, value] for s, of in result["metrics"].items() for m, value in of.items()]
    publish(
        c, run_dir, result, track, tables=tables, shown=shown, examples=examples,
        rows=(["system", "metric", "value"], rows),
        figures=_figures(run_dir, systems[first] if first else {}),
    )  # fmt: skip


# -------------------------------------------------------------------------------- scores and sets


def _scores(
    reranker: Reranker, data: GroupData, one: RerankSet, precision: str, progress: str = ""
) -> Scores:
    logit_PL = _logits(reranker, data, one, precision, progress)
    return scores_of(reranker, one.candidates, logit_PL)


def _logits(
    reranker: Reranker, data: GroupData, one: RerankSet, precision: str, progress: str = ""
) -> np.ndarray:
    with_candidates(one)
    prompts = data.prompts.get(one.name, (None, None))
    return candidate_logits(
        reranker, one, one.candidates, precision=precision, progress=progress, prompts=prompts
    )


def with_candidates(one: RerankSet) -> None:
    """Give a set that brings no candidates BM25's first documents; in place, so that every
    evaluation of a run puts the same ones in order."""
    if one.candidates is None:
        one.candidates = bm25_hits(one, FIRST_STAGE_K).ids_by_query()
        log.info(
            "%s brings no candidates: BM25's first %d a query are put in order",
            one.name, FIRST_STAGE_K,
        )  # fmt: skip


def _judged(one: RerankSet, scores: Scores) -> dict:
    """Metrics, first hits, scores of relevant and other pairs, and the spread, ready for JSON."""
    scored = evaluate_candidates(one, scores)
    score_P, grade_P = _pairs(one, scores)
    return {
        "per_query": {name: value.tolist() for name, value in scored.metrics.per_query.items()},
        "query_ids": scored.metrics.query_ids,
        "first_hits": scored.hits.ids_by_query(FIRST_HITS),
        "scores": {
            "positive": score_P[grade_P > 0].round(4).tolist(),
            "negative": score_P[grade_P <= 0].round(4).tolist(),
        },
        "spread": spread_of(scores),
    }


def _pairs(one: RerankSet, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """(score, grade) of every candidate of every query, end to end."""
    return np.concatenate([np.zeros(0, np.float32), *scores.values()]), _grades(one)


def _grades(one: RerankSet) -> np.ndarray:
    grades = [one.qrels.get(q, {}).get(d, 0) for q, ids in one.candidates.items() for d in ids]
    return np.array(grades, np.float64)


def spread_of(scores: Scores) -> float | None:
    """Standard deviation of the scores of one query's candidates, a mean over queries; None where
    no query has two."""
    stds = [float(np.std(x, dtype=np.float64)) for x in scores.values() if len(x) > 1]
    return float(np.mean(stds)) if stds else None


def check_spread(spread: Mapping[str, float | None], *, is_chance: bool, c: TrainConfig) -> None:
    """Raise ValueError for a tuned reranker that gives all candidates of a query one score.

    spread     "tuned" and, where the untrained model was asked, "base"
    is_chance  its order is no better than a random one
    """
    tuned, base = spread["tuned"], spread.get("base") or 0.0
    if tuned is None or (tuned > NO_SPREAD and not (is_chance and tuned < SHRUNK * base)):
        return
    raise ValueError(
        f"the reranker has collapsed: its scores of one query's candidates differ by {tuned:.1g}"
        f" (standard deviation; {base:.1g} before training), so it puts nothing in order. What"
        f" helps: a lower optim.lr ({c.optim.lr:g} now) with a higher optim.head_lr, a longer"
        f" optim.warmup ({c.optim.warmup:g}), a listwise loss (loss=softmax), model.pooling=mean,"
        " more steps or all rows; eval_every= shows dev/spread on the way"
    )


def _check_spread_of_training(
    c: TrainConfig,
    run_dir: Path,
    reranker: Reranker,
    data: GroupData,
    dev_logits: Mapping[str, np.ndarray],
) -> None:
    """check_spread of a run without a test set: by dev, against the spread of the first training
    steps; without dev as well, by that of the last ones."""
    spreads = [row["spread"] for row in read_rows(run_dir / "metrics.jsonl") if "spread" in row]
    for name, logit_PL in dev_logits.items():
        one = data.dev[name]
        scores = scores_of(reranker, one.candidates, logit_PL)
        chance, tuned = (_judged(one, s) for s in (random_scores(one.candidates, c.seed), scores))
        gain = report.compare_values(
            chance["query_ids"], chance["per_query"], tuned["query_ids"], tuned["per_query"],
            seed=c.seed,
        )  # fmt: skip
        spread = {"tuned": tuned["spread"], "base": spreads[0] if spreads else None}
        check_spread(spread, is_chance=not _beats(gain), c=c)
    if not dev_logits and spreads:
        check_spread({"tuned": spreads[-1]}, is_chance=False, c=c)


def _beats(gain: Mapping[str, Mapping]) -> bool:
    return gain["mrr"]["diff"] > 0 and gain["mrr"]["p"] <= 0.05


def _baselines(
    c: TrainConfig, data: GroupData, one: RerankSet, precision: str, device: torch.device
) -> dict[str, dict]:
    """Chance, BM25 and, where the base is none that reranks, the untuned base as a retriever."""
    with_candidates(one)
    found = {
        "random": random_scores(one.candidates, c.seed),
        "bm25": bm25_scores(one, one.candidates),
    }
    try:
        if not is_reranker(c.model.base, c.model.revision):
            towers = _base_as_retriever(c.model).to(device)
            found["retriever"] = retriever_scores(
                towers, one, one.candidates, precision=precision, progress="base as retriever",
                prompts=data.prompts.get(one.name, (None, None)),
            )  # fmt: skip
    except ValueError as e:  # the base is an encoder that a reranker can start from, no retriever
        log.warning("no row for %s as a retriever: %s", c.model.base, e)
    return {name: _judged(one, scores) for name, scores in found.items()}


def _base_as_retriever(c: ModelConfig) -> Towers:
    """The encoder that the run started from, whole and untuned, with the run's prompts."""
    own = ModelConfig(base=c.base, revision=c.revision, adapter=c.adapter)
    towers = load_towers(c.base, own)
    spec = towers.spec
    spec.query_prompt, spec.passage_prompt = prompts_of(c, spec)
    return towers


def _set_result(systems: Mapping[str, dict], one: RerankSet, seed: int) -> dict:
    """{"metrics", "ci95", "delta", "delta_of", "spread", "size"} of one set, as in result.json.

    delta     metric -> tuned - base
    delta_of  system -> metric -> tuned - system
    """
    tuned = systems["tuned"]
    delta_of = {
        name: report.compare_values(
            of["query_ids"], of["per_query"], tuned["query_ids"], tuned["per_query"], seed=seed
        )
        for name, of in systems.items()
        if name != "tuned"
    }
    if not _beats(delta_of["random"]):
        log.warning("%s: the reranker's order is no better than a random one", one.name)
    counts = [len(ids) for ids in one.candidates.values()]
    num = np.mean(counts) if counts else 0.0
    return {
        "metrics": {name: means_of(of["per_query"]) for name, of in systems.items()},
        "ci95": {name: bootstrap_ci95(of["per_query"], seed) for name, of in systems.items()},
        "delta": delta_of.get("base", {}),
        "delta_of": delta_of,
        "spread": {name: of["spread"] for name, of in systems.items()},
        "size": f"{len(one.query_ids):,} queries with {num:.1f} candidates each",
    }


def _calibrate(
    reranker: Reranker, data: GroupData, logits: Mapping[str, np.ndarray]
) -> dict | None:
    """Fit temperature and bias on all dev pairs and set them in the reranker's spec, for export;
    of several labels the temperature alone. None without a dev set.

    logits  dev set -> (P, L) of its candidates
    """
    if not logits:
        log.info("not calibrated: no dev set")
        return None
    spec = reranker.spec
    logit_PL = np.concatenate(list(logits.values()))
    grade_P = np.concatenate([_grades(data.dev[name]) for name in logits])
    if spec.num_labels == 1:
        what, logit_P = "sigmoid", logit_PL[:, 0]
        spec.temperature, spec.bias = fit_calibration(logit_P, grade_P)
        before = calibration_error(logit_P, grade_P)
        after = calibration_error(logit_P, grade_P, spec.temperature, spec.bias)
    else:
        what, label_P = "softmax", grade_P.clip(0, spec.num_labels - 1)
        spec.temperature = fit_temperature(logit_PL, label_P)
        before = label_calibration_error(logit_PL, label_P)
        after = label_calibration_error(logit_PL, label_P, spec.temperature)
    log.info(
        "calibration on %d dev pairs: temperature %.3g, bias %.3g, expected calibration error of"
        " the %s %.3f -> %.3f",
        len(grade_P), spec.temperature, spec.bias, what, before, after,
    )  # fmt: skip
    if not MIN_TEMPERATURE * 1.01 < spec.temperature < MAX_TEMPERATURE / 1.01:
        log.warning(
            "the temperature is at its bound: the %s of these logits is no probability; use the"
            " scores to rank",
            what,
        )
    return {
        "temperature": spec.temperature,
        "bias": spec.bias,
        "ece_before": before,
        "ece_after": after,
        "pairs": len(grade_P),
    }


def _device(reranker: Reranker) -> torch.device:
    return next(reranker.parameters()).device


def _figures(run_dir: Path, systems: Mapping[str, dict]) -> list[Path]:
    folder = run_dir / "figures"
    rows = read_rows(run_dir / "metrics.jsonl")
    made = [figures.plot_training(rows, folder / "training_curve.png")]
    samples = {
        name: {kind: np.array(x) for kind, x in of["scores"].items()}
        for name, of in systems.items()
        if name in ("base", "tuned")
    }
    if samples:
        path = folder / "score_distribution.png"
        made.append(figures.plot_scores(samples, path, score="logit", others="other candidates"))
    return made
