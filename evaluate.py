"""Evaluate a model: python evaluate.py model=<run, folder or hub id> data=<BEIR folder>

A retriever searches all documents: every text is encoded once, every dimension and storage
precision comes from the same embeddings. A cross-encoder reranks: what first_stage= finds, or the
candidates that the data brings (first_stage=data); with also=[...] several models side by side,
with fuse= its scores and another's averaged. Settings: conf/schema.py, EvaluateConfig. Prints
tables; with out=<folder> also writes eval.json (means, intervals and the value of every query) and
run.trec.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.schema import EvaluateConfig, SourceConfig
    from data.records import BadRows, RerankSet, RetrievalSet
    from evals.eval_file import System
    from evals.metrics import Metrics
    from evals.rerank import Candidates, Scores
    from evals.search import Hits

log = logging.getLogger("evaluate")

COMPARED = ("ndcg@10", "accuracy@1")  # metrics of the table of differences; eval.json has all


def run(c: "EvaluateConfig", out: Path | None = None) -> dict[str, Any]:
    """Evaluate c.model on c.data, print the tables, write files where asked, return the content of
    eval.json.

    out  folder for the files; None: c.out, and no files without it
    Raises ValueError for what the user can put right: unknown split, dim over the model's width,
    missing folder, an `out` that holds another evaluation, an `against` on other queries.
    """
    from evals.eval_file import check_out, inputs_of, write_files

    out = Path(c.out) if out is None and c.out else out
    inputs = inputs_of(c)
    if out is not None:
        check_out(out, inputs)
    with own_names(), bad_rows(c, out) as bad:
        reranks = is_reranking(c)
        found, hits = rerank(c, bad) if reranks else retrieve(c, bad)
    result = inputs | found | {"num_bad_rows": bad.count}
    print(rerank_tables(result) if reranks else tables(result, c))
    if out is not None:
        write_files(out, result, hits)
    return result


def is_reranking(c: "EvaluateConfig") -> bool:
    """Whether candidates are put in order, rather than all documents searched."""
    from evals.systems import kind_of

    is_asked = bool(c.first_stage or c.also or c.fuse or c.texts)
    return is_asked or kind_of(c.model) in ("random", "reranker")


# ---------------------------------------------------------------------------------------- retrieval


def retrieve(c: "EvaluateConfig", bad: "BadRows") -> tuple[dict[str, Any], "dict[str, Hits]"]:
    """What eval.json holds beside the settings, and hits by label."""
    from conf.schema import SourceConfig
    from data.formats import read_retrieval_set
    from evals import report
    from evals.eval_file import is_eval, read_eval
    from evals.metrics import names_up_to
    from evals.run_file import check_ids
    from evals.systems import kind_of, vector_label

    source = SourceConfig(root=c.data, columns=c.columns)
    data = read_retrieval_set(source, split_in(source, c.split), bad)
    if c.out:
        check_ids(data)
    names = names_up_to(c.top_k)
    other = None
    if c.against and is_eval(Path(c.against)):
        other = read_eval(Path(c.against), data, c.precision)
        if kind_of(c.model) == "retriever":
            # before anything is encoded; dim 0: the width that the model has
            for dim, precision in product(c.dims or [0], c.precisions):
                counterpart(vector_label(dim, precision, c), other, bool(c.dims))
    system = evaluate_model(c.model, data, c, names)
    if c.against and other is None:
        other = evaluate_model(c.against, data, c, names)
    bm25 = None
    if c.bm25 and c.model != "bm25":
        bm25 = other if c.against == "bm25" else evaluate_model("bm25", data, c, names)

    result = numbers(system.metrics | ({} if bm25 is None else bm25.metrics), data, c)
    result["bytes_per_document"] = {
        label: hits.bytes_per_doc for label, hits in system.hits.items()
    }
    if bm25 is not None:
        result["gain_over_bm25"] = {
            label: report.compare(bm25.metrics["bm25"], metrics, seed=c.seed)
            for label, metrics in system.metrics.items()
        }
    if other is not None:
        pairs = {label: counterpart(label, other, bool(c.dims)) for label in system.metrics}
        result["against_result"] = {
            "name": other.name,
            "label": pairs,
            "metrics": {label: other.metrics[theirs].means for label, theirs in pairs.items()},
            "delta": {
                label: report.compare(other.metrics[theirs], system.metrics[label], seed=c.seed)
                for label, theirs in pairs.items()
            },
        }
    return result, system.hits | ({} if bm25 is None or bm25 is other else bm25.hits)


def evaluate_model(
    model: str, data: "RetrievalSet", c: "EvaluateConfig", names: list[str]
) -> "System":
    """Search and metrics at every dim and precision, from one encoding."""
    from evals.eval_file import System
    from evals.metrics import evaluate_hits
    from evals.systems import search_by

    hits = search_by(model, data, c.top_k, c, c.dims)
    return System(
        model, {label: evaluate_hits(h, data.qrels, names) for label, h in hits.items()}, hits
    )


def counterpart(label: str, other: "System", dims_were_asked: bool) -> str:
    """The label of `other` that `label` is compared with: the same dim and precision; else its only
    one, or its full width at that precision."""
    if label in other.metrics:
        return label
    found = [theirs for theirs in other.metrics if theirs != "bm25"]
    dim, _, precision = label.partition(" ")
    same = [theirs for theirs in found if theirs.partition(" ")[2] in ("", precision)]
    if not dim.isdigit() or not any(theirs[0].isdigit() for theirs in found):
        same, dims_were_asked = found, False  # a side without vectors: nothing has to agree
    if not found or (same and not dims_were_asked):
        return same[0] if found else "bm25"
    what = [f"{dim} dimensions"] if dim != "0" else []
    what = " and ".join([*what, precision] if precision else what) or "one precision"
    raise ValueError(
        f"against={other.name} has no results at {what}, only at {', '.join(found)}; evaluate it at"
        " the same dims= and precision=, or give the model itself as against="
    )


# ---------------------------------------------------------------------------------------- reranking


def rerank(c: "EvaluateConfig", bad: "BadRows") -> tuple[dict[str, Any], "dict[str, Hits]"]:
    """As retrieve(), for c.model and c.also on the same candidates; the first system, which is the
    first stage where there is one, is what the others are compared with."""
    from evals import report
    from evals.eval_file import read_eval
    from evals.fusion import fused
    from evals.metrics import evaluate_hits
    from evals.run_file import check_ids
    from evals.systems import kind_of, labels_of, scores_by

    if c.against:
        raise ValueError(
            f"against={c.against} compares retrievers; put it in also=[...], which takes models and"
            " the eval.json of an earlier evaluation"
        )
    if len(c.precisions) > 1:
        raise ValueError(
            f"precision ({c.precision}): a first stage searches at one, candidates need none"
        )
    if c.first_stage in (None, "data") and c.precision != "fp32":
        raise ValueError(
            f"precision ({c.precision}) is of the vectors that a first stage searches; the data's"
            " candidates are scored one by one: leave it out, or set first_stage="
        )
    if len(c.dims) > 1:
        raise ValueError(f"dims ({c.dims}): of a retriever that scores candidates one is shown")
    data = read_candidates(c, c.split, bad)
    if c.out:
        check_ids(data)
    fusion = fit_fusion(c, bad) if c.fuse else None
    models = [c.model, *c.also]
    first, candidates, names = find_candidates(c, data)
    if first is not None:
        models.insert(0, c.first_stage)
    label_of = dict(zip(models, labels_of(models), strict=True))
    metrics: dict[str, Metrics] = {}
    hits: dict[str, Hits] = {}
    scores_of: dict[str, Scores] = {}
    time: dict[str, dict] = {}
    for model, label in label_of.items():
        if model != c.model and kind_of(model) == "eval":
            metrics[label] = next(iter(read_eval(Path(model), data).metrics.values()))
            continue
        if first is not None and model == c.first_stage:
            hits[label] = first
        else:
            scores_of[model], taken = scores_by(model, data, candidates, c)
            if taken:
                time[label] = taken
            hits[label] = in_order(c, data, first, scores_of[model])
        metrics[label] = evaluate_hits(hits[label], data.qrels, list(names))
    if fusion:
        if c.fuse not in scores_of:
            scores_of[c.fuse], _ = scores_by(c.fuse, data, candidates, c)
        label = fusion["label"] = "+".join(labels_of([c.model, c.fuse]))
        both = fused(scores_of[c.model], scores_of[c.fuse], fusion["weight"])
        hits[label] = in_order(c, data, first, both)
        metrics[label] = evaluate_hits(hits[label], data.qrels, list(names))
    result = numbers(metrics, data, c)
    reference, *others = metrics
    result["systems"] = {label: model for model, label in label_of.items()}
    result["candidates"] = describe(candidates, data)
    result["reference"] = reference
    result["delta"] = {
        label: report.compare(metrics[reference], metrics[label], seed=c.seed) for label in others
    }
    if fusion:
        result["fusion"] = fusion
    result["time"] = time  # all that depends on the clock
    own = label_of[c.model]  # run.trec is the model's
    return result, {own: hits[own]} | hits


def find_candidates(
    c: "EvaluateConfig", data: "RerankSet"
) -> "tuple[Hits | None, Candidates, Sequence[str]]":
    """(hits of the first stage where there is one, what is put in order, names of the metrics)."""
    from evals.metrics import RERANK_NAMES, names_up_to
    from evals.systems import search_by

    if c.first_stage in (None, "data"):
        return None, data.candidates, RERANK_NAMES
    depth = max(c.top_k, c.rerank_k)
    (first,) = search_by(c.first_stage, data, depth, c, c.dims).values()
    return first, first.ids_by_query(c.rerank_k), names_up_to(depth)


def in_order(
    c: "EvaluateConfig", data: "RerankSet", first: "Hits | None", scores: "Scores"
) -> "Hits":
    """All candidates by these scores, or the first stage's best, with the rest below them."""
    from evals.rerank import candidate_hits, reordered

    return candidate_hits(data, scores) if first is None else reordered(first, c.rerank_k, scores)


def fit_fusion(c: "EvaluateConfig", bad: "BadRows") -> dict[str, Any]:
    """{"with", "weight"} of c.fuse, and where the weight was chosen on split dev {"dev": nDCG@10 at
    each weight}. Raises ValueError, before the long work, where there is no such split to choose on
    and for a fuse= that has no scores."""
    from evals.fusion import METRIC, best_weight
    from evals.metrics import evaluate_hits
    from evals.systems import kind_of, scores_by

    if (kind := kind_of(c.fuse)) in ("run", "eval"):
        raise ValueError(
            f"fuse={c.fuse} is {'a run file' if kind == 'run' else 'an eval.json'}, which has no"
            " score for every candidate; want a retriever, a cross-encoder or bm25"
        )
    found: dict[str, Any] = {"with": c.fuse, "weight": c.fuse_weight}
    if c.fuse_weight is not None:
        return found
    remedy = "; or give the model's share yourself, fuse_weight=0.5"
    if is_dev(c):
        raise ValueError(f"split={c.split} would be judged by a weight chosen on it{remedy}")
    if c.first_stage and kind_of(c.first_stage) == "run":
        raise ValueError(
            f"first_stage={c.first_stage} has the {c.split} queries alone, and the weight of"
            f" fuse= is chosen on those of split dev{remedy}"
        )
    try:
        data = read_candidates(c, "dev", bad)
    except ValueError as e:
        raise ValueError(f"the weight of fuse= is chosen on split dev: {e}{remedy}") from e
    first, candidates, _ = find_candidates(c, data)
    quiet = replace(c, latency_queries=0)
    scores, others = (scores_by(m, data, candidates, quiet)[0] for m in (c.model, c.fuse))

    def judge(both: "Scores") -> "Metrics":
        return evaluate_hits(in_order(c, data, first, both), data.qrels, [METRIC])

    found["weight"], found["dev"] = best_weight(scores, others, judge)
    return found


def is_dev(c: "EvaluateConfig") -> bool:
    """Whether c.split is what the data has as dev, by whatever name, or the one file dev.jsonl."""
    from conf.schema import SourceConfig
    from data.formats import available_splits, resolve_split

    source = SourceConfig(root=c.data, texts=c.texts, columns=c.columns)
    try:
        dev = resolve_split(source, "dev")
        return not available_splits(source) or resolve_split(source, c.split) == dev
    except ValueError:  # one of them is not there, which its reader says
        return False


def read_candidates(c: "EvaluateConfig", split: str, bad: "BadRows") -> "RerankSet":
    """A split of the data. Raises ValueError where nothing says which documents are to be put in
    order."""
    from conf.schema import SourceConfig
    from data.formats import read_rerank_set

    source = SourceConfig(root=c.data, texts=c.texts, columns=c.columns)
    data = read_rerank_set(source, split_in(source, split), bad)
    if c.first_stage in (None, "data") and data.candidates is None:
        raise ValueError(
            f"{c.model} puts candidates in order, and data={c.data} brings none; add"
            " first_stage=bm25 (or a retriever, or a run file), or name a file of labelled rows"
        )
    return data


def split_in(source: "SourceConfig", split: str) -> str | None:
    """`split`, or None, which is all rows, for one file that has no splits."""
    from data.formats import available_splits

    if split == "test" and Path(str(source.root)).is_file() and not available_splits(source):
        log.info("%s has no splits: every row of it is evaluated", source.root)
        return None
    return split


def describe(candidates: Mapping[str, list[str]], data: "RetrievalSet") -> dict[str, float]:
    """How many candidates, and for what share of the queries an answer is among them."""
    judged = [query_id for query_id in data.query_ids if data.qrels.get(query_id)]
    answered = [
        any(data.qrels[query_id].get(doc_id, 0) > 0 for doc_id in candidates.get(query_id, ()))
        for query_id in judged
    ]
    counts = [len(candidates.get(query_id, ())) for query_id in judged]
    num = max(1, len(judged))
    return {
        "mean": sum(counts) / num,
        "most": max(counts, default=0),
        "with_answer": sum(answered) / num,
    }


# ------------------------------------------------------------------------------------- what is said


def numbers(
    metrics: "Mapping[str, Metrics]", data: "RetrievalSet", c: "EvaluateConfig"
) -> dict[str, Any]:
    """The part of eval.json that every evaluation has: sizes, means, intervals, every query."""
    from evals.eval_file import digest_of
    from evals.significance import bootstrap_ci95

    first = next(iter(metrics.values()))
    return {
        "num_documents": len(data.doc_ids),
        "num_queries": len(first.query_ids),
        "num_unjudged": first.num_unjudged + data.num_unjudged,
        "test_set": digest_of(data),
        "metrics": {label: one.means for label, one in metrics.items()},
        "ci95": {label: bootstrap_ci95(one.per_query, c.seed) for label, one in metrics.items()},
        "per_query": {
            "query_ids": first.query_ids,
            "values": {
                label: {name: value_J.tolist() for name, value_J in one.per_query.items()}
                for label, one in metrics.items()
            },
        },
    }


def bad_rows(c: "EvaluateConfig", out: Path | None) -> "BadRows":
    """What is done about rows of the data that cannot be read; listed in `out` where they are
    skipped."""
    from data.records import BadRows

    if out is None:
        return BadRows(c.on_bad_row, setting="on_bad_row")
    list_path = out / "bad_rows.jsonl"
    list_path.unlink(missing_ok=True)  # of an evaluation before this one
    return BadRows(c.on_bad_row, list_path, "on_bad_row")


@contextmanager
def own_names() -> Iterator[None]:
    """Errors name train.py's settings; those that evaluate.py has too have other names here."""
    names = {"data.root": "data", "data.texts": "texts", "data.columns": "columns"}
    names["model.base"] = "model"
    try:
        yield
    except ValueError as e:
        message = re.sub("|".join(map(re.escape, names)), lambda m: names[m[0]], str(e))
        raise ValueError(message) from e


def sizes(result: Mapping[str, Any]) -> str:
    left_out = f", {result['num_unjudged']} unjudged left out" if result["num_unjudged"] else ""
    bad = f", {result['num_bad_rows']} bad rows left out" if result["num_bad_rows"] else ""
    documents = f"{result['num_documents']:,} documents{bad}"
    return f"{result['num_queries']:,} queries{left_out}, {documents}"


def rerank_tables(result: Mapping[str, Any]) -> str:
    """What is printed of models side by side."""
    from evals import report
    from evals.metrics import RERANK_NAMES

    metrics, reference, of = result["metrics"], result["reference"], result["candidates"]
    is_whole = result["first_stage"] in (None, "data")
    by = "of the data" if is_whole else f"by {reference}, the first {result['rerank_k']} reranked"
    names = RERANK_NAMES if is_whole else report.SHOWN_METRICS
    with_interval = RERANK_NAMES if is_whole else ("mrr@10", "map@100", "ndcg@10")
    compared = report.RERANK_COMPARED if is_whole else COMPARED
    parts = [
        f"\n{result['data']} ({result['split']}): {sizes(result)}\n{of['mean']:.1f} candidates a"
        f" query {by}; an answer is among them for {of['with_answer']:.1%} of the queries\n",
        report.metrics_table(metrics, names, intervals=result["ci95"], interval_of=with_interval),
    ]
    if result["delta"]:
        parts += [
            "",
            report.against_table(
                result["delta"], dict.fromkeys(metrics, metrics[reference]), metrics, compared,
                before_name=report.label_of(reference), after_name="this",
            ),
        ]  # fmt: skip
    if fusion := result.get("fusion"):
        chosen = "given" if "dev" not in fusion else "chosen on split dev"
        parts.append(f"\nfused: {fusion['weight']:g} of the model's scores, {chosen}")
    for label, taken in result["time"].items():
        parts.append(
            f"\n{label}: {taken['median_ms']:.0f} ms a query (median; p90 {taken['p90_ms']:.0f})"
            f" for {taken['passages']:.0f} passages, one query at a time, {taken['queries']} timed"
        )
    return "\n".join(parts)


def tables(result: Mapping[str, Any], c: "EvaluateConfig") -> str:
    """What is printed of a retriever."""
    from evals import report

    metrics = result["metrics"]
    order = [
        *(["bm25"] if "bm25" in metrics else []),
        *(label for label in metrics if label != "bm25"),
    ]
    shown = {
        label: f"dim {label.replace(' ', ', ')}"
        if label.partition(" ")[0].isdigit()
        else report.label_of(label)
        for label in order
    }
    parts = [
        f"\n{c.model} on {c.data} ({c.split}): {sizes(result)}, {', '.join(c.precisions)} document"
        " vectors\n",
        report.metrics_table(
            {shown[label]: metrics[label] for label in order},
            intervals={shown[label]: result["ci95"][label] for label in order},
        ),
    ]
    if "gain_over_bm25" in result:
        gains = {shown[label]: delta for label, delta in result["gain_over_bm25"].items()}
        before = {label: metrics["bm25"] for label in gains}
        after = {shown[label]: metrics[label] for label in result["gain_over_bm25"]}
        parts.append(
            "\n"
            + report.against_table(
                gains, before, after, COMPARED, before_name="BM25", after_name="model"
            )
        )
    told = "gain_over_bm25" in result  # the table above is the one against BM25
    if "against_result" in result and not (told and result["against_result"]["name"] == "bm25"):
        other = result["against_result"]
        gains = {shown[label]: delta for label, delta in other["delta"].items()}
        before = {shown[label]: values for label, values in other["metrics"].items()}
        after = {shown[label]: metrics[label] for label in other["metrics"]}
        parts.append(f"\nagainst {other['name']}")
        parts.append(
            report.against_table(
                gains, before, after, COMPARED, before_name="against", after_name="model"
            )
        )
    return "\n".join(parts)


if __name__ == "__main__":
    from conf.cli import main
    from conf.schema import EvaluateConfig

    main(EvaluateConfig, "evaluate", run)
