"""A model on retrieval sets: every distinct text encoded once, every dim scored from the same
embeddings.

Shapes: Q queries, N documents, D embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.records import RetrievalSet
from evals.encode import encode
from evals.metrics import NAMES, Metrics, evaluate_hits
from evals.search import Hits, search
from models.towers import Towers


@dataclass(frozen=True)
class Scored:
    """One set at one dim."""

    hits: Hits
    metrics: Metrics


def distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(the distinct texts in order of first use, number of each text among them)."""
    number: dict[str, int] = {}
    index = np.fromiter(
        (number.setdefault(t, len(number)) for t in texts), np.int64, count=len(texts)
    )
    return list(number), index


Prompts = Mapping[str, tuple[str | None, str | None]]


def encode_sets(
    towers: Towers,
    sets: Mapping[str, RetrievalSet],
    *,
    prompts: Prompts | None = None,
    precision: str = "auto",
    batch_tokens: int = 0,
    progress: str = "",
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Set name -> (q_QD, p_ND); a text that several sets share under one prompt is encoded once.

    prompts  (query, passage) prompt of each set; None, or a set left out: the model's own
    Equal texts get equal bits, so that their order is the total order's. Other arguments: encode.
    """
    embedded: dict[str, dict[str, np.ndarray]] = {name: {} for name in sets}
    for at, side in enumerate(("query", "passage")):
        by_prompt: dict[str | None, list[str]] = {}
        for name in sets:
            by_prompt.setdefault((prompts or {}).get(name, (None, None))[at], []).append(name)
        for prompt, names in by_prompt.items():
            texts = [sets[n].query_texts if side == "query" else sets[n].doc_texts for n in names]
            some, index = distinct([t for part in texts for t in part])
            label = f"{progress} {side}" if progress else ""
            all_D = encode(
                towers, some, side, precision=precision, batch_tokens=batch_tokens, progress=label,
                prompt=prompt,
            )  # fmt: skip
            ends = np.cumsum([len(part) for part in texts])
            for name, end, part in zip(names, ends, texts, strict=True):
                embedded[name][side] = all_D[index[end - len(part) : end]]
    return {name: (of["query"], of["passage"]) for name, of in embedded.items()}


def score(
    q_QD: np.ndarray,
    p_ND: np.ndarray,
    data: RetrievalSet,
    dims: Sequence[int],
    *,
    k: int = 100,
    names: Sequence[str] = NAMES,
) -> dict[int, Scored]:
    """Hits and metrics at every dim."""
    result = {}
    for dim in dims:
        hits = search(
            q_QD, p_ND, data.doc_ids, data.query_ids, k=k, dim=dim, shares_ids=data.shares_ids
        )
        result[dim] = Scored(hits, evaluate_hits(hits, data.qrels, list(names)))
    return result
