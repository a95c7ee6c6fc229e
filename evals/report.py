"""What people read: result tables, three queries before and after, report.md.

Everything takes plain data in the layout of result.json (docs/design.md):
metrics  {"bm25": {"ndcg@10": ..}, "base": {"384": {"ndcg@10": ..}}, "tuned": {..}}; bm25 has no
         dimension
delta    {"384": {"ndcg@10": {"diff", "ci95": [low, high], "p", "n"}}}                  tuned - base
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.metrics import RERANK_NAMES, Metrics
from evals.significance import paired_all

if TYPE_CHECKING:
    from data.records import RetrievalSet

SHOWN_METRICS = ("accuracy@1", "recall@5", "recall@100", "mrr@10", "ndcg@10", "map@100")
RERANK_COMPARED = ("mrr", "ndcg@10")  # MAP is close to MRR where most queries have one answer
LABELS = {"bm25": "BM25", "ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}


# ----------------------------------------------------------------------------------------------
# comparisons


def compare(a: Metrics, b: Metrics, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """metric -> paired difference b - a (evals/significance.py). Raises ValueError unless the
    queries are the same.
    """
    return compare_values(a.query_ids, a.per_query, b.query_ids, b.per_query, seed=seed)


def compare_values(
    a_ids: Sequence[str],
    a: Mapping[str, Sequence[float]],
    b_ids: Sequence[str],
    b: Mapping[str, Sequence[float]],
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """As compare(), from query ids and per-query values; the two may list their queries in another
    order."""
    if set(a_ids) != set(b_ids):
        only_a, only_b = sorted(set(a_ids) - set(b_ids)), sorted(set(b_ids) - set(a_ids))
        raise ValueError(
            f"a paired comparison needs the same queries on both sides: {len(only_a)} are in the"
            f" first alone (such as {only_a[:3]}), {len(only_b)} in the second alone"
            f" ({only_b[:3]}); same data= and split=?"
        )
    place = {query_id: at for at, query_id in enumerate(a_ids)}
    order = [place[query_id] for query_id in b_ids]
    shared = [name for name in b if name in a]
    return paired_all(
        {name: np.asarray(a[name], dtype=np.float64)[order] for name in shared},
        {name: b[name] for name in shared},
        seed,
    )


# ------------------------------------------------------------------------------------------- tables


def label_of(name: str) -> str:
    """How a metric or system is written for people: ndcg@10 -> nDCG@10, bm25 -> BM25."""
    family, at, cutoff = name.partition("@")
    return LABELS.get(family, family.capitalize() if at else family) + at + cutoff


def p_text(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def gain_text(delta: Mapping[str, Any]) -> str:
    """+.052 [+.031, +.074]"""
    low, high = delta["ci95"]
    return f"{_signed(delta['diff'])} [{_signed(low)}, {_signed(high)}]"


def _signed(x: float) -> str:
    return f"{x:+.3f}".replace("-0.000", "+0.000").replace("0.", ".", 1)


def _share(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.3f}".removeprefix("0") if x < 0.9995 else f"{x:.3f}"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False
) -> str:
    """An aligned table, first column to the left, the others to the right; no final newline."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|".join(
            (":" if i == 0 else "-") + "-" * width + ("-" if i == 0 else ":")
            for i, width in enumerate(widths)
        )
        return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def result_table(
    metrics: Mapping[str, Mapping],
    delta: Mapping[str, Mapping],
    metric: str = "ndcg@10",
    *,
    markdown: bool = False,
) -> str:
    """BM25, base, tuned, gain with 95% interval and p: one row a dimension, greatest first.

    Columns that nothing is known of are left out.
    """
    dims = sorted(metrics.get("tuned", metrics.get("base", {})), key=int, reverse=True)
    columns: dict[str, list[str]] = {"dim": dims}
    bm25 = metrics.get("bm25", {}).get(metric)
    if bm25 is not None:
        columns["BM25"] = [_share(bm25)] * len(dims)
    for name in ("base", "tuned"):
        if metrics.get(name):
            columns[name] = [_share(metrics[name].get(dim, {}).get(metric)) for dim in dims]
    if delta:
        gains = [delta.get(dim, {}).get(metric) for dim in dims]
        columns["gain [95% interval]"] = [gain_text(d) if d else "-" for d in gains]
        columns["p"] = [p_text(d["p"]) if d else "-" for d in gains]
    rows = list(zip(*columns.values(), strict=True))
    return text_table(list(columns), rows, markdown=markdown)


def metrics_table(
    systems: Mapping[str, Mapping[str, float]],
    names: Sequence[str] = SHOWN_METRICS,
    *,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    interval_of: Sequence[str] = ("ndcg@10",),
    markdown: bool = False,
) -> str:
    """One row a system, one column a metric.

    intervals    system -> metric -> 95% interval
    interval_of  metrics that have it shown beside them
    """
    names = [name for name in names if any(name in values for values in systems.values())]
    with_interval = [name for name in names if intervals and name in interval_of]
    header = [""]
    for name in names:
        header += [label_of(name), "[95% interval]"] if name in with_interval else [label_of(name)]
    rows = []
    for system, values in systems.items():
        row = [label_of(system)]
        for name in names:
            row.append(_share(values.get(name)))
            if name in with_interval:
                found = intervals.get(system, {}).get(name)
                row.append("[{}, {}]".format(*map(_share, found)) if found else "")
        rows.append(row)
    return text_table(header, rows, markdown=markdown)


def against_table(
    deltas: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    *,
    before_name: str,
    after_name: str,
    markdown: bool = False,
) -> str:
    """Paired differences after - before: one row a system and metric."""
    rows = []
    for system, delta in deltas.items():
        for name in names:
            if name in delta:
                d = delta[name]
                rows.append(
                    [
                        f"{label_of(system)} {label_of(name)}",
                        _share(before[system][name]),
                        _share(after[system][name]),
                        gain_text(d),
                        p_text(d["p"]),
                    ]
                )
    header = ["", before_name, after_name, "difference [95% interval]", "p"]
    return text_table(header, rows, markdown=markdown)


# ----------------------------------------------------------------------------------------- examples


def examples_text(
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    data: "RetrievalSet",
    *,
    names: tuple[str, str] = ("before", "after"),
    count: int = 3,
    first: int = 3,
    seed: int = 0,
    width: int = 96,
) -> str:
    """`count` queries with their first hits before and after; a star marks a relevant document.

    before, after  query id -> document ids, best first (Hits.ids_by_query())
    names          what the two are called
    first          hits shown; all that are given decide where the first answer stands
    Drawn at random (seeded) among the queries whose first hit changed, for better or worse, so that
    they illustrate and do not flatter; filled up with others when there are too few.
    """
    texts = dict(zip(data.doc_ids, data.doc_texts, strict=True))
    asked = dict(zip(data.query_ids, data.query_texts, strict=True))
    judged = [q for q in data.query_ids if data.qrels.get(q) and q in before and q in after]
    shuffled = [judged[i] for i in np.random.default_rng(seed).permutation(len(judged))]
    shuffled.sort(key=lambda q: list(before[q][:1]) == list(after[q][:1]))
    blocks = []
    for query_id in shuffled[:count]:
        relevant = {doc_id for doc_id, grade in data.qrels[query_id].items() if grade > 0}
        lines = [_cut(f"Q: {_flat(asked[query_id])}", width)]
        for name, found in zip(names, (before[query_id], after[query_id]), strict=True):
            rank = next((i for i, doc_id in enumerate(found, 1) if doc_id in relevant), None)
            place = f"answer at rank {rank}" if rank else f"no answer among the first {len(found)}"
            lines.append(f"  {name}: {place}")
            for i, doc_id in enumerate(found[:first], 1):
                star = "*" if doc_id in relevant else " "
                lines.append(f"   {star}{i}. {_cut(_flat(texts[doc_id]), width - 7)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 4].rstrip() + " ..."


# ---------------------------------------------------------------------------------------- report.md


def retrieval_tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Title -> table in Markdown, of the metrics and deltas of a result.json."""
    metrics, delta = result["metrics"], result.get("delta", {})
    if not metrics:
        return {}
    tables = {
        label_of(metric): result_table(metrics, delta, metric, markdown=True)
        for metric in ("ndcg@10", "accuracy@1")
    }
    dims = sorted(metrics.get("tuned", metrics.get("base", {})), key=int, reverse=True)
    if dims:
        systems = {"bm25": metrics["bm25"]} if metrics.get("bm25") else {}
        systems |= {
            name: metrics[name][dims[0]]
            for name in ("base", "tuned")
            if dims[0] in metrics.get(name, {})
        }
        tables[f"All metrics at {dims[0]} dimensions"] = metrics_table(systems, markdown=True)
    return tables


def rerank_tables(
    metrics: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    deltas: Mapping[str, Mapping[str, Any]],
    *,
    markdown: bool = False,
) -> tuple[str, str]:
    """(systems side by side, tuned against each of the others) of a reranker's run.

    deltas  system -> metric -> tuned - system
    """
    table = metrics_table(
        metrics, RERANK_NAMES, intervals=intervals, interval_of=RERANK_NAMES, markdown=markdown
    )
    tuned = dict.fromkeys(deltas, metrics.get("tuned", {}))
    against = against_table(
        deltas, metrics, tuned, RERANK_COMPARED,
        before_name="other", after_name="tuned", markdown=markdown,
    )  # fmt: skip
    return table, against


def report_markdown(
    name: str,
    tables: Mapping[str, str],
    *,
    facts: Mapping[str, Any] | None = None,
    examples: str = "",
    figures: Mapping[str, str] | None = None,
    is_compared: bool = True,
) -> str:
    """report.md of a run.

    tables    sections: title -> Markdown
    facts     lines of "What was run": name -> value
    examples  from examples_text
    figures   caption -> path relative to the report
    is_compared  some table holds differences between systems
    """
    lines = [f"# {name}", ""]
    for title, table in tables.items():
        lines += [f"## {title}", "", table, ""]
    if is_compared:
        lines += [
            "Differences are of the same queries: percentile bootstrap interval, two-sided"
            " randomisation p, 10,000 resamples each.",
            "",
        ]
    if examples:
        lines += ["## Queries before and after", "", "A star marks a relevant passage.", ""]
        lines += ["```text", examples, "```", ""]
    for caption, path in (figures or {}).items():
        lines += [f"![{caption}]({path})", ""]
    if facts:
        lines += ["## What was run", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines)
