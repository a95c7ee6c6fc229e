"""One optimiser step's worth of texts, as token ids and index vectors; a pure function of (seed,
step, rank, world).

Shapes: E examples, P (query, positive) pairs, A distinct queries of all ranks, B of a rank, N
distinct passages of a rank, K known relatives at most; numbers of passages are columns over all
ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from conf.schema import OptimConfig, TrainConfig
from data.tokens import TokenStore

# streams of random numbers drawn from one seed
_ORDER, _SCHEDULE, _NEGATIVES = 0, 1, 2
_BLOCK_PAIRS = 1 << 22  # pairs of related queries looked at together: 100 MiB


@dataclass(frozen=True)
class ScoredPairs:
    """Each query of a rank with its own positives and negatives, group by group, and a teacher's
    scores, for losses that learn from them.

    query_P    row of query_tokens, ascending: the number of the group
    passage_P  column of its passage over all ranks
    label_P    grade, float32; 0: not relevant
    score_P    float32, NaN where the data has none
    """

    query_P: np.ndarray
    passage_P: np.ndarray
    label_P: np.ndarray
    score_P: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What one rank encodes in one step, and what answers what.

    query_tokens, passage_tokens  distinct texts, int32 ids with prompt and special tokens
    pair_query_P                  row of query_tokens; a query with several positives owns several
                                  pairs
    pair_passage_P                column of its positive
    pair_weight_P                 1 / positives of its example, float32; sums to num_examples
    relatives_BK                  columns that are never negatives of the query: all its known
                                  positives, texts equal to it or to them; padded with -1
    num_examples(_global)         of this rank, of all ranks: the loss is a mean over the latter
    passage_offset                column of passage_tokens[0]
    query_prompt_tokens_B, passage_prompt_tokens_N   leading tokens left out of pooling, int32
    example_ids                   ids of this rank's examples, read when looked at
    query_offset                  number of query_tokens[0] among the queries of all ranks
    num_queries_global            queries of all ranks; None: of this rank alone
    query_relatives_BK            queries of all ranks that are never negatives of the query: itself
                                  and whatever shares an answer with it, TrainStore.query_relatives;
                                  padded with -1. None: not asked for
    query_numbers_A, passage_numbers_N   of all ranks' queries and passages in the TrainStore, for
                                  what is known of them beforehand (data/teacher.py), int64; None in
                                  a batch that no store made
    scored                        every query's own passages with a teacher's scores; None: not
                                  asked for
    """

    query_tokens: list[np.ndarray]
    passage_tokens: list[np.ndarray]
    pair_query_P: np.ndarray
    pair_passage_P: np.ndarray
    pair_weight_P: np.ndarray
    relatives_BK: np.ndarray
    num_examples: int
    num_examples_global: int
    passage_offset: int
    num_passages_global: int
    query_prompt_tokens_B: np.ndarray
    passage_prompt_tokens_N: np.ndarray
    example_ids: Sequence[str]
    query_offset: int = 0
    num_queries_global: int | None = None
    query_relatives_BK: np.ndarray | None = None
    query_numbers_A: np.ndarray | None = None
    passage_numbers_N: np.ndarray | None = None
    scored: ScoredPairs | None = None

    def __post_init__(self) -> None:
        if self.num_queries_global is None:
            object.__setattr__(self, "num_queries_global", len(self.query_tokens))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.query_tokens)) + sum(map(len, self.passage_tokens))


def chunks(lengths: np.ndarray, chunk_tokens: int) -> list[np.ndarray]:
    """Numbers of the texts of each chunk, longest texts first, every text once.

    lengths       tokens a text
    chunk_tokens  a chunk's most tokens; a longer text is a chunk of its own
    """
    if chunk_tokens <= 0:
        raise ValueError(f"chunk_tokens must be > 0, got {chunk_tokens}")
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    total = np.cumsum(lengths[order])
    parts, start, used = [], 0, 0
    while start < len(order):
        end = max(start + 1, int(np.searchsorted(total, used + chunk_tokens, side="right")))
        parts.append(order[start:end])
        start, used = end, int(total[end - 1])
    return parts


@dataclass
class Ragged:
    """Lists of int64 of any length, end to end: row r is values[offsets[r]:offsets[r + 1]]."""

    offsets: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values of the rows end to end, which of `rows` each belongs to)."""
        place, owner = self.places(rows)
        return np.asarray(self.values[place], np.int64), owner

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """take, but where the values stand among all."""
        starts = np.asarray(self.offsets[rows], np.int64)
        counts = np.asarray(self.offsets[rows + 1], np.int64) - starts
        owner = np.repeat(np.arange(len(rows)), counts)
        before = np.cumsum(counts) - counts
        return np.arange(len(owner)) + (starts - before)[owner], owner


@dataclass
class TrainSet:
    """One data set as numbers. Texts are numbered by first appearance; equal texts (content_hash)
    are one text.

    query_E                   query of each example
    positives, negatives      passages of each example
    query_hash, passage_hash  content_hash of each text
    labels                    id and place of each example, for messages
    weight                    relative share among several sets
    *_skip                    leading tokens of every text that pooling leaves out
    positive_grades           for rerankers, beside positives.values: how relevant, float32
    *_scores                  for rerankers, beside the values: a teacher's, float32, NaN where it
                              has none
    query_texts, passage_texts    the texts themselves by number, without prompts
    query_digest, passage_digest  of all of them in order
    """

    name: str
    queries: TokenStore
    passages: TokenStore
    query_E: np.ndarray
    positives: Ragged
    negatives: Ragged
    query_hash: np.ndarray
    passage_hash: np.ndarray
    labels: Sequence[str]
    weight: float = 1.0
    query_skip: int = 0
    passage_skip: int = 0
    query_prompt: str = ""
    passage_prompt: str = ""
    query_texts: Sequence[str] = ()
    passage_texts: Sequence[str] = ()
    query_digest: str = ""
    passage_digest: str = ""
    positive_grades: np.ndarray | None = None
    positive_scores: np.ndarray | None = None
    negative_scores: np.ndarray | None = None


@dataclass
class TrainStore:
    """Several data sets end to end, ready to be drawn from.

    sets             in the order of the settings
    mix              mixed (a batch draws from all sets) | one (each batch from one set)
    mix_temperature  shares are proportional to (weight * size) ** (1 / mix_temperature)
    kept             for each set the examples used, None for all (data.max_examples)
    """

    sets: list[TrainSet]
    mix: str = "mixed"
    mix_temperature: float = 1.0
    kept: list[np.ndarray | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.sets
        self.kept = self.kept or [None] * len(self.sets)
        self.sizes = [
            len(s.query_E) if k is None else len(k)
            for s, k in zip(self.sets, self.kept, strict=True)
        ]
        self._example_base = _bases([len(s.query_E) for s in self.sets])
        self._query_base = _bases([len(s.queries) for s in self.sets])
        self._passage_base = _bases([len(s.passages) for s in self.sets])
        self._query_E = _joined([s.query_E for s in self.sets], self._query_base)
        self._positives = _joined_ragged([s.positives for s in self.sets], self._passage_base)
        self._negatives = _joined_ragged([s.negatives for s in self.sets], self._passage_base)
        self._query_length = np.concatenate([s.queries.length_n for s in self.sets])
        self._passage_length = np.concatenate([s.passages.length_n for s in self.sets])
        self._query_twin = _twins([(s.query_hash, s.query_prompt) for s in self.sets])
        self._passage_twin = _twins([(s.passage_hash, s.passage_prompt) for s in self.sets])
        self._number_contents()

    @property
    def num_examples(self) -> int:
        return sum(self.sizes)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in which the sets give num_examples examples, with one set every one once; with
        mix=one as near to them as whole batches of each set come."""
        return _Plan.of(self, batch_size, seed=0).steps_per_epoch

    def num_steps(self, c: OptimConfig) -> int:
        """Steps of a run: optim.steps, else optim.epochs."""
        return c.steps or math.ceil(c.epochs * self.steps_per_epoch(c.batch_size))

    def batches(
        self, c: TrainConfig, total_steps: int | None = None, *, rank: int = 0, world: int = 1
    ) -> "Batches":
        """The run's batches under the TrainConfig `c`."""
        return Batches(
            self,
            batch_size=c.optim.batch_size,
            seed=c.seed,
            max_negatives=c.data.max_negatives,
            query_relatives=c.loss.query_negatives,
            with_scores=c.loss.learns_scores,
            steps=total_steps,
            rank=rank,
            world=world,
        )

    def texts_used(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted numbers of the queries and of the passages that batches can hold: those of the
        examples kept, and of twins the first.
        """
        passages = [self._positives.values, self._negatives.values]
        query_E = self._query_E
        if any(k is not None for k in self.kept):
            example_E = np.concatenate(
                [
                    base + (np.arange(len(s.query_E)) if k is None else k)
                    for s, k, base in zip(
                        self.sets, self.kept, self._example_base[:-1], strict=True
                    )
                ]
            )
            query_E = query_E[example_E]
            passages = [self._positives.take(example_E)[0], self._negatives.take(example_E)[0]]
        is_query = np.zeros(len(self._query_twin), bool)
        is_query[self._query_twin[query_E]] = True
        is_passage = np.zeros(len(self._passage_twin), bool)
        for numbers in passages:
            is_passage[self._passage_twin[numbers]] = True
        return np.flatnonzero(is_query), np.flatnonzero(is_passage)

    @cached_property
    def group_values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(grades of positives, scores of positives, scores of negatives) of all sets, float32; for
        sets that were read as groups."""
        names = ("positive_grades", "positive_scores", "negative_scores")
        grades, positive, negative = (
            np.concatenate([getattr(s, name) for s in self.sets]) for name in names
        )
        return grades, positive, negative

    def set_of(self, example_E: np.ndarray) -> np.ndarray:
        """Which set each example is from."""
        return np.searchsorted(self._example_base, example_E, side="right") - 1

    def label(self, example: int) -> str:
        part = int(self.set_of(np.array(example)))
        name = f"{self.sets[part].name}: " if len(self.sets) > 1 else ""
        return name + self.sets[part].labels[example - int(self._example_base[part])]

    def _number_contents(self) -> None:
        """Number contents (equal texts on either side, in any set) and list their relatives."""
        num_queries = int(self._query_base[-1])
        hashes = [s.query_hash for s in self.sets] + [s.passage_hash for s in self.sets]
        content_U, content = np.unique(np.concatenate(hashes), return_inverse=True)
        self._query_content, self._passage_content = content[:num_queries], content[num_queries:]
        owner = np.repeat(np.arange(len(self._query_E)), np.diff(self._positives.offsets))
        asked = self._query_content[self._query_E[owner]]
        answer = self._passage_content[self._positives.values]
        num_contents = len(content_U)
        own = np.unique(self._query_content)
        # (query, relative) pairs as one sorted number each; the query's own text is among its
        # relatives
        keys = np.unique(np.concatenate([asked * num_contents + answer, own * (num_contents + 1)]))
        row, relative = keys // num_contents, keys % num_contents
        offsets = np.zeros(num_contents + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=num_contents), out=offsets[1:])
        self._num_contents = num_contents
        self._relatives = Ragged(offsets, relative)  # by content number

    def relatives(self, query_B: np.ndarray, column_N: np.ndarray) -> np.ndarray:
        """relatives_BK of queries among a batch's passages, both given by number in this store."""
        content_N = self._passage_content[column_N]
        order_N = np.argsort(content_N, kind="stable")
        sorted_N = content_N[order_N]
        asked_B = self._query_content[query_B]
        # a query with more relatives than there are columns is looked up from the side of the
        # columns
        is_wide_B = np.diff(self._relatives.offsets)[asked_B] > len(column_N)
        narrow_B = np.flatnonzero(~is_wide_B)
        content_R, owner_R = self._relatives.take(asked_B[narrow_B])
        first_R = np.searchsorted(sorted_N, content_R, side="left")
        count_R = np.searchsorted(sorted_N, content_R, side="right") - first_R
        row = np.repeat(narrow_B[owner_R], count_R)
        before_R = np.cumsum(count_R) - count_R
        column = order_N[np.arange(len(row)) + np.repeat(first_R - before_R, count_R)]
        for b in np.flatnonzero(is_wide_B).tolist():
            related = self._relatives.values[
                self._relatives.offsets[asked_B[b]] : self._relatives.offsets[asked_B[b] + 1]
            ]
            at_N = np.minimum(np.searchsorted(related, content_N), len(related) - 1)
            hits = np.flatnonzero(related[at_N] == content_N)
            row = np.concatenate([row, np.full(len(hits), b)])
            column = np.concatenate([column, hits])
        order = np.lexsort((column, row))
        return _padded(row[order], column[order], len(query_B))

    def query_relatives(self, query_A: np.ndarray, low: int, high: int) -> np.ndarray:
        """query_relatives_BK of queries low ... high - 1 among all of query_A, numbers in this
        store.

        Two queries are relatives when a text is a relative of both: an answer that they share, the
        text of one that answers the other, or the text that both are (with different prompts).
        """
        content_R, owner_R = self._relatives.take(self._query_content[query_A])
        order_R = np.argsort(content_R, kind="stable")
        content_R, owner_R = content_R[order_R], owner_R[order_R]
        first_R = np.searchsorted(content_R, content_R, side="left")
        count_R = np.searchsorted(content_R, content_R, side="right") - first_R
        # most texts are relatives of one query alone
        is_shared_R = (count_R > 1) & (owner_R >= low) & (owner_R < high)
        shared = np.flatnonzero(is_shared_R)
        shared = shared[np.argsort(owner_R[shared], kind="stable")]
        itself = np.arange(high - low)
        keys = [itself * len(query_A) + itself + low]
        # queries that share many answers are found as often; in blocks, so that memory follows the
        # result
        ends = np.cumsum(count_R[shared])
        cuts = np.arange(_BLOCK_PAIRS, ends[-1], _BLOCK_PAIRS) if len(ends) else ()
        for block in np.split(shared, np.searchsorted(ends, cuts)):
            count = count_R[block]
            before = np.cumsum(count) - count
            at = np.arange(count.sum()) + np.repeat(first_R[block] - before, count)
            row = np.repeat(owner_R[block] - low, count)
            keys.append(np.unique(row * len(query_A) + owner_R[at]))
        row, column = np.divmod(np.unique(np.concatenate(keys)), max(1, len(query_A)))
        return _padded(row, column, high - low)

    def query_tokens(self, numbers: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(token ids, tokens left out of pooling) of queries by number."""
        stores = [s.queries for s in self.sets]
        return _take(stores, [s.query_skip for s in self.sets], self._query_base, numbers)

    def passage_tokens(self, numbers: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        stores = [s.passages for s in self.sets]
        return _take(stores, [s.passage_skip for s in self.sets], self._passage_base, numbers)


class Batches:
    """batch_at(step) for any step in any order; iterating gives steps 0, 1, ... up to `steps`.

    batch_size       examples a step, over all ranks
    max_negatives    own negatives an example and step, drawn anew each epoch; None: all
    query_relatives  whether batches say which queries are no negatives of each other
    with_scores      whether batches hold every query's own passages with a teacher's scores
    steps            where iteration ends; None: never
    """

    def __init__(
        self,
        store: TrainStore,
        *,
        batch_size: int,
        seed: int,
        max_negatives: int | None = None,
        query_relatives: bool = False,
        with_scores: bool = False,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank ({rank}) must be in [0, world), world is {world}")
        self.store, self.seed, self.max_negatives = store, seed, max_negatives
        self.query_relatives, self.with_scores = query_relatives, with_scores
        self.steps, self.rank, self.world = steps, rank, world
        self.plan = _Plan.of(store, batch_size, seed=seed)

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[Batch]:
        while self.steps is None or step < self.steps:
            yield self.batch_at(step)
            step += 1

    def num_examples_until(self, steps: int) -> int:
        """Examples of all ranks in steps 0 ... steps - 1."""
        return self.plan.num_examples_until(steps)

    def batch_at(self, step: int) -> Batch:
        store = self.store
        example_E = self.plan.examples(step)
        query_E = store._query_twin[store._query_E[example_E]]
        at_P, owner_P = store._positives.places(example_E)
        at_M, owner_M = self.negatives(step, example_E, self.max_negatives)
        positive_P = store._passage_twin[store._positives.values[at_P]]
        negative_M = store._passage_twin[store._negatives.values[at_M]]
        # distinct texts in order of first use; every rank finds the same, then takes its own
        # stretch
        query_A, row_E = _first_use(query_E)
        column_N, index = _first_use(np.concatenate([positive_P, negative_M]))
        column_P = index[: len(positive_P)]
        low_b, high_b = self.stretch(store._query_length[query_A])
        low_n, high_n = self.stretch(store._passage_length[column_N])
        row_P = row_E[owner_P]
        mine_P = (row_P >= low_b) & (row_P < high_b)
        mine_E = (row_E >= low_b) & (row_E < high_b)
        weight_P = (1.0 / np.bincount(owner_P, minlength=len(example_E)))[owner_P]
        scored = None
        if self.with_scores:
            row = np.concatenate([row_P, row_E[owner_M]])
            scored = self._scored(row, index, at_P, at_M, low_b, high_b)
        query_tokens, query_skip_B = store.query_tokens(query_A[low_b:high_b])
        passage_tokens, passage_skip_N = store.passage_tokens(column_N[low_n:high_n])
        return Batch(
            query_tokens=query_tokens,
            passage_tokens=passage_tokens,
            pair_query_P=row_P[mine_P] - low_b,
            pair_passage_P=column_P[mine_P],
            pair_weight_P=weight_P[mine_P].astype(np.float32),
            relatives_BK=store.relatives(query_A[low_b:high_b], column_N),
            num_examples=int(mine_E.sum()),
            num_examples_global=len(example_E),
            passage_offset=low_n,
            num_passages_global=len(column_N),
            query_prompt_tokens_B=query_skip_B,
            passage_prompt_tokens_N=passage_skip_N,
            example_ids=ExampleIds(store, example_E[mine_E]),
            query_offset=low_b,
            num_queries_global=len(query_A),
            query_relatives_BK=(
                store.query_relatives(query_A, low_b, high_b) if self.query_relatives else None
            ),
            query_numbers_A=query_A,
            passage_numbers_N=column_N,
            scored=scored,
        )

    def _scored(
        self,
        row: np.ndarray,
        column: np.ndarray,
        at_P: np.ndarray,
        at_M: np.ndarray,
        low: int,
        high: int,
    ) -> ScoredPairs:
        """This rank's pairs; row and column are of all positives, then of all negatives, and at_P
        and at_M where those stand in the store."""
        store = self.store
        grades, of_positives, of_negatives = store.group_values
        label = np.concatenate([grades[at_P], np.zeros(len(at_M), np.float32)])
        score = np.concatenate([of_positives[at_P], of_negatives[at_M]])
        mine = np.flatnonzero((row >= low) & (row < high))
        mine = mine[np.argsort(row[mine], kind="stable")]
        return ScoredPairs(row[mine] - low, column[mine], label[mine], score[mine])

    def negatives(
        self, step: int, example_E: np.ndarray, most: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(place among the store's negatives, which of example_E it belongs to) of those drawn, at
        most `most` an example; None: all."""
        place_M, owner_M = self.store._negatives.places(example_E)
        if most is None or not len(place_M):
            return place_M, owner_M
        # rank of a random number among those of the same example: a draw without replacement
        draw_M = seeded(self.seed, _NEGATIVES, step).random(len(place_M))
        order_M = np.lexsort((draw_M, owner_M))
        count_E = np.bincount(owner_M, minlength=len(example_E))
        rank_M = np.arange(len(order_M)) - np.repeat(np.cumsum(count_E) - count_E, count_E)
        kept = np.sort(order_M[rank_M < most])
        return place_M[kept], owner_M[kept]

    def stretch(self, lengths: np.ndarray) -> tuple[int, int]:
        """This rank's part [low, high) of the texts.

        Ranks get about the same number of tokens, and at least one text where there are enough.
        """
        num = len(lengths)
        total = np.cumsum(lengths, dtype=np.int64)
        spare = num >= self.world
        cuts = [0]
        for r in range(1, self.world):
            cut = int(np.searchsorted(total, total[-1] * r / self.world, side="left")) if num else 0
            if spare:
                cut = min(max(cut, cuts[-1] + 1), num - (self.world - r))
            cuts.append(max(cut, cuts[-1]))
        cuts.append(num)
        return cuts[self.rank], cuts[self.rank + 1]


def batches(
    store: TrainStore,
    *,
    batch_size: int,
    seed: int,
    steps: int | None = None,
    epochs: float | None = None,
    start_step: int = 0,
    max_negatives: int | None = None,
    query_relatives: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches from start_step on: until `steps`, or for `epochs`, or for ever."""
    if steps is None and epochs is not None:
        steps = int(np.ceil(epochs * store.steps_per_epoch(batch_size)))
    return Batches(
        store,
        batch_size=batch_size,
        seed=seed,
        max_negatives=max_negatives,
        query_relatives=query_relatives,
        steps=steps,
        rank=rank,
        world=world,
    ).starting_at(start_step)


class _Plan:
    """Which examples each step takes.

    An epoch takes quota[d] examples of set d, with one set all of them. Each set is walked through
    in permutations of its own: every example once before any comes twice.
    """

    @staticmethod
    def of(store: TrainStore, batch_size: int, *, seed: int) -> "_Plan":
        if batch_size <= 0:
            raise ValueError(f"optim.batch_size ({batch_size}) must be > 0")
        return (_PlanBySet if store.mix == "one" and len(store.sets) > 1 else _Plan)(
            store, batch_size, seed
        )

    def __init__(self, store: TrainStore, batch_size: int, seed: int) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        wanted = np.array(
            [
                (s.weight * n) ** (1 / store.mix_temperature)
                for s, n in zip(store.sets, store.sizes, strict=True)
            ]
        )
        self.quota = _apportion(wanted / wanted.sum(), store.num_examples)
        self.total = int(self.quota.sum())
        # two epochs are in use where a set's permutation and the epoch do not end together
        self._permutation = lru_cache(maxsize=2 * len(store.sets) + 2)(self._permutation)
        self._schedule = lru_cache(maxsize=2)(self._schedule)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.total // self.batch_size)

    def num_examples_until(self, steps: int) -> int:
        epochs, k = divmod(steps, self.steps_per_epoch)
        return epochs * self.total + k * self.batch_size  # a smaller batch ends an epoch

    def examples(self, step: int) -> np.ndarray:
        """Numbers of the examples of a step, int64."""
        epoch, k = divmod(step, self.steps_per_epoch)
        set_E, place_E = self._schedule(epoch)
        stretch = slice(k * self.batch_size, (k + 1) * self.batch_size)
        set_E, place_E = set_E[stretch], place_E[stretch]
        example_E = np.empty(len(set_E), np.int64)
        for d in np.unique(set_E).tolist():
            is_d = set_E == d
            example_E[is_d] = self._walk(
                d, epoch * int(self.quota[d]) + place_E[is_d].astype(np.int64)
            )
        return example_E

    def _walk(self, d: int, position: np.ndarray) -> np.ndarray:
        """Examples of set d at places of its endless walk."""
        lap, at = np.divmod(position, self.store.sizes[d])
        out = np.empty(len(position), np.int64)
        for one in np.unique(lap).tolist():
            out[lap == one] = self._permutation(one, d)[at[lap == one]]
        kept = self.store.kept[d]
        return int(self.store._example_base[d]) + (out if kept is None else kept[out])

    def _permutation(self, lap: int, d: int) -> np.ndarray:
        return seeded(self.seed, _ORDER, lap, d).permutation(self.store.sizes[d])

    def _schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Set of each place in the epoch, and how many places before it are of the same set."""
        return _shuffled_labels(self.quota, seeded(self.seed, _SCHEDULE, epoch))


class _PlanBySet(_Plan):
    """mix=one: each batch from one set; a set's last batch before it starts over may be smaller.

    An epoch takes of each set the number of batches nearest to its quota, at least one. A batch
    counts as the mean of the set's batches: of a set of 5 examples all have 5, whatever batch_size.
    """

    def __init__(self, store: TrainStore, batch_size: int, seed: int) -> None:
        super().__init__(store, batch_size, seed)
        size_D = np.array(store.sizes, np.int64)
        batches_D = -(-size_D // batch_size)  # from one start to the next
        # quota / (size / batches) rounded, half up, in whole numbers: exact at quota = size
        self.batch_quota = np.maximum(1, (2 * self.quota * batches_D + size_D) // (2 * size_D))

    @property
    def steps_per_epoch(self) -> int:
        return int(self.batch_quota.sum())

    def num_examples_until(self, steps: int) -> int:
        places = [self._place(step) for step in range(steps)]
        return sum(self._high(d, low) - low for d, _, low in places)

    def examples(self, step: int) -> np.ndarray:
        d, lap, low = self._place(step)
        return self._walk(d, lap * self.store.sizes[d] + np.arange(low, self._high(d, low)))

    def _high(self, d: int, low: int) -> int:
        return min(low + self.batch_size, self.store.sizes[d])

    def _place(self, step: int) -> tuple[int, int, int]:
        """(set, lap through it, first example within the lap) of a step."""
        epoch, k = divmod(step, self.steps_per_epoch)
        set_S, place_S = self._schedule(epoch)
        d = int(set_S[k])
        per_lap = -(-self.store.sizes[d] // self.batch_size)
        lap, number = divmod(epoch * int(self.batch_quota[d]) + int(place_S[k]), per_lap)
        return d, lap, number * self.batch_size

    def _schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return _shuffled_labels(self.batch_quota, seeded(self.seed, _SCHEDULE, epoch))


class ExampleIds(Sequence[str]):
    """Ids of a batch's examples, looked up when asked for: most batches never are."""

    def __init__(self, store: TrainStore, examples: np.ndarray) -> None:
        self._store, self._examples = store, examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._store.label(int(e)) for e in self._examples[i]]
        return self._store.label(int(self._examples[i]))


def seeded(*key: int) -> np.random.Generator:
    """Random numbers that depend on `key` alone: seed, stream, step."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(k) for k in key])))


def _apportion(share_D: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near share * total that sum to it (largest remainders); each at least 1."""
    exact_D = share_D * total
    # 1e-9: a share of exactly n / total must give n
    count_D = np.floor(exact_D + 1e-9).astype(np.int64)
    rest = max(0, total - int(count_D.sum()))
    count_D[np.argsort(-(exact_D - count_D), kind="stable")[:rest]] += 1
    return np.maximum(count_D, 1)


def _shuffled_labels(
    count_D: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(label d count_D[d] times, in random order; number of each among those of its label)."""
    label = np.repeat(np.arange(len(count_D), dtype=np.int32), count_D)
    if len(count_D) > 1:
        label = rng.permutation(label)
    place = np.empty(len(label), np.int64)
    for d in range(len(count_D)):
        place[label == d] = np.arange(count_D[d])
    return label, place


def _first_use(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values in order of first use, number of each value among them)."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return distinct[order], number[inverse]


def _padded(row: np.ndarray, column: np.ndarray, num_rows: int) -> np.ndarray:
    """(num_rows, K) int64: the columns of each row in the order given, then -1; `row` ascends."""
    count_B = np.bincount(row, minlength=num_rows)
    out_BK = np.full((num_rows, max(1, int(count_B.max(initial=0)))), -1, np.int64)
    out_BK[row, np.arange(len(row)) - (np.cumsum(count_B) - count_B)[row]] = column
    return out_BK


def _bases(sizes: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _joined(arrays: Sequence[np.ndarray], bases: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.asarray(a, np.int64) + b for a, b in zip(arrays, bases[:-1], strict=True)]
    )


def _joined_ragged(parts: Sequence[Ragged], bases: np.ndarray) -> Ragged:
    ends = _bases([len(p.values) for p in parts])
    offsets = [p.offsets[:-1] + e for p, e in zip(parts, ends[:-1], strict=True)]
    return Ragged(np.concatenate([*offsets, ends[-1:]]), _joined([p.values for p in parts], bases))


def _twins(sides: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """For each text of all sets the first one with the same content and prompt: they are encoded
    once.
    """
    num = sum(len(h) for h, _ in sides)
    if len(sides) == 1:
        return np.arange(num)
    prompts = list(dict.fromkeys(p for _, p in sides))
    prompt = np.concatenate([np.full(len(h), prompts.index(p)) for h, p in sides])
    hashes = np.concatenate([h for h, _ in sides])
    order = np.lexsort((np.arange(num), hashes, prompt))
    is_new = np.ones(num, bool)
    is_new[1:] = (np.diff(hashes[order]) != 0) | (np.diff(prompt[order]) != 0)
    twin = np.empty(num, np.int64)
    twin[order] = order[is_new][np.cumsum(is_new) - 1]
    return twin


def _take(
    stores: Sequence[TokenStore], skips: Sequence[int], bases: np.ndarray, numbers: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    if len(stores) == 1:
        return stores[0].take(numbers), np.full(len(numbers), skips[0], np.int32)
    part = np.searchsorted(bases, numbers, side="right") - 1
    tokens: list[Any] = [None] * len(numbers)
    for d, store in enumerate(stores):
        rows = np.flatnonzero(part == d)
        for row, ids_T in zip(rows.tolist(), store.take(numbers[rows] - bases[d]), strict=True):
            tokens[row] = ids_T
    return tokens, np.array(skips, np.int32)[part]
