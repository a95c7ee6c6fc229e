"""Figures of a run, as PNG files: the same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.report import label_of
from evals.significance import bootstrap_ci95

if TYPE_CHECKING:
    from data.records import RetrievalSet

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
        # of equal values, a resample's mean may differ from theirs in the last bit, to either side
        spread = np.maximum([mean - low, high - mean], 0)
        # a little beside each other, so that intervals of two systems do not cover one another
        at = np.array([dim for dim, _ in points]) * 1.02 ** (i - (len(models) - 1) / 2)
        colour = _COLOURS.get(name, _OTHER_COLOURS[i % len(_OTHER_COLOURS)])
        axis.errorbar(
            at, mean, yerr=spread, color=colour, marker="o", markersize=4.5,
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


def plot_scores(
    samples: Mapping[str, Mapping[str, np.ndarray]],
    path: Path,
    *,
    score: str = "cosine of query and passage",
    others: str = "random pairs",
) -> Path:
    """Distributions of the score of relevant pairs and of `others`, one panel a system.

    samples  system -> {"positive": .., "negative": ..}
    """
    figure, axes = _figure(6.8, 1.6 + 1.9 * len(samples), nrows=len(samples), sharex=True)
    every = np.concatenate([np.ravel(x) for of in samples.values() for x in of.values()])
    edges = np.histogram_bin_edges(every, 60)
    for (system, of), axis in zip(samples.items(), axes[:, 0], strict=True):
        for kind, colour in (("negative", _COLOURS["base"]), ("positive", _COLOURS["tuned"])):
            x = np.asarray(of[kind])
            if len(x):
                share = np.full(len(x), 1 / len(x))
                name = others if kind == "negative" else "relevant pairs"
                label = f"{name}, mean {x.mean():.2f}"
                axis.hist(x, edges, weights=share, color=colour, alpha=0.6, label=label)
        axis.set_title(label_of(system), loc="left", fontsize=10)
        axis.margins(y=0.25)  # room for the legend above the bars
        axis.set_ylabel("share of pairs")
        axis.legend(frameon=False, fontsize=9)
    axes[-1][0].set_xlabel(score)
    return _save(figure, path)
