"""Hard negatives: passages that a retriever or BM25 takes for answers of a query and that are none.

For every query: the candidates of each source (data/candidates.py) between two ranks; those that
answer it are left out, by id and by content, and those that may answer it: scored too near its
positive, nearly equal to one, or taken for an answer by a cross-encoder. Of the others the best, or
a seeded sample. Nothing but the inputs and the seed decides: no set is walked through, no number
drawn from a shared generator.

Sources: Karpukhin et al. 2020 (BM25 negatives), Xiong et al. 2021 (ANCE), Moreira et al. 2024
(NV-Retriever: limits as a share of the positive's score), Qu et al. 2021 (RocketQA: the veto).

Shapes: Q queries, B of them in a block, K candidates a query, P (query, passage) pairs.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.schema import MineConfig, PrepareConfig
from data.cache import digest_of
from data.candidates import Bm25Source, CandidateSource, ModelSource, RunSource
from data.near import shingle_set, similarity
from data.pool import Pool, read_pool
from data.records import content_hash
from data.rows import write_rows
from data.stages import check_stage
from data.teacher import Encoder
from data.veto import Veto
from models.pretrained import resolve_base
from runtime.device import keep_freed_memory, pick_device

log = logging.getLogger(__name__)

EXAMPLES_SHOWN = 10
# A block of queries: these many at most, and no more hits than these unless one query has more.
# Their candidates are what memory must hold, 50 of a query about 30 KB
BLOCK_QUERIES, BLOCK_HITS = 8192, 1 << 22


@dataclass
class Negative:
    """A candidate, and where it was found.

    ranks   source -> its rank there, from 1, passages that answer the query left out
    scores  source -> score there; "model" where one is set, "reranker" where it was asked
    """

    doc: int
    ranks: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where it stands first; of equals the first that was named. Of the data's own: data."""
        return min(self.ranks, key=self.ranks.__getitem__, default="data")


@dataclass
class Mined:
    """negatives of each query, hardest first; positive_scores: scale -> lowest positive's score of
    each query; counts and examples for the report."""

    negatives: list[list[Negative]]
    positive_scores: dict[str, list[float]]
    counts: Counter
    examples: dict[str, list[str]]

    def drop(self, reason: str, pool: Pool, q: int, doc: int) -> None:
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_SHOWN:
            shown.append(f"{pool.queries.texts[q][:200]!r}: {pool.docs.texts[doc][:300]!r}")


# ----------------------------------------------------------------------------------------- choosing


def choose(
    pool: Pool,
    sources: Mapping[str, CandidateSource],
    c: MineConfig,
    *,
    seed: int,
    judge: CandidateSource | None = None,
    veto: Veto | None = None,
) -> Mined:
    """Up to c.num_negatives of every query.

    sources  by name; several are taken in turns
    judge    whose scores the limits look at, under the name "model"; None: each source's own
    veto     asked about candidates that would be taken, and no others
    """
    counts: Counter = Counter()
    scales = {"model": judge} if judge is not None else dict(sources)
    lowest = {name: _lowest_positive(pool, source) for name, source in scales.items()}
    mined = Mined([[] for _ in pool.queries.texts], lowest, counts, {})
    is_near_answer = _nearness(pool, c)
    for block, depth in _blocks(pool, c):
        found = {name: source.best(depth, block) for name, source in sources.items()}
        candidates = {
            q: _candidates(pool, q, {name: (d[row], s[row]) for name, (d, s) in found.items()}, c)
            for row, q in enumerate(range(block.start, block.stop))
        }
        if judge is not None:
            _add_scores(candidates, judge, "model")
        queues = {}
        for q, some in candidates.items():
            bounds = {scale: limits(lowest[scale][q], c) for scale in scales}
            kept = [n for n in some if _is_within(n, bounds)]
            counts["candidates"] += len(some)
            counts["outside the limits"] += len(some) - len(kept)
            queues[q] = _queue(kept, pool.queries.texts[q], c, seed)
        _take(pool, queues, mined, c, is_near_answer, veto)
        del found, candidates, queues  # the next block's need the room
    counts["mined"] = sum(map(len, mined.negatives))
    short = [c.num_negatives - len(some) for some in mined.negatives]
    counts[f"queries with fewer than {c.num_negatives}"] = sum(s > 0 for s in short)
    counts["queries with none"] = sum(s == c.num_negatives for s in short)
    return mined


def _blocks(pool: Pool, c: MineConfig) -> Iterator[tuple[slice, int]]:
    """Queries by number, block by block, and the candidates asked for in each: the last rank, and
    room for what answers one of its queries or equals it."""
    low = depth = 0
    for q, (answers, itself) in enumerate(zip(pool.answers, pool.itself, strict=True)):
        wanted = min(c.last_rank + len(answers) + len(itself) + 1, len(pool.docs.texts))
        size, deepest = q - low, max(depth, wanted)
        if size and (size == BLOCK_QUERIES or (size + 1) * deepest > BLOCK_HITS):
            yield slice(low, q), depth
            low, deepest = q, wanted
        depth = deepest
    yield slice(low, len(pool.answers)), depth


def _candidates(
    pool: Pool, q: int, found: Mapping[str, tuple[np.ndarray, np.ndarray]], c: MineConfig
) -> list[Negative]:
    """The query's candidates between the two ranks, sources in turns.

    found  by source: (passages, scores) of the query, best first
    """
    left_out = {*pool.answers[q], *pool.itself[q], pool.docs.find(pool.queries.texts[q])}
    own = set(pool.own[q]) if c.keep_own else ()  # kept, they stand in the row already
    by_doc: dict[int, Negative] = {}
    for name, (docs_K, scores_K) in found.items():
        rank = 0
        for doc, score in zip(docs_K.tolist(), scores_K.tolist(), strict=True):
            if doc < 0 or rank == c.last_rank:
                break
            if doc in left_out:
                continue
            rank += 1
            if rank >= c.first_rank and doc not in own:
                negative = by_doc.setdefault(doc, Negative(doc))
                negative.ranks[name], negative.scores[name] = rank, score
    return sorted(by_doc.values(), key=lambda n: min(n.ranks.values()))  # stable: sources in order


def _add_scores(
    candidates: Mapping[int, list[Negative]], judge: CandidateSource, name: str
) -> None:
    lacking = [(q, n) for q, some in candidates.items() for n in some if name not in n.scores]
    pairs_P2 = np.array([(q, n.doc) for q, n in lacking], np.int64).reshape(-1, 2)
    for (_, negative), score in zip(lacking, judge.pair_scores(*pairs_P2.T).tolist(), strict=True):
        negative.scores[name] = score


def _lowest_positive(pool: Pool, source: CandidateSource) -> list[float]:
    """Of each query: the limits must hold against all of its positives."""
    pairs_P2 = np.array([(q, d) for q, some in enumerate(pool.positives) for d in some], np.int64)
    lowest_Q = np.full(len(pool.positives), np.inf, np.float32)
    np.minimum.at(lowest_Q, pairs_P2[:, 0], source.pair_scores(*pairs_P2.T))
    return lowest_Q.tolist()


def _is_within(negative: Negative, bounds: Mapping[str, tuple[float, float]]) -> bool:
    scores = negative.scores
    return all(low <= scores[s] <= high for s, (low, high) in bounds.items() if s in scores)


def limits(positive: float, c: MineConfig) -> tuple[float, float]:
    """(lowest, highest) score of a negative whose positive has the score `positive`.

    The share counts from the size of the positive's score: of 0.8 a fraction of 0.95 allows 0.76,
    of -0.8 it allows -0.84. As a factor it would allow -0.76, above the positive.
    """
    highest = np.inf if c.max_score is None else c.max_score
    if c.margin is not None:
        highest = min(highest, positive - c.margin)
    if c.fraction is not None:
        highest = min(highest, positive - (1 - c.fraction) * abs(positive))
    return -np.inf if c.min_score is None else c.min_score, highest


def _queue(kept: list[Negative], query: str, c: MineConfig, seed: int) -> list[Negative]:
    """In the order in which they are taken. The draw is the query's own: other queries, their order
    and their number do not change it."""
    if c.choice == "top":
        return kept
    rng = np.random.default_rng([seed, content_hash(query)])
    return [kept[i] for i in rng.permutation(len(kept)).tolist()]


def _nearness(pool: Pool, c: MineConfig) -> Callable[[int, int], bool]:
    """Whether a passage (the second number) is nearly one that answers a query (the first)."""
    shingles, texts = lru_cache(maxsize=1 << 14)(shingle_set), pool.docs.texts

    def is_near_answer(q: int, doc: int) -> bool:
        if c.near_duplicate is None:
            return False
        answers = chain((texts[a] for a in pool.answers[q]), pool.unseen[q])
        one = shingles(texts[doc])
        return any(similarity(one, shingles(answer)) >= c.near_duplicate for answer in answers)

    return is_near_answer


def _take(
    pool: Pool,
    queues: Mapping[int, list[Negative]],
    mined: Mined,
    c: MineConfig,
    is_near_answer: Callable[[int, int], bool],
    veto: Veto | None,
) -> None:
    """Fill mined.negatives of a block of queries from their queues.

    In rounds: each takes as many of every query's candidates as it still lacks, so that the
    cross-encoder sees large batches and only candidates that would be taken.
    """
    place = dict.fromkeys(queues, 0)
    while True:
        asked: list[tuple[int, Negative]] = []
        for q, queue in queues.items():
            wanted = c.num_negatives - len(mined.negatives[q])
            while wanted and place[q] < len(queue):
                negative = queue[place[q]]
                place[q] += 1
                if is_near_answer(q, negative.doc):
                    mined.drop("nearly a positive", pool, q, negative.doc)
                else:
                    asked.append((q, negative))
                    wanted -= 1
        if not asked:
            break
        is_answer = [False] * len(asked)
        if veto is not None and c.veto_above is not None:
            score_P = veto.scores([(q, n.doc) for q, n in asked], "candidates")
            is_answer = (veto.probability(score_P) > c.veto_above).tolist()
            for (_, negative), score in zip(asked, score_P.tolist(), strict=True):
                negative.scores["reranker"] = score
        for (q, negative), vetoed in zip(asked, is_answer, strict=True):
            if vetoed:
                mined.drop("vetoed", pool, q, negative.doc)
            else:
                mined.negatives[q].append(negative)
    for q in queues:  # a sample too: hardest first
        mined.negatives[q].sort(key=lambda n: min(n.ranks.values()))


# ------------------------------------------------------------------------------------------ a stage


def mine_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `mine` of prepare.py: `source`'s queries with their negatives, one a line of `target`.

    Raises ValueError for settings that do not fit together and for anything wrong with the data,
    the models or the run file.
    """
    check_stage(c, "mine")
    keep_freed_memory()
    device, cache_dir = pick_device(c.device), Path(c.cache_dir)
    pool = read_pool(c, source)
    sources, judge, digests = _open_sources(c, pool, device, cache_dir)
    veto = None
    if c.mine.reranker is not None:
        veto = Veto(
            c.mine.reranker, pool, device=device, precision=c.precision,
            cache_dir=cache_dir, batch_tokens=c.batch_tokens,
        )  # fmt: skip
        digests["reranker"] = veto.digest[:12]
    mined = choose(pool, sources, c.mine, seed=c.seed, judge=judge, veto=veto)
    settings = {**asdict(c.mine), "seed": c.seed, "split": c.split}
    digests["settings"] = digest_of(settings)[:12]
    own = own_negatives(pool, c.mine, mined, veto)
    rows = _rows(pool, own, mined, digests, veto)
    num_rows = write_rows(target, rows)
    counts = {"passages": len(pool.docs.texts), **mined.counts}
    log.info("mine: %s", "; ".join(f"{what} {n:,}" for what, n in counts.items()))
    _warn_of_none(mined.counts, c.mine)
    return {
        "in": len(pool.queries.texts),
        "out": num_rows,
        "counts": counts,
        "examples": mined.examples,
        "digests": digests,
    }


def _warn_of_none(counts: Counter, c: MineConfig) -> None:
    """Say so where the limits leave hardly anything, and which they are."""
    lost, candidates = counts["outside the limits"], counts["candidates"]
    if lost < 0.99 * candidates or not candidates:
        return
    limits_set = {k: getattr(c, k) for k in ("fraction", "margin", "max_score", "min_score")}
    named = ", ".join(f"mine.{k}={x:g}" for k, x in limits_set.items() if x is not None)
    log.warning(
        "mine: %s of %s candidates are outside the limits (%s)%s; null lifts a limit, e.g."
        " mine.fraction=null", f"{lost:,}", f"{candidates:,}", named,
        ". A positive that the run file does not list counts with the query's lowest score there,"
        " which leaves nothing" if "run" in c.sources and not c.model else "",
    )  # fmt: skip


def _open_sources(
    c: PrepareConfig, pool: Pool, device: torch.device, cache_dir: Path
) -> tuple[dict[str, CandidateSource], ModelSource | None, dict[str, str]]:
    """(sources by name, the model's where one is set, digests of what they are made of)."""
    digests, model = {}, None
    if c.mine.model:
        encoder = Encoder(
            resolve_base(c.mine.model), device, c.precision,
            name="model", is_unit=False, batch_tokens=c.batch_tokens,
        )  # fmt: skip
        digests["model"] = encoder.digest[:12]
        model = ModelSource.of(pool, encoder, cache_dir)
    opened: dict[str, CandidateSource] = {}
    for name in c.mine.sources:
        if name == "model":
            opened[name] = model
        elif name == "bm25":
            opened[name] = Bm25Source(pool)
        else:
            opened[name] = RunSource(pool, Path(str(c.mine.run)))
    return opened, model, digests


def own_negatives(
    pool: Pool, c: MineConfig, mined: Mined, veto: Veto | None
) -> list[list[Negative]]:
    """Of each query those of the data that stay, where the settings keep them: without those that
    are nearly an answer or that the veto takes for one. Counted, and shown, in `mined`."""
    num_own = sum(map(len, pool.own)) if c.keep_own else 0
    if num_own:
        mined.counts["own negatives"] = num_own
    is_near_answer = _nearness(pool, c)
    own: list[list[Negative]] = [[] for _ in pool.own]
    for q, some in enumerate(pool.own if c.keep_own else ()):
        for doc in some:
            if is_near_answer(q, doc):
                mined.drop("own negatives nearly a positive", pool, q, doc)
            else:
                own[q].append(Negative(doc))
    if veto is None or c.veto_above is None:
        return own
    asked = [(q, n) for q, some in enumerate(own) for n in some]
    score_P = veto.scores([(q, n.doc) for q, n in asked], "own negatives")
    is_answer_P = veto.probability(score_P) > c.veto_above
    stays: list[list[Negative]] = [[] for _ in own]
    for (q, negative), score, vetoed in zip(
        asked, score_P.tolist(), is_answer_P.tolist(), strict=True
    ):
        negative.scores["reranker"] = score
        if vetoed:
            mined.drop("own negatives vetoed", pool, q, negative.doc)
        else:
            stays[q].append(negative)
    return stays


def _rows(
    pool: Pool,
    own: Sequence[list[Negative]],
    mined: Mined,
    digests: Mapping[str, str],
    veto: Veto | None,
) -> Iterator[dict[str, Any]]:
    """JSONL rows that data.formats reads; "mined" is where each negative comes from, which it
    leaves unread. A reranker's scores are written as a teacher's."""
    groups = [[*first, *some] for first, some in zip(own, mined.negatives, strict=True)]
    scores: dict[tuple[int, int], float] = {}
    if veto is not None:
        pairs = [
            (q, doc)
            for q, some in enumerate(groups)
            for doc in (*pool.positives[q], *(n.doc for n in some))
        ]
        asked = {(q, n.doc): n.scores for q, some in enumerate(groups) for n in some}
        scores = {p: asked[p]["reranker"] for p in pairs if "reranker" in asked.get(p, ())}
        others = [p for p in pairs if p not in scores]
        found = veto.scores(others, "other passages").tolist()
        scores |= dict(zip(others, found, strict=True))
    for q, some in enumerate(groups):
        positives, negatives = pool.positives[q], [n.doc for n in some]
        row: dict[str, Any] = {
            "query_id": pool.queries.ids[q],
            "query": pool.queries.texts[q],
            "positive": [pool.docs.texts[d] for d in positives],
            "positive_ids": [pool.docs.ids[d] for d in positives],
            "negative": [pool.docs.texts[d] for d in negatives],
            "negative_ids": [pool.docs.ids[d] for d in negatives],
        }
        if any(grade != 1 for grade in pool.grades[q]):
            row["positive_grades"] = pool.grades[q]
        if veto is not None and negatives:  # a pair with a score below 0 alone would be no example
            row["positive_scores"] = [round(scores[q, d], 6) for d in positives]
            row["negative_scores"] = [round(scores[q, d], 6) for d in negatives]
        row["mined"] = [_provenance(pool, n, q, mined, digests) for n in some]
        yield row


def _provenance(
    pool: Pool, negative: Negative, q: int, mined: Mined, digests: Mapping[str, str]
) -> dict[str, Any]:
    if negative.source == "data":
        return pool.mined.get((q, negative.doc), {"source": "data"})
    lowest = {scale: round(some[q], 6) for scale, some in mined.positive_scores.items()}
    return {
        "source": negative.source,
        "ranks": negative.ranks,
        "scores": {name: round(score, 6) for name, score in negative.scores.items()},
        "positive": lowest,
        **digests,
    }
