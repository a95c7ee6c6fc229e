"""What a training run says about itself: base before the first step, dev while it runs, result.json
at the end."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from conf.schema import TrainConfig
from data.datasets import Data
from data.records import RetrievalSet
from evals import figures, report
from evals.bm25 import bm25_hits
from evals.metrics import NAMES, evaluate_hits
from evals.publish import card_of, costs, means_of, publish
from evals.retrieval import Scored, encode_sets, score
from models.export import export
from models.towers import Towers
from runtime.run_dir import write_json_atomic
from runtime.track import Tracker, read_rows

log = logging.getLogger(__name__)

FIRST_HITS = 10  # kept a query and system, for the examples of the report


def evaluate_base(
    towers: Towers, data: Data, dims: Sequence[int], run_dir: Path, *, precision: str
) -> dict:
    """Per-query metrics and first hits of the untrained model on the test sets; read back when a
    run resumes.

    {set: {dim: {"query_ids": [..], "per_query": {metric: [..]}, "first_hits": {query id: [document
    ids]}}}}; the widest dim also has "scores", a sample of relevant and random pairs.
    """
    path = run_dir / "base.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    base = _evaluate(towers, data, data.compared, dims, precision=precision, progress="base")
    write_json_atomic(path, base)
    return base


def _evaluate(
    towers: Towers,
    data: Data,
    sets: Mapping[str, RetrievalSet],
    dims: Sequence[int],
    *,
    precision: str,
    progress: str,
) -> dict:
    embedded = encode_sets(
        towers, sets, prompts=data.prompts, precision=precision, progress=progress
    )
    result = {}
    for name, one in sets.items():
        scored = score(*embedded[name], one, dims)
        result[name] = {str(dim): _plain(s) for dim, s in scored.items()}
        sample = figures.sample_scores(*embedded[name], one)
        result[name][str(dims[0])]["scores"] = {
            kind: x.round(4).tolist() for kind, x in sample.items()
        }
    return result


def _plain(scored: Scored) -> dict:
    metrics, hits = scored.metrics, scored.hits
    return {
        "per_query": {name: value.tolist() for name, value in metrics.per_query.items()},
        "query_ids": metrics.query_ids,
        "first_hits": hits.ids_by_query(FIRST_HITS),
    }


def check_dev(c: TrainConfig, data: Data) -> None:
    """Raise ValueError, before any work, when evaluation during training cannot be had."""
    if c.best_metric not in NAMES:
        raise ValueError(f"best_metric ({c.best_metric!r}) must be one of {', '.join(NAMES)}")
    if c.eval_every and not data.dev:
        raise ValueError(
            "eval_every needs dev queries, but the data has none; set eval_every=0 or"
            " data.dev_fraction"
        )


def evaluate_dev(
    towers: Towers, data: Data, dims: Sequence[int], *, precision: str
) -> dict[str, float]:
    """dev/<metric> at the widest dim, a mean over dev sets; each set's own numbers beside it when
    there are several.
    """
    embedded = encode_sets(towers, data.dev, prompts=data.prompts, precision=precision)
    means = {}
    for name, some in data.dev.items():
        for dim, scored in score(*embedded[name], some, dims).items():
            means[name, dim] = scored.metrics.means
    values: dict[str, float] = {}
    for (name, dim), of_set in means.items():
        prefix = f"dev/{name}/" if len(data.dev) > 1 else "dev/"
        if len(data.dev) > 1 or dim != dims[0]:
            values |= {
                f"{prefix}{metric}/{dim}": v for metric, v in of_set.items() if metric == "ndcg@10"
            }
    for metric in next(iter(means.values())):
        values[f"dev/{metric}"] = float(
            np.mean([of_set[metric] for (_, dim), of_set in means.items() if dim == dims[0]])
        )
    return values


def write_result(
    c: TrainConfig,
    run_dir: Path,
    towers: Towers,
    data: Data,
    dims: Sequence[int],
    base: dict,
    track: Tracker,
    totals: dict[str, float],
    *,
    precision: str,
) -> None:
    """Evaluate, export, report: export/, figures/, report.md and, last of all, result.json.

    totals  steps, examples_per_s, tokens_per_s, train_s of the loop; wall_s up to its end
    """
    tuned = _evaluate(towers, data, data.test, dims, precision=precision, progress="tuned")
    bm25 = {}
    for name, some in data.test.items():
        log.info("BM25 on %s", name)
        scored = Scored(hits := bm25_hits(some, 100), evaluate_hits(hits, some.qrels))
        bm25[name] = _plain(scored)
    sets = {n: _set_result(bm25[n], base.get(n, {}), tuned[n], c.seed) for n in tuned}
    for name, of in sets.items():
        queries, passages = len(data.test[name].query_ids), len(data.test[name].doc_ids)
        of["size"] = f"{queries:,} queries among {passages:,} passages"
    first = next(iter(sets), None)
    result: dict = {"name": c.name, "task": c.task, "seed": c.seed}
    result |= sets[first] if first else {"metrics": {}, "delta": {}}
    result |= {"test_set": first, "other_sets": {n: s for n, s in sets.items() if n != first}}
    result |= costs(run_dir, totals) | {"data": data.report}

    export(towers, run_dir / "export", card_of(c, result, dims=list(dims)))
    examples = ""
    if first and c.examples_shown:
        hits = [of[first][str(dims[0])]["first_hits"] for of in (base, tuned)]
        examples = report.examples_text(
            *hits, data.test[first], count=c.examples_shown, seed=c.seed
        )

    def table(of: dict, markdown: bool) -> str:
        return report.result_table(of["metrics"], of["delta"], markdown=markdown)

    titles = {name: f"nDCG@10 on {name}, {of['size']}" for name, of in sets.items()}
    tables = {titles[n]: table(of, True) for n, of in result["other_sets"].items()}
    publish(
        c, run_dir, result, track, examples=examples,
        tables=report.retrieval_tables(result) | tables,
        shown={titles[n]: table(of, False) for n, of in sets.items()},
        rows=(["system", "dim", "metric", "value"], _rows(result["metrics"])),
        figures=_figures(run_dir, bm25, base, tuned, first, dims),
    )  # fmt: skip


def _rows(metrics: Mapping[str, Mapping]) -> list[list]:
    return [
        [system, dim, metric, value]
        for system, of in metrics.items()
        for dim, values in (of.items() if system != "bm25" else [("", of)])
        for metric, value in values.items()
    ]


def _set_result(bm25: dict, base: dict, tuned: dict, seed: int) -> dict:
    """{"metrics", "delta"} of one set, as in result.json."""

    def against(dim: str) -> dict:
        a, b = base[dim], tuned[dim]
        return report.compare_values(
            a["query_ids"], a["per_query"], b["query_ids"], b["per_query"], seed=seed
        )

    metrics = {"bm25": means_of(bm25["per_query"])} | {
        name: {dim: means_of(one["per_query"]) for dim, one in of.items()}
        for name, of in (("base", base), ("tuned", tuned))
    }
    return {"metrics": metrics, "delta": {dim: against(dim) for dim in base}}


def _figures(
    run_dir: Path, bm25: dict, base: dict, tuned: dict, first: str | None, dims: Sequence[int]
) -> list[Path]:
    folder = run_dir / "figures"
    rows = read_rows(run_dir / "metrics.jsonl")
    made = [figures.plot_training(rows, folder / "training_curve.png")]
    if first is None or not bm25[first]["query_ids"]:
        return made
    values = {
        name: {dim: one["per_query"]["ndcg@10"] for dim, one in of[first].items()}
        for name, of in (("base", base), ("tuned", tuned))
    }
    values["bm25"] = {"": bm25[first]["per_query"]["ndcg@10"]}
    made.append(figures.plot_dims(values, folder / "metric_by_dimension.png"))
    samples = {
        name: {kind: np.array(x) for kind, x in of[first][str(dims[0])]["scores"].items()}
        for name, of in (("base", base), ("tuned", tuned))
    }
    made.append(figures.plot_scores(samples, folder / "score_distribution.png"))
    return made
