"""Hard negatives mined anew while a retriever is trained (ANCE): by the weights of that moment,
among the passages that its training set holds.

Source: Xiong et al. 2021. There a second process mines while training goes on, with weights some
steps old; here training waits, and the result is that of one process.

Shapes: E examples, Q queries, N passages of a data set.
"""

import io
import logging
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from conf.schema import MineConfig, TrainConfig
from data.batches import Batch, Batches, Ragged, TrainSet, TrainStore
from data.candidates import PART_TEXTS, ModelSource
from data.negatives import choose
from data.pool import Pool
from evals.encode import encode
from models.towers import Towers
from runtime.distributed import Ranks
from runtime.run_dir import write_bytes_atomic

log = logging.getLogger(__name__)

DIGEST_BYTES = 16


class Refreshed:
    """Batches whose negatives are mined anew by the towers at every `every`-th step.

    batches  of the data as it was read: its own negatives stay where mine.keep_own says so
    mine     sources and models do not count: the towers are the one source
    folder   for step_<n>.npy: what was mined is read from there by the other ranks and by a resumed
             run, whose weights are no longer those that mined it

    batch_at(step) is called by all ranks, for one step after the other (any step to begin with).
    """

    def __init__(
        self,
        batches: Batches,
        *,
        every: int,
        towers: Towers,
        c: TrainConfig,
        mine: MineConfig,
        folder: Path,
        ranks: Ranks,
        precision: str = "auto",
    ) -> None:
        assert every > 0
        self.first, self.batches, self.mined_at = batches, batches, 0
        self.every, self.towers, self.c, self.mine = every, towers, c, mine
        self.folder, self.ranks, self.precision = folder, ranks, precision
        if batches.steps is not None and every >= batches.steps:
            log.warning(
                "mine_every (%d) is not below the number of steps (%d): no negatives are mined",
                every, batches.steps,
            )  # fmt: skip

    def num_examples_until(self, steps: int) -> int:
        return self.first.num_examples_until(steps)

    def batch_at(self, step: int) -> Batch:
        """Raises ValueError when the file that a resumed run needs is gone or damaged."""
        due = step // self.every * self.every
        if due != self.mined_at:
            path = self.folder / f"step_{due:08d}.npy"
            self.ranks.on_main(self._mine, path, step, due)
            first = self.first
            fresh = with_negatives(first.store, _unpacked(path, first.store))
            self.batches = fresh.batches(self.c, first.steps, rank=first.rank, world=first.world)
            self.mined_at = due
        return self.batches.batch_at(step)

    def _mine(self, path: Path, step: int, due: int) -> None:
        lost = f"{path}: the negatives of step {due} are gone"
        if path.exists():
            try:
                _unpacked(path, self.first.store)
                return
            except ValueError as error:
                lost = str(error)
                if step == due:
                    log.warning("%s; they are mined again", lost)
        if step != due:
            raise ValueError(
                f"{lost}, and so are the weights that mined them; start the run anew under another"
                " name="
            )
        log.info("step %d: mining negatives", step)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {"seed": self.c.seed, "precision": self.precision}
        mined = mine_store(self.first.store, self.towers, self.mine, **options)
        write_bytes_atomic(path, _packed(mined))


def mine_store(
    store: TrainStore,
    towers: Towers,
    c: MineConfig,
    *,
    seed: int,
    precision: str = "auto",
    batch_tokens: int = 0,
) -> list[Ragged]:
    """Negatives of every example of every set, numbers of the set's own passages.

    c  sources and models do not count: the towers are the one source
    """
    return [
        _mine_set(one, towers, c, seed=seed, precision=precision, batch_tokens=batch_tokens)
        for one in store.sets
    ]


def _mine_set(one: TrainSet, towers: Towers, c: MineConfig, *, seed: int, **options) -> Ragged:
    pool, example_Q = pool_of(one)
    options |= {"progress": f"mine {one.name}".strip()}
    q_QD = encode(towers, pool.queries.texts, "query", prompt=one.query_prompt, **options)
    parts = [
        encode(
            towers, pool.docs.texts[low : low + PART_TEXTS], "passage",
            prompt=one.passage_prompt, **options,
        )
        for low in range(0, len(pool.docs), PART_TEXTS)
    ]  # fmt: skip
    source = ModelSource(pool, q_QD, parts, next(towers.parameters()).device)
    mined = choose(pool, {"model": source}, c, seed=seed, judge=source)
    log.info("mined: %s", "; ".join(f"{what} {n:,}" for what, n in mined.counts.items()))
    chosen = [
        np.array([*(own if c.keep_own else ()), *(n.doc for n in some)], np.int64)
        for own, some in zip(pool.own, mined.negatives, strict=True)
    ]
    rows = [chosen[q] for q in example_Q.tolist()]
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(ends, np.concatenate([*rows, np.zeros(0, np.int64)]))


def pool_of(one: TrainSet) -> tuple[Pool, np.ndarray]:
    """(the set's queries and passages, query of each example in the pool)."""
    pool = Pool()
    for text in one.passage_texts:
        pool.docs.add(text)
    assert len(pool.docs) == len(one.passages)  # both by content_hash
    query_E = np.asarray(one.query_E)
    for e, (low, high) in enumerate(pairwise(one.positives.offsets.tolist())):
        below, above = one.negatives.offsets[e : e + 2].tolist()
        positives = one.positives.values[low:high].tolist()
        negatives = one.negatives.values[below:above].tolist()
        pool.add(one.query_texts[int(query_E[e])], None, positives, negatives)
    pool.close()
    # the pool numbers queries by first use
    number_of = {text: n for n, text in enumerate(pool.queries.texts)}
    return pool, np.array([number_of[one.query_texts[int(q)]] for q in query_E], np.int64)


def with_negatives(store: TrainStore, negatives: list[Ragged]) -> TrainStore:
    """The store with other negatives; what a teacher said of the old ones is left out."""
    sets = [
        replace(one, negatives=some, negative_scores=None)
        for one, some in zip(store.sets, negatives, strict=True)
    ]
    return TrainStore(sets, store.mix, store.mix_temperature, list(store.kept))


def _packed(negatives: list[Ragged]) -> bytes:
    """One int64 vector as .npy, of each set the offsets, then the values; a digest of all behind
    it, where numpy does not look."""
    parts = [part for one in negatives for part in (one.offsets, one.values)]
    file = io.BytesIO()
    np.save(file, np.concatenate(parts).astype("<i8"))
    return file.getvalue() + blake2b(file.getvalue(), digest_size=DIGEST_BYTES).digest()


def _unpacked(path: Path, store: TrainStore) -> list[Ragged]:
    """Raises ValueError for a file that is not as it was written, or is of another store."""
    content = path.read_bytes()
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if blake2b(payload, digest_size=DIGEST_BYTES).digest() != digest:
        raise ValueError(f"{path}: the negatives are damaged, or written by another version")
    flat, at, fits, negatives = np.load(io.BytesIO(payload)), 0, True, []
    for one in store.sets:
        offsets = flat[at : at + len(one.query_E) + 1]
        at += len(offsets)
        values = flat[at : at + int(offsets[-1])] if len(offsets) else offsets
        at += len(values)
        fits &= len(offsets) == len(one.query_E) + 1 and offsets[-1] == len(values)
        fits &= bool(((values >= 0) & (values < len(one.passages))).all())
        negatives.append(Ragged(offsets, values))
    if not fits or at != len(flat):
        raise ValueError(f"{path}: the negatives are of other data")
    return negatives
