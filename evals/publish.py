"""The end of a run, whatever it trained: facts, card, report.md, result.json, the terminal."""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import TrainConfig
from data.reading import sample_note, shared_texts
from evals import report
from runtime.run_dir import write_json_atomic, write_text_atomic
from runtime.track import Tracker, read_rows


def means_of(per_query: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """metric -> mean over queries; 0 where there is none."""
    return {name: float(np.mean(x)) if len(x) else 0.0 for name, x in per_query.items()}


def costs(run_dir: Path, totals: Mapping[str, float]) -> dict[str, Any]:
    """What a run cost, for result.json: `totals` of the loop, replayed tokens, peak memory."""
    rows = read_rows(run_dir / "metrics.jsonl")
    replayed = [row["replayed_share"] for row in rows if "replayed_share" in row]
    return {
        **totals,
        "padding_share": 0.0,
        "replayed_share": float(np.mean(replayed)) if replayed else 0.0,
        "peak_memory_mib": round(peak_memory_mib()),
    }


def peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def facts_of(c: TrainConfig, result: Mapping[str, Any]) -> dict[str, object]:
    """What was run, for report.md: name -> value."""
    unit = "groups" if c.task == "rerank" else "examples"
    dims = "" if c.task == "rerank" else f", dims {c.loss.dims or 'full'}"
    layers = c.model.num_layers
    null = ", no answer one more choice" if c.loss.no_answer else ""
    return {
        "base": c.model.base + (f", its first {layers} layers" if layers else ""),
        "data": c.data.root or c.data.format if not c.data.sets else ", ".join(c.data.sets),
        "steps": f"{result['steps']} of {c.optim.batch_size} {unit}",
        "learning rate": f"{c.optim.lr:g}, {c.optim.schedule}, warmup {c.optim.warmup:g}",
        "loss": f"{c.loss.kind}, temperature {c.loss.temperature:g}{null}{dims}",
        "training": f"{result['train_s']:.0f} s, {result['examples_per_s']:.1f} {unit}/s,"
        f" {result['tokens_per_s']:.0f} tokens/s",
        "peak memory": f"{result['peak_memory_mib']} MiB",
        "seed": c.seed,
        **data_facts(result.get("data", {})),
    }


def data_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """How each data set was split, what its splits share, and its bad rows: name -> text."""
    facts = {}
    for name, one in report.get("data_sets", {}).items():
        of = "" if len(report["data_sets"]) == 1 else f" of {name}"
        split = {k: v for k, v in one["split"].items() if k in ("method", "seed", "own")}
        facts[f"splits{of}"] = ", ".join(f"{key} {value}" for key, value in split.items())
        facts[f"texts shared by splits{of}"] = _shared(one["leakage"])
        if note := sample_note(one["leakage"]):
            facts[f"texts shared by splits{of}"] += f" ({note})"
        if one["bad_rows"]["count"]:
            bad = one["bad_rows"]
            facts[f"bad rows{of}"] = f"{bad['count']:,} left out, listed in {bad['file']}"
    if "leakage_between_sets" in report:
        facts["texts shared by data sets"] = _shared(report["leakage_between_sets"])
    return facts


def _shared(leakage: Mapping[str, Any]) -> str:
    pairs = [
        f"{pair}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
        for pair, counts in shared_texts(leakage).items()
    ]
    return "; ".join(pairs) or "none found"


def unjudged(c: TrainConfig, run_dir: Path) -> str:
    """What a run without a test split says where its table would be."""
    metric = f"dev/{c.best_metric}"
    rows = [r for r in read_rows(run_dir / "metrics.jsonl") if metric in r]
    best = max(rows, key=lambda r: r[metric], default=None)
    text = "The data has no test split, so this model is not compared with its base or BM25."
    if best is not None:
        text += f" Best on dev: {c.best_metric} {best[metric]:.3f} at step {best['step']:,}."
    return f"{text} On any judged data: python evaluate.py model={run_dir} data=<data>"


def card_of(c: TrainConfig, result: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """What the export writes into the model card; `settings` beside the usual ones."""
    facts = facts_of(c, result)
    shown = {k: facts[k] for k in ("learning rate", "loss", "steps", "seed")}
    if c.model.num_layers is not None:
        shown["layers"] = f"the first {c.model.num_layers} of the base"
    return {
        "name": c.name,
        # a card is published: the name of a local file or folder, not its path
        "data": f"{Path(str(facts['data'])).name} ({c.data.format})",
        "settings": shown | settings,
        "result": result,
    }


def publish(
    c: TrainConfig,
    run_dir: Path,
    result: Mapping[str, Any],
    track: Tracker,
    *,
    tables: Mapping[str, str],
    shown: Mapping[str, str],
    rows: tuple[Sequence[str], Sequence[Sequence[Any]]],
    figures: Sequence[Path],
    examples: str = "",
) -> None:
    """report.md, W&B, result.json (last of all the files), and the terminal.

    tables  of report.md: title -> Markdown
    shown   on the terminal: title -> text
    rows    (column names, rows) of W&B's table
    """
    if result["test_set"] is None:
        tables = {"No test split": unjudged(c, run_dir), **tables}
        shown = {"No test split": tables["No test split"], **shown}
    captions = {f.stem.replace("_", " "): f"figures/{f.name}" for f in figures}
    text = report.report_markdown(
        c.name, tables, facts=facts_of(c, result), examples=examples, figures=captions,
        is_compared=result["test_set"] is not None,
    )  # fmt: skip
    write_text_atomic(run_dir / "report.md", text)
    track.finish(result, figures, rows)
    write_json_atomic(run_dir / "result.json", result)
    out = sys.stdout
    for title, table in shown.items():
        out.write(f"\n{title}\n{table}\n")
    if examples:
        out.write(f"\n{examples}\n")
    out.write(f"\nreport   {run_dir / 'report.md'}\nfigures  {run_dir / 'figures'}\n")
    out.write(f"model    {run_dir / 'export'}\n")
