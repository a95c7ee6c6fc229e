"""A teacher's scores of pairs that the data already has, for loss=kl and loss=margin_mse.

Stage `score` of prepare.py. Rows, labelled pairs and BEIR folders become one row a query with
positive_scores and negative_scores: a cross-encoder's logits, or a retriever's inner products.

Shapes: P (query, passage) pairs.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import PrepareConfig
from data.candidates import ModelSource
from data.pool import Pool
from data.records import Example
from data.rows import read_source, row_of, write_rows
from data.stages import check_stage
from data.teacher import Encoder
from data.veto import Veto
from models.pretrained import resolve_base
from models.reranker import is_reranker
from runtime.device import keep_freed_memory, pick_device

log = logging.getLogger(__name__)


def score_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `score`: the groups of `source` with score.model's scores, one query a line.

    Scores that the data brings are replaced. Raises ValueError for a model that is not set or
    cannot be read, and for anything wrong with the data.
    """
    check_stage(c, "score")
    keep_freed_memory()
    groups = read_source(c, source, groups=True)
    if not groups:
        raise ValueError(f"data={source}: no row to score")
    pool, pairs_P2 = _pool_of(groups)
    score_P, about = _scores(c, pool, pairs_P2)
    num_rows = write_rows(target, map(row_of, _scored(groups, score_P)))
    log.info("score: %s pairs in %s rows", f"{len(score_P):,}", f"{num_rows:,}")
    is_positive_P = np.concatenate(
        [np.arange(len(e.positives) + len(e.negatives)) < len(e.positives) for e in groups]
    )
    return {
        "in": len(groups),
        "out": num_rows,
        "counts": {"pairs": len(score_P), "positives": int(is_positive_P.sum())},
        "scores": {
            name: [round(float(x), 4) for x in np.quantile(some, (0.1, 0.5, 0.9))]
            for name, some in (
                ("positives at 10, 50, 90%", score_P[is_positive_P]),
                ("negatives at 10, 50, 90%", score_P[~is_positive_P]),
            )
            if len(some)
        },
        **about,
    }


def _pool_of(groups: Sequence[Example]) -> tuple[Pool, np.ndarray]:
    """The distinct texts, and (query, passage) of every pair by number, positives first, (P, 2)."""
    pool, pairs = Pool(), []
    for e in groups:
        query = pool.queries.add(e.query)
        pairs += [(query, pool.docs.add(text)) for text in (*e.positives, *e.negatives)]
    return pool, np.array(pairs, np.int64).reshape(-1, 2)


def _scores(
    c: PrepareConfig, pool: Pool, pairs_P2: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """(float32 score of every pair, kind and digest of the teacher)."""
    device, cache_dir = pick_device(c.device), Path(c.cache_dir)
    options = {"precision": c.precision, "batch_tokens": c.batch_tokens}
    if is_reranker(str(c.score.model)):
        veto = Veto(str(c.score.model), pool, device=device, cache_dir=cache_dir, **options)
        unique_U2, at_P = np.unique(pairs_P2, axis=0, return_inverse=True)
        score_P = veto.scores(list(map(tuple, unique_U2.tolist())), "pairs")[at_P.reshape(-1)]
        kind, digest = "cross-encoder", veto.digest
    else:
        folder = resolve_base(str(c.score.model))
        encoder = Encoder(
            folder, device, c.precision, name="model", is_unit=False, batch_tokens=c.batch_tokens
        )
        score_P = ModelSource.of(pool, encoder, cache_dir).pair_scores(*pairs_P2.T)
        kind, digest = "retriever", encoder.digest
    return score_P * np.float32(c.score.scale), {"teacher": kind, "digests": {"model": digest[:12]}}


def _scored(groups: Sequence[Example], score_P: np.ndarray) -> Iterator[Example]:
    start = 0
    for e in groups:
        middle, end = start + len(e.positives), start + len(e.positives) + len(e.negatives)
        given = [round(x, 6) for x in score_P[start:end].tolist()]
        at = middle - start
        yield replace(e, positive_scores=given[:at], negative_scores=given[at:])
        start = end
