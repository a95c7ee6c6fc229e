"""A cross-encoder that judges candidates: which of them answer their query after all.

Shapes: P (query, passage) pairs.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cache import built_once, digest_of
from data.pool import Pool
from data.teacher import model_digest
from evals.rerank import score_pairs
from models.pretrained import resolve_base
from models.reranker import Reranker, load_reranker
from runtime.device import pick_precision

VERSION = 1  # raise it when the same pairs would get other scores
CACHED_PAIRS = 4096  # scored and kept in the cache at once: what a killed run scores again at most


class Veto:
    """Scores of a pool's pairs, from the cache by content of the cross-encoder's files and of the
    texts, or made now.

    model   folder, run directory or hub id
    digest  of its files
    Raises ValueError when the model cannot be had or read.
    """

    def __init__(
        self,
        model: str,
        pool: Pool,
        *,
        device: torch.device,
        precision: str,
        cache_dir: Path,
        batch_tokens: int = 0,
    ) -> None:
        self.folder = resolve_base(model)
        self.digest = model_digest(self.folder)
        self.pool, self.device, self.cache_dir = pool, device, cache_dir
        self.precision, self.batch_tokens = pick_precision(precision, device), batch_tokens

    @cached_property
    def reranker(self) -> Reranker:
        reranker = load_reranker(self.folder)
        if model_digest(self.folder) != self.digest:
            raise ValueError(f"{self.folder} changed while it was read; start again")
        return reranker.to(self.device)

    def scores(self, pairs: Sequence[tuple[int, int]], what: str) -> np.ndarray:
        """float32 ranking scores of (query, passage) pairs by number; logits of one label.

        what  for the log and the progress bar: "candidates"
        """
        parts = [np.zeros(0, np.float32)]
        for low in range(0, len(pairs), CACHED_PAIRS):
            some = pairs[low : low + CACHED_PAIRS]
            texts = [(self.pool.queries.texts[q], self.pool.docs.texts[d]) for q, d in some]
            folder = (
                self.cache_dir / f"pairs-{digest_of(VERSION, self.digest, self.precision, texts)}"
            )
            shown = f"{len(some):,} {what}"
            if len(pairs) > len(some):
                shown += f" (from {low:,} of {len(pairs):,})"
            built_once(folder, self._scorer(some, what), what=f"reranker's scores of {shown}")
            parts.append(np.load(folder / "scores.npy"))
        return np.concatenate(parts)

    def _scorer(
        self, pairs: Sequence[tuple[int, int]], what: str
    ) -> Callable[[Path], dict[str, Any]]:
        def score(folder: Path) -> dict[str, Any]:
            queries, docs = self.pool.queries.texts, self.pool.docs.texts
            score_P = score_pairs(
                self.reranker, queries, docs, pairs,
                precision=self.precision, batch_tokens=self.batch_tokens, progress=what,
            )  # fmt: skip
            np.save(folder / "scores.npy", score_P)
            return {"model_sha256": self.digest, "precision": self.precision}

        return score

    def probability(self, score_P: np.ndarray) -> np.ndarray:
        return self.reranker.spec.probability(score_P)
