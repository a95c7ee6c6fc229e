"""What people read: result tables, three queries before and after, figures, report.md.

Everything takes plain data in the layout of result.json (docs/design.md):
metrics  {"bm25": {"ndcg@10": ..}, "base": {"384": {"ndcg@10": ..}}, "tuned": {..}}; bm25 has no
         dimension
delta    {"384": {"ndcg@10": {"diff", "ci95": [low, high], "p", "n"}}}                  tuned - base
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.metrics import Metrics
from evals.significance import bootstrap_ci95, paired_all

if TYPE_CHECKING:
    from data.records import RetrievalSet

SHOWN_METRICS = ("accuracy@1", "recall@5", "recall@100", "mrr@10", "ndcg@10", "map@100")
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
    intervals: Mapping[str, Sequence[float]] | None = None,
    interval_of: str = "ndcg@10",
    markdown: bool = False,
) -> str:
    """One row a system, one column a metric.

    intervals  system -> 95% interval of the metric `interval_of`, shown beside it
    """
    names = [name for name in names if any(name in values for values in systems.values())]
    header = [""]
    for name in names:
        header.append(label_of(name))
        if intervals and name == interval_of:
            header.append("[95% interval]")
    rows = []
    for system, values in systems.items():
        row = [label_of(system)]
        for name in names:
            row.append(_share(values.get(name)))
            if intervals and name == interval_of:
                row.append(
                    "[{}, {}]".format(*map(_share, intervals[system]))
                    if system in intervals
                    else ""
                )
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
    return text_table(["", before_name, after_name, "difference [95% interval]", "p"], rows)


# ----------------------------------------------------------------------------------------- examples


def examples_text(
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    data: "RetrievalSet",
    *,
    count: int = 3,
    first: int = 3,
    seed: int = 0,
    width: int = 96,
) -> str:
    """`count` queries with their first hits before and after; a star marks a relevant document.

    before, after  query id -> document ids, best first (Hits.ids_by_query())
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
        for name, found in (("before", before[query_id]), ("after", after[query_id])):
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


# ------------------------------------------------------------------------------------------ figures

_COLOURS = {"base": "#7f8c99", "tuned": "#0b6fb8", "bm25": "#c8553d"}
_OTHER_COLOURS = ("#0b6fb8", "#2a9d6f", "#c8553d", "#8e5ea2", "#b8860b", "#4d4d4d")


def _figure(width: float, height: float, **subplots: Any):
    """(Figure, axes) without pyplot: no global state and no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(squeeze=False, **subplots)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # without the version in the file, the same numbers give the same bytes
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_training(
    rows: Sequence[Mapping[str, Any]], path: Path, *, metric: str = "ndcg@10"
) -> Path:
    """training_figure() as a PNG."""
    return _save(training_figure(rows, metric=metric), path)


def training_figure(rows: Sequence[Mapping[str, Any]], *, metric: str = "ndcg@10"):
    """Training loss against steps and, where the run was evaluated on the way, the dev metric.

    rows  of metrics.jsonl: "step", "loss", and "dev/<metric>" with or without a dim after it
    """
    keys = sorted(
        {key for row in rows for key in row if key.startswith("dev/") and metric in key},
        key=_widest_first,
    )
    figure, axes = _figure(7, 5.6 if keys else 3.6, nrows=2 if keys else 1, sharex=True)
    points = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    loss_axis = axes[0][0]
    if points:
        step_s, loss_s = np.array(points, dtype=np.float64).T
        window = max(1, len(loss_s) // 25)
        if window > 1:
            loss_axis.plot(
                step_s, loss_s, color=_COLOURS["tuned"], alpha=0.3, linewidth=1, label="logged"
            )
            smooth_s = np.convolve(loss_s, np.ones(window) / window, mode="valid")
            at_s = step_s[window - 1 :]
            loss_axis.plot(
                at_s, smooth_s, color=_COLOURS["tuned"], linewidth=1.8, label=f"mean of {window}"
            )
            loss_axis.legend(frameon=False)
        else:
            loss_axis.plot(
                step_s, loss_s, color=_COLOURS["tuned"], linewidth=1.8, marker="o", markersize=3
            )
    loss_axis.set_ylabel("training loss (nats)")
    for key, colour in zip(
        keys, _OTHER_COLOURS * (1 + len(keys) // len(_OTHER_COLOURS)), strict=False
    ):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        name = " ".join(part for part in key.split("/")[1:] if part != metric) or "full"
        axes[1][0].plot(
            *np.array(points).T, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name
        )
    if keys:
        axes[1][0].set_ylabel(f"dev {label_of(metric)}")
        if len(keys) > 1:
            axes[1][0].legend(frameon=False, title="dim", ncols=min(4, len(keys)))
    axes[-1][0].set_xlabel("step")
    axes[-1][0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _widest_first(key: str) -> tuple[float, str]:
    """dev/ndcg@10 stands for the full width, dev/ndcg@10/128 for 128 dimensions."""
    last = key.rpartition("/")[2]
    return (-int(last) if last.isdigit() else -np.inf, key)


def plot_dims(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    *,
    metric: str = "ndcg@10",
    title: str = "",
) -> Path:
    """Metric against dimension with 95% intervals.

    values  system -> per-query values by dim ({"384": [...]}); "bm25" -> {"": [...]} is drawn as a
            level line
    """
    figure, axes = _figure(6.4, 4.2)
    axis = axes[0][0]
    dims = sorted({int(dim) for name, of in values.items() if name != "bm25" for dim in of})
    models = [name for name in values if name != "bm25"]
    for i, name in enumerate(models):
        points = [(dim, values[name][str(dim)]) for dim in dims if str(dim) in values[name]]
        mean = np.array([np.mean(v) for _, v in points])
        intervals = bootstrap_ci95({str(dim): v for dim, v in points})
        low, high = np.array([intervals[str(dim)] for dim, _ in points]).T
        # a little beside each other, so that intervals of two systems do not cover one another
        at = np.array([dim for dim, _ in points]) * 1.02 ** (i - (len(models) - 1) / 2)
        colour = _COLOURS.get(name, _OTHER_COLOURS[i % len(_OTHER_COLOURS)])
        axis.errorbar(
            at, mean, yerr=[mean - low, high - mean], color=colour, marker="o", markersize=4.5,
            linewidth=1.8, elinewidth=1.2, capsize=3, label=label_of(name),
        )  # fmt: skip
    if "bm25" in values:
        axis.axhline(
            np.mean(next(iter(values["bm25"].values()))),
            color=_COLOURS["bm25"],
            linestyle="--",
            linewidth=1.4,
            label="BM25",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.minorticks_off()
    axis.set_xlabel("dimensions kept")
    axis.set_ylabel(f"{label_of(metric)} (95% interval)")
    axis.margins(x=0.08, y=0.12)
    if title:
        axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, loc="best")
    return _save(figure, path)


def sample_scores(
    q_QD: np.ndarray,
    p_ND: np.ndarray,
    data: "RetrievalSet",
    *,
    num_negatives: int = 20,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores of all relevant pairs and of random others: {"positive": .., "negative": ..}.

    num_negatives  documents drawn for each query
    """
    number = {doc_id: n for n, doc_id in enumerate(data.doc_ids)}
    rng = np.random.default_rng(seed)
    positive, negative = [], []
    for row, query_id in enumerate(data.query_ids):
        judged = data.qrels.get(query_id, {})
        relevant = [
            number[doc_id] for doc_id, grade in judged.items() if grade > 0 and doc_id in number
        ]
        positive.append(p_ND[relevant] @ q_QD[row])
        drawn = np.setdiff1d(rng.integers(0, len(data.doc_ids), num_negatives), relevant)
        negative.append(p_ND[drawn] @ q_QD[row])
    return {
        "positive": np.concatenate(positive or [np.zeros(0)]),
        "negative": np.concatenate(negative or [np.zeros(0)]),
    }


def plot_scores(samples: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """Distributions of the cosine of relevant and of random pairs, one panel a system."""
    figure, axes = _figure(6.8, 1.6 + 1.9 * len(samples), nrows=len(samples), sharex=True)
    every = np.concatenate([np.ravel(x) for of in samples.values() for x in of.values()])
    edges = (
        np.linspace(every.min(initial=0.0), every.max(initial=1.0), 61)
        if len(every)
        else np.linspace(0, 1, 61)
    )
    for (system, of), axis in zip(samples.items(), axes[:, 0], strict=True):
        for kind, colour in (("negative", _COLOURS["base"]), ("positive", _COLOURS["tuned"])):
            x = np.asarray(of[kind])
            if len(x):
                share = np.full(len(x), 1 / len(x))
                name = "random pairs" if kind == "negative" else "relevant pairs"
                label = f"{name}, mean {x.mean():.2f}"
                axis.hist(x, edges, weights=share, color=colour, alpha=0.6, label=label)
        axis.set_title(label_of(system), loc="left", fontsize=10)
        axis.margins(y=0.25)  # room for the legend above the bars
        axis.set_ylabel("share of pairs")
        axis.legend(frameon=False, fontsize=9)
    axes[-1][0].set_xlabel("cosine of query and passage")
    return _save(figure, path)


# ---------------------------------------------------------------------------------------- report.md


def report_markdown(
    result: Mapping[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    tables: Mapping[str, str] | None = None,
    examples: str = "",
    figures: Mapping[str, str] | None = None,
) -> str:
    """report.md of a run.

    result    content of result.json
    facts     lines of "What was run": name -> value
    tables    further sections: title -> markdown
    examples  from examples_text
    figures   caption -> path relative to the report
    """
    metrics, delta = result["metrics"], result.get("delta", {})
    lines = [f"# {result['name']}", ""]
    for metric in ("ndcg@10", "accuracy@1"):
        lines += [
            f"## {label_of(metric)}",
            "",
            result_table(metrics, delta, metric, markdown=True),
            "",
        ]
    lines += [
        "Gain is tuned minus base on the same queries: percentile bootstrap interval, two-sided"
        " randomisation p, 10,000 resamples each.",
        "",
    ]
    dims = sorted(metrics.get("tuned", metrics.get("base", {})), key=int, reverse=True)
    if dims:
        systems = {"BM25": metrics["bm25"]} if metrics.get("bm25") else {}
        systems |= {
            name: metrics[name][dims[0]]
            for name in ("base", "tuned")
            if dims[0] in metrics.get(name, {})
        }
        lines += [
            f"## All metrics at {dims[0]} dimensions",
            "",
            metrics_table(systems, markdown=True),
            "",
        ]
    for title, table in (tables or {}).items():
        lines += [f"## {title}", "", table, ""]
    if examples:
        lines += [
            "## Queries before and after",
            "",
            "A star marks a relevant passage.",
            "",
            "```text",
            examples,
            "```",
            "",
        ]
    for caption, path in (figures or {}).items():
        lines += [f"![{caption}]({path})", ""]
    if facts:
        lines += [
            "## What was run",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
        ]
    return "\n".join(lines)
