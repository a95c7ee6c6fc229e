"""Evaluate a model: python evaluate.py model=<run, folder or hub id> data=<BEIR folder>

Every text is encoded once; every dimension comes from the same embeddings. Settings:
conf/schema.py, EvaluateConfig. Prints tables; with out=<folder> also writes eval.json (means,
intervals and the value of every query) and run.trec.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.schema import EvaluateConfig
    from data.records import RetrievalSet
    from evals.metrics import Metrics
    from evals.search import Hits

log = logging.getLogger("evaluate")

COMPARED = ("ndcg@10", "accuracy@1")  # metrics of the table of differences; eval.json has all


@dataclass
class System:
    """Results of one model: label ("384", ..., or "bm25") -> hits and metrics.

    There are no hits when it was read from an eval.json.
    """

    name: str
    metrics: "dict[str, Metrics]"
    hits: "dict[str, Hits]"


def run(c: "EvaluateConfig", out: Path | None = None) -> dict[str, Any]:
    """Evaluate c.model on c.data, print the tables, write files where asked, return the content of
    eval.json.

    out  folder for the files; None: c.out, and no files without it
    Raises ValueError for what the user can put right: unknown split, dim over the model's width,
    missing folder, an `out` that holds another evaluation, an `against` on other queries.
    """
    from conf.schema import SourceConfig
    from data.formats import read_retrieval_set
    from evals import report
    from evals.metrics import names_up_to
    from evals.significance import bootstrap_ci95

    out = Path(c.out) if out is None and c.out else out
    inputs = inputs_of(c)
    if out is not None:
        check_out(out, inputs)
    try:
        data = read_retrieval_set(SourceConfig(root=c.data, columns=c.columns), c.split)
    except ValueError as e:  # the reader names train.py's setting
        raise ValueError(str(e).replace("data.root", "data")) from e
    names = names_up_to(c.top_k)
    other = read_eval(Path(c.against), data) if c.against and is_eval(Path(c.against)) else None
    system = evaluate_model(c.model, data, c, names)
    if c.against and other is None:
        other = evaluate_model(c.against, data, c, names)
    bm25 = None
    if c.bm25 and c.model != "bm25":
        bm25 = other if c.against == "bm25" else evaluate_model("bm25", data, c, names)

    systems = dict(system.metrics) | ({} if bm25 is None else bm25.metrics)
    first = next(iter(system.metrics.values()))
    intervals = {}
    for label, metrics in systems.items():
        intervals[label] = bootstrap_ci95(metrics.per_query, c.seed)
    result: dict[str, Any] = {
        **inputs,
        "num_documents": len(data.doc_ids),
        "num_queries": len(first.query_ids),
        "num_unjudged": first.num_unjudged,
        "test_set": digest_of(data),
        "bytes_per_document": {label: hits.bytes_per_doc for label, hits in system.hits.items()},
        "metrics": {label: metrics.means for label, metrics in systems.items()},
        "ci95": intervals,
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
    result["per_query"] = {
        "query_ids": first.query_ids,
        "values": {
            label: {name: value_J.tolist() for name, value_J in metrics.per_query.items()}
            for label, metrics in systems.items()
        },
    }
    print(tables(result, c))
    if out is not None:
        write_files(out, result, system, None if bm25 is other else bm25)
    return result


def inputs_of(c: "EvaluateConfig") -> dict[str, Any]:
    """What the numbers depend on: two evaluations that agree here may share a folder."""
    keys = (
        "model data split dims precision encode_precision batch_tokens top_k seed against bm25"
        " columns device"
    )
    return {key: getattr(c, key) for key in keys.split()}


def evaluate_model(
    model: str, data: "RetrievalSet", c: "EvaluateConfig", names: list[str]
) -> System:
    """Search and metrics at every dim, from one encoding; BM25 where model is "bm25"."""
    from evals.metrics import evaluate_hits
    from evals.search import descending_ids, search

    if model == "bm25":
        from evals.bm25 import bm25_hits

        hits = {"bm25": bm25_hits(data, c.top_k)}
    else:
        from evals.retrieval import encode_sets
        from models.pretrained import load_towers
        from runtime.device import keep_freed_memory, pick_device

        towers = load_towers(model)
        for dim in c.dims:
            if dim > towers.width:
                raise ValueError(
                    f"dims: {dim} is more than {model} has; its embeddings have {towers.width}"
                    " components"
                )
        keep_freed_memory()
        device = pick_device(c.device)
        towers = towers.to(device)
        sets = {data.name: data}
        options = {"precision": c.encode_precision, "batch_tokens": c.batch_tokens}
        q_QD, p_ND = encode_sets(towers, sets, progress="encode", **options)[data.name]
        order_N = descending_ids(data.doc_ids)
        dims = sorted(set(c.dims), reverse=True) or [towers.width]
        hits = {
            str(dim): search(
                q_QD, p_ND, data.doc_ids, data.query_ids,
                k=c.top_k, dim=dim, precision=c.precision, device=device, order_N=order_N,
            )
            for dim in dims
        }  # fmt: skip
    return System(
        model, {label: evaluate_hits(h, data.qrels, names) for label, h in hits.items()}, hits
    )


def counterpart(label: str, other: System, dims_were_asked: bool) -> str:
    """The label of `other` that `label` is compared with: the same dim; else its only one, or its
    full width."""
    if label in other.metrics:
        return label
    dims = [theirs for theirs in other.metrics if theirs != "bm25"]
    if not dims or label == "bm25" or not dims_were_asked:
        return dims[0] if dims else "bm25"
    raise ValueError(
        f"against={other.name} has no results at {label} dimensions, only at {', '.join(dims)}"
    )


# ---------------------------------------------------------------------------------------- eval.json


def is_eval(path: Path) -> bool:
    """Whether `against` names an eval.json, or a folder that holds one and no model."""
    holds_model = any(
        (path / name).exists() for name in ("config.json", "modules.json", "export", "config.yaml")
    )
    return path.suffix == ".json" or ((path / "eval.json").is_file() and not holds_model)


def read_eval(path: Path, data: "RetrievalSet") -> System:
    """A System from eval.json. Raises ValueError when it is damaged or of another test set."""
    import numpy as np

    from evals.metrics import Metrics

    path = path / "eval.json" if path.is_dir() else path
    content = read_json(path)
    if content.get("test_set") != digest_of(data):
        raise ValueError(
            f"{path} is of another test set ({content.get('data')}, split {content.get('split')}):"
            " its documents, queries or judgements differ from these; evaluate both models on the"
            " same data= and split="
        )
    try:
        per_query, model = content["per_query"], content["model"]
        own = [label for label in per_query["values"] if (label == "bm25") == (model == "bm25")]
        metrics = {
            label: Metrics(
                per_query["query_ids"],
                {name: np.array(values) for name, values in per_query["values"][label].items()},
                content["num_unjudged"],
            )
            for label in own
        }
    except (KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: expected an eval.json as evaluate.py writes it, found no {e}"
        ) from e
    return System(f"{path} ({model})", metrics, {})


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise ValueError(f"{path}: expected JSON as evaluate.py writes it: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_out(out: Path, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError when `out` is no folder or holds another evaluation; a repeat is fine."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out ({out}) is a file; want a folder")
    path = out / "eval.json"
    if not path.exists():
        return
    before = read_json(path)
    for key, value in inputs.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} holds another evaluation ({key} was {before.get(key)!r}, now {value!r});"
                " choose another out="
            )


def digest_of(data: "RetrievalSet") -> str:
    """sha256 of ids, texts and judgements: evaluations that share it compare query by query."""
    digest = hashlib.sha256()
    for ids, texts in ((data.doc_ids, data.doc_texts), (data.query_ids, data.query_texts)):
        for row in sorted(zip(ids, texts, strict=True)):
            digest.update(json.dumps(row).encode())
        digest.update(b"\n")
    digest.update(json.dumps(data.qrels, sort_keys=True).encode())
    return digest.hexdigest()


def write_files(out: Path, result: Mapping[str, Any], system: System, bm25: System | None) -> None:
    """run.trec (the first label), run_<label>.trec (the others, BM25 included), then eval.json."""
    from evals.metrics import run_lines
    from runtime.run_dir import write_json_atomic, write_text_atomic

    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(system.hits))
    hits = dict(system.hits) | ({} if bm25 is None else bm25.hits)
    for label, one in hits.items():
        name = "run.trec" if label == first else f"run_{label}.trec"
        write_text_atomic(out / name, "".join(run_lines(one, f"rook-{label}")))
    write_json_atomic(out / "eval.json", result)
    log.info("wrote %s", ", ".join(str(out / name) for name in ("eval.json", "run.trec")))


# ------------------------------------------------------------------------------------------- tables


def tables(result: Mapping[str, Any], c: "EvaluateConfig") -> str:
    """What is printed."""
    from evals import report

    metrics = result["metrics"]
    order = [
        *(["bm25"] if "bm25" in metrics else []),
        *(label for label in metrics if label != "bm25"),
    ]
    shown = {label: f"dim {label}" if label != "bm25" else "BM25" for label in order}
    left_out = f", {result['num_unjudged']} unjudged left out" if result["num_unjudged"] else ""
    parts = [
        f"\n{c.model} on {c.data} ({c.split}): {result['num_queries']:,} queries{left_out},"
        f" {result['num_documents']:,} documents, {c.precision} document vectors\n",
        report.metrics_table(
            {shown[label]: metrics[label] for label in order},
            intervals={shown[label]: result["ci95"][label]["ndcg@10"] for label in order},
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
    if "against_result" in result and result["against_result"]["name"] != "bm25":
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
