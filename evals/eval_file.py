"""eval.json and run files: what evaluate.py leaves, read back and compared."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import EvaluateConfig
from data.records import RetrievalSet
from evals.metrics import Metrics
from evals.run_file import run_lines
from evals.search import Hits
from runtime.run_dir import write_json_atomic, write_text_atomic

log = logging.getLogger(__name__)


@dataclass
class System:
    """Results of one model: label ("384", "384 int8", "bm25", a model's name) -> hits and metrics.

    There are no hits when it was read from an eval.json.
    """

    name: str
    metrics: dict[str, Metrics]
    hits: dict[str, Hits]


def inputs_of(c: EvaluateConfig) -> dict[str, Any]:
    """What the numbers depend on: two evaluations that agree here may share a folder."""
    return {key: value for key, value in asdict(c).items() if key not in ("out", "latency_queries")}


def is_eval(path: Path) -> bool:
    """Whether `against` names an eval.json, or a folder that holds one and no model."""
    holds_model = any(
        (path / name).exists() for name in ("config.json", "modules.json", "export", "config.yaml")
    )
    return path.suffix == ".json" or ((path / "eval.json").is_file() and not holds_model)


def read_eval(path: Path, data: RetrievalSet, precision: str | list[str] | None = None) -> System:
    """A System from eval.json. Raises ValueError when it is damaged or of another test set.

    precision  of the evaluation it is compared in, where one of the two has several: labels are as
               that one's, and what it holds at other precisions is left out (see _labels_at)
    """
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
        if "systems" in content:  # several models side by side
            own = [label for label, name in content["systems"].items() if name == model]
        place = {query_id: at for at, query_id in enumerate(per_query["query_ids"])}
        query_ids = [query_id for query_id in data.query_ids if query_id in place]
        order = [place[query_id] for query_id in query_ids]  # the files may list them otherwise
        metrics = {
            label: Metrics(
                query_ids,
                {name: np.array(x)[order] for name, x in per_query["values"][label].items()},
                content["num_unjudged"],
            )
            for label in own
        }
        if precision is not None:
            metrics = _labels_at(precision, metrics, content.get("precision", "fp32"))
    except (KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: expected an eval.json as evaluate.py writes it, found no {e}"
        ) from e
    return System(f"{path} ({model})", metrics, {})


def _labels_at(
    now: str | list[str], metrics: dict[str, Metrics], then: str | list[str]
) -> dict[str, Metrics]:
    """Results at precision(s) `then` under the labels of an evaluation at `now`.

    "384" at fp32 is "384 fp32" beside several precisions; of several, "384 int8" is "384" beside
    int8 alone. Two evaluations at one precision each are compared as they are, whatever it is.
    """
    if isinstance(then, str) and isinstance(now, list):
        return {f"{k} {then}" if k.isdigit() else k: one for k, one in metrics.items()}
    if isinstance(then, list) and isinstance(now, str):
        found = {k.removesuffix(f" {now}"): one for k, one in metrics.items()}
        return {k: one for k, one in found.items() if " " not in k} or metrics
    return metrics


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
    unset = inputs_of(EvaluateConfig(model="", data=""))  # settings that older files do not know
    for key, value in inputs.items():
        if before.get(key, unset[key]) != value:
            raise ValueError(
                f"{path} holds another evaluation ({key} was {before.get(key)!r}, now {value!r});"
                " choose another out="
            )


def digest_of(data: RetrievalSet) -> str:
    """sha256 of ids, texts, judgements and candidates: evaluations that share it compare query by
    query."""
    digest = hashlib.sha256()
    for ids, texts in ((data.doc_ids, data.doc_texts), (data.query_ids, data.query_texts)):
        for row in sorted(zip(ids, texts, strict=True)):
            digest.update(json.dumps(row).encode())
        digest.update(b"\n")
    digest.update(json.dumps(data.qrels, sort_keys=True).encode())
    candidates = getattr(data, "candidates", None)
    if candidates is not None:
        ordered = {query_id: sorted(ids) for query_id, ids in candidates.items()}
        digest.update(json.dumps(ordered, sort_keys=True).encode())
    return digest.hexdigest()


def write_files(out: Path, result: Mapping[str, Any], hits: Mapping[str, Hits]) -> None:
    """run.trec (the first label), run_<label>.trec (the others), then eval.json."""
    out.mkdir(parents=True, exist_ok=True)
    for i, (label, one) in enumerate(hits.items()):
        safe = re.sub(r"[^\w.-]", "_", label)
        name = f"run_{safe}.trec" if i else "run.trec"
        write_text_atomic(out / name, "".join(run_lines(one, f"rook-{safe}")))
    write_json_atomic(out / "eval.json", result)
    log.info("wrote %s", ", ".join(str(out / name) for name in ("eval.json", "run.trec")))
