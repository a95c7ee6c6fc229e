"""What a name on evaluate.py's command line stands for: BM25, a retriever, a cross-encoder, a run
file, chance; and how each searches a corpus or scores candidates.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from conf.schema import EvaluateConfig
from data.records import RetrievalSet
from evals.bm25 import bm25_hits
from evals.eval_file import is_eval
from evals.rerank import (
    Candidates,
    Scores,
    bm25_scores,
    latency_ms,
    random_scores,
    reranker_scores,
    retriever_scores,
)
from evals.retrieval import encode_sets
from evals.run_file import read_run
from evals.search import Hits, descending_ids, search
from models.pretrained import load_towers
from models.reranker import is_reranker, load_reranker
from models.towers import Towers
from runtime.device import keep_freed_memory, pick_device

log = logging.getLogger(__name__)


def kind_of(model: str) -> str:
    """bm25 | random | eval (an eval.json) | run (a TREC run file) | reranker | retriever."""
    if model in ("bm25", "random"):
        return model
    path = Path(model).expanduser()
    if is_eval(path):
        return "eval"
    if path.is_file():
        return "run"
    return "reranker" if is_reranker(model) else "retriever"


def labels_of(models: Sequence[str]) -> list[str]:
    """A short name each: the end of its path, as long as it takes to tell it from the others.

    Of a run directory the end is <name>/<overrides>/seed<k>. A model that is named twice is an
    error (ValueError).
    """
    parts = [[p for p in Path(m).parts if p not in ("/", "export")] or [m] for m in models]
    labels = []
    for i, own in enumerate(parts):
        num = 3 if re.fullmatch(r"seed\d+", own[-1]) else 1
        others = [other for j, other in enumerate(parts) if j != i]
        if own in others:
            raise ValueError(f"{models[i]} is named twice; each model once")
        while any(other[-num:] == own[-num:] for other in others) and num < len(own):
            num += 1
        labels.append("/".join(own[-num:]))
    return labels


def vector_label(dim: int, precision: str, c: EvaluateConfig) -> str:
    """The label of a search by vectors: "384", or "384 int8" where c has several precisions."""
    return f"{dim} {precision}" if len(c.precisions) > 1 else str(dim)


def search_by(
    model: str, data: RetrievalSet, k: int, c: EvaluateConfig, dims: Sequence[int] = ()
) -> dict[str, Hits]:
    """The k best of all documents: label -> hits. Labels are bm25, run, or the dims of a retriever,
    greatest first, all from one encoding; with several precisions "384 int8", in their order.

    Raises ValueError for a model that cannot search.
    """
    kind = kind_of(model)
    if kind == "bm25":
        return {"bm25": bm25_hits(data, k)}
    if kind == "run":
        return {"run": read_run(Path(model).expanduser(), data, k)}
    if kind != "retriever":
        what = {"reranker": "a cross-encoder", "eval": "an eval.json"}.get(
            kind, "an order by chance"
        )
        raise ValueError(
            f"{model} is {what}, which cannot search all documents; want bm25, a retriever or a run"
            " file here, and also= for what it is to be compared with"
        )
    towers = load_retriever(model, dims, c)
    options = {"precision": c.encode_precision, "batch_tokens": c.batch_tokens}
    q_QD, p_ND = encode_sets(towers, {data.name: data}, progress="encode", **options)[data.name]
    order_N = descending_ids(data.doc_ids)
    return {
        vector_label(dim, precision, c): search(
            q_QD, p_ND, data.doc_ids, data.query_ids,
            k=k, dim=dim, precision=precision, device=next(towers.parameters()).device,
            order_N=order_N, shares_ids=data.shares_ids,
        )
        for dim in sorted(set(dims), reverse=True) or [towers.width]
        for precision in c.precisions
    }  # fmt: skip


def load_retriever(model: str, dims: Sequence[int], c: EvaluateConfig) -> Towers:
    """Towers on c.device, with c's prompts where the folder names none. Raises ValueError for a dim
    that is more than they have."""
    towers = load_towers(model)
    if not (towers.spec.query_prompt or towers.spec.passage_prompt):
        towers.spec.query_prompt = c.query_prompt or ""
        towers.spec.passage_prompt = c.passage_prompt or ""
    for dim in dims:
        if dim > towers.width:
            raise ValueError(
                f"dims: {dim} is more than {model} has; its embeddings have {towers.width}"
                " components"
            )
    keep_freed_memory()
    return towers.to(pick_device(c.device))


def scores_by(
    model: str, data: RetrievalSet, candidates: Candidates, c: EvaluateConfig
) -> tuple[Scores, dict[str, float] | None]:
    """Every candidate's score, and for a cross-encoder what it takes a query (latency_ms).

    Raises ValueError for a model that has no score for every pair.
    """
    kind = kind_of(model)
    if kind == "bm25":
        return bm25_scores(data, candidates), None
    if kind == "random":
        return random_scores(candidates, c.seed), None
    if kind not in ("retriever", "reranker"):
        raise ValueError(
            f"{model} is a file, which has no score for every candidate; want a cross-encoder, a"
            " retriever, bm25 or random (first_stage= takes a run file)"
        )
    options = {"precision": c.encode_precision, "batch_tokens": c.batch_tokens}
    if kind == "retriever":
        towers = load_retriever(model, c.dims, c)
        dim = c.dims[0] if c.dims else None
        return retriever_scores(
            towers, data, candidates, dim=dim, progress="encode", **options
        ), None
    keep_freed_memory()
    reranker = load_reranker(model).to(pick_device(c.device))
    scores = reranker_scores(reranker, data, candidates, progress=f"score {model}", **options)
    if not c.latency_queries:
        return scores, None
    timed = latency_ms(reranker, data, candidates, count=c.latency_queries, seed=c.seed, **options)
    return scores, timed
