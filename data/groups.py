"""Groups for rerankers: a query with its passages, their labels and a teacher's scores, as pairs of
token ids; a pure function of (seed, step, rank, world).

Shapes: E groups of a step over all ranks, P (query, positive) pairs or all pairs of a rank, M own
negatives drawn, X passages drawn at random, N passages of a data set.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from conf.schema import DataConfig, StageConfig, TrainConfig
from data.batches import Batches, ExampleIds, Ragged, TrainStore, seeded
from data.datasets import (
    Data,
    check_scores,
    kept_examples,
    prompts_of,
    token_stores,
    train_set,
)
from data.pairs import PairTemplate, tokenise_plain
from data.reading import read_sets
from data.records import RerankSet

log = logging.getLogger(__name__)

_RANDOM = 3  # stream of random numbers beside those of data.batches


class Spec(Protocol):
    """What of models.reranker.RerankerSpec is needed here."""

    query_prompt: str
    passage_prompt: str
    max_length: int


@dataclass(frozen=True)
class GroupBatch:
    """What one rank scores in one step. The pairs of a group stand side by side, on one rank.

    pair_tokens, pair_types  int32 ids and token types of each pair
    group_P             number of each pair's group on this rank, int64, ascending from 0
    label_P             grade of each pair, float32; 0: not relevant
    score_P             a teacher's scores, float32, NaN where the data has none; None: it has none
                        at all
    num_examples(_global), num_pairs_global   groups of this rank, of all; pairs of all
    example_ids         ids of this rank's groups, read when looked at
    num_positives_global  pairs with a grade, of all ranks; None: of this rank
    num_many_global     groups of two pairs or more, of all ranks; None: of this rank
    """

    pair_tokens: list[np.ndarray]
    pair_types: list[np.ndarray]
    group_P: np.ndarray
    label_P: np.ndarray
    score_P: np.ndarray | None
    num_examples: int
    num_examples_global: int
    num_pairs_global: int
    example_ids: Sequence[str]
    num_positives_global: int | None = None
    num_many_global: int | None = None

    def __post_init__(self) -> None:
        if self.num_positives_global is None:
            object.__setattr__(self, "num_positives_global", int((self.label_P > 0).sum()))
        if self.num_many_global is None:
            many = int((np.bincount(self.group_P) > 1).sum())
            object.__setattr__(self, "num_many_global", many)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pair_tokens))


@dataclass
class GroupStore(TrainStore):
    """A TrainStore whose examples are groups, as texts without special tokens.

    template    joins a query and a passage
    max_length  most tokens of a pair
    """

    template: PairTemplate = field(kw_only=True)
    max_length: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive_grades, self.positive_scores, self.negative_scores = self.group_values
        self._leave_out_answers()
        scores = (self.positive_scores, self.negative_scores)
        self.has_scores = any(bool(np.isfinite(s).any()) for s in scores)

    def _leave_out_answers(self) -> None:
        """Leave out negatives that answer the same query in another data set."""

        def pairs(passages: Ragged) -> np.ndarray:
            owner = np.repeat(np.arange(len(passages)), np.diff(passages.offsets))
            query = self._query_content[self._query_E[owner]]
            return query * self._num_contents + self._passage_content[passages.values]

        is_answer = np.isin(pairs(self._negatives), pairs(self._positives))
        if not is_answer.any():
            return
        log.warning(
            "%s negatives answer the same query in another data set and are left out",
            f"{int(is_answer.sum()):,}",
        )
        kept_before = np.concatenate([[0], np.cumsum(~is_answer)])
        offsets = kept_before[self._negatives.offsets]
        self._negatives = Ragged(offsets, self._negatives.values[~is_answer])
        self.negative_scores = self.negative_scores[~is_answer]

    @cached_property
    def distinct_passages(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(contents ascending, the first passage with each) of every set's passages in use, those
        that another set has too among them."""
        _, used = self.texts_used()
        is_used = np.isin(self._passage_twin, used)
        found = []
        for low, high in pairwise(self._passage_base.tolist()):
            passage_N = low + np.flatnonzero(is_used[low:high])
            content_N, first = np.unique(self._passage_content[passage_N], return_index=True)
            found.append((content_N, passage_N[first]))
        return found

    def batches(
        self, c: TrainConfig, total_steps: int | None = None, *, rank: int = 0, world: int = 1
    ) -> "GroupBatches":
        """The run's batches under the TrainConfig `c`."""
        return GroupBatches(
            self,
            batch_size=c.optim.batch_size,
            seed=c.seed,
            max_negatives=c.data.max_negatives,
            random_negatives=c.data.random_negatives,
            curriculum=c.data.curriculum,
            steps=total_steps,
            rank=rank,
            world=world,
        )


class GroupBatches(Batches):
    """As Batches; batch_size counts groups.

    random_negatives  training passages of the group's data set that join it as not relevant, drawn
                      anew each step; fewer where there are not as many
    curriculum        what the first steps do otherwise (Bengio et al. 2009), stage by stage; what a
                      stage leaves null is as the settings above say
    """

    def __init__(
        self,
        store: GroupStore,
        *,
        random_negatives: int = 0,
        curriculum: Sequence[StageConfig] = (),
        **settings: Any,
    ) -> None:
        super().__init__(store, **settings)
        last = (self.max_negatives, random_negatives, store.max_length)
        self.stages = [*(_filled(stage, last) for stage in curriculum), last]
        self.stage_ends = np.cumsum([s.steps for s in curriculum])

    def batch_at(self, step: int) -> GroupBatch:
        store = self.store
        stage = int(np.searchsorted(self.stage_ends, step, side="right"))
        max_negatives, random_negatives, max_length = self.stages[stage]
        example_E = self.plan.examples(step)
        at_P, owner_P = store._positives.places(example_E)
        at_M, owner_M = self.negatives(step, example_E, max_negatives)
        positive_P, negative_M = store._positives.values[at_P], store._negatives.values[at_M]
        own, owner = np.concatenate([positive_P, negative_M]), np.concatenate([owner_P, owner_M])
        drawn_X, owner_X = self._at_random(step, example_E, own, owner, random_negatives)
        none_X = np.full(len(drawn_X), np.nan, np.float32)
        # the pairs of all ranks: positives, own negatives and drawn ones of each group in turn
        owner = np.concatenate([owner, owner_X])
        order = np.argsort(owner, kind="stable")
        owner = owner[order]
        passage = np.concatenate([own, drawn_X])[order]
        num_negatives = len(negative_M) + len(drawn_X)
        label = np.concatenate([store.positive_grades[at_P], np.zeros(num_negatives, np.float32)])
        score = np.concatenate([store.positive_scores[at_P], store.negative_scores[at_M], none_X])
        length = self._lengths(store._query_E[example_E][owner], passage, max_length)
        low, high = self.stretch(np.bincount(owner, length, len(example_E)).astype(np.int64))
        mine = slice(*np.searchsorted(owner, (low, high)).tolist())
        pairs = self._pairs(example_E[low:high], owner[mine] - low, passage[mine], max_length)
        return GroupBatch(
            pair_tokens=[ids_T for ids_T, _ in pairs],
            pair_types=[types_T for _, types_T in pairs],
            group_P=owner[mine] - low,
            label_P=label[order][mine],
            score_P=score[order][mine] if store.has_scores else None,
            num_examples=high - low,
            num_examples_global=len(example_E),
            num_pairs_global=len(owner),
            example_ids=ExampleIds(store, example_E[low:high]),
            num_positives_global=int((label > 0).sum()),
            num_many_global=int((np.bincount(owner) > 1).sum()),
        )

    def _lengths(self, query: np.ndarray, passage: np.ndarray, max_length: int) -> np.ndarray:
        """Tokens of pairs."""
        store = self.store
        length = store._query_length[query] + store._passage_length[passage]
        return np.minimum(length + store.template.num_special, max_length)

    def _pairs(
        self, example_E: np.ndarray, owner_P: np.ndarray, passage_P: np.ndarray, max_length: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        store = self.store
        queries, _ = store.query_tokens(store._query_E[example_E])
        distinct, at_P = np.unique(passage_P, return_inverse=True)
        passages, _ = store.passage_tokens(distinct)
        return [
            store.template.join(queries[e], passages[n], max_length)
            for e, n in zip(owner_P.tolist(), at_P.tolist(), strict=True)
        ]

    def _at_random(
        self,
        step: int,
        example_E: np.ndarray,
        passage: np.ndarray,
        owner: np.ndarray,
        num_wanted: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(passages drawn for each group, which group) without texts that are relatives of its
        query or in the group already.

        passage, owner  those of all groups, and whose
        """
        if not num_wanted:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        store, rng = self.store, seeded(self.seed, _RANDOM, step)
        asked_E = store._query_content[store._query_E[example_E]]
        own = store._passage_content[passage][np.argsort(owner, kind="stable")]
        own_ends = np.cumsum(np.bincount(owner, minlength=len(example_E)))
        drawn, count_E = [], []
        for set_number, asked, own_content in zip(
            store.set_of(example_E).tolist(),
            asked_E.tolist(),
            np.split(own, own_ends[:-1]),
            strict=True,
        ):
            content_N, passage_N = store.distinct_passages[set_number]
            related, _ = store._relatives.take(np.array([asked]))
            taken = np.concatenate([related, own_content])
            at = np.minimum(np.searchsorted(content_N, taken), len(content_N) - 1)
            left_out = np.unique(at[content_N[at] == taken])
            # enough that as many remain when those are taken away
            num = min(len(passage_N), num_wanted + len(left_out))
            chosen = rng.choice(len(passage_N), num, replace=False)
            chosen = chosen[~np.isin(chosen, left_out)][:num_wanted]
            drawn.append(passage_N[chosen])
            count_E.append(len(chosen))
        return np.concatenate(drawn), np.repeat(np.arange(len(example_E)), count_E)


def _filled(stage: StageConfig, last: tuple) -> tuple:
    """(most own negatives, random ones, tokens of a pair) of a stage; `last` holds those of the
    steps after all stages, and no pair is longer than there."""
    own = (stage.max_negatives, stage.random_negatives, stage.max_train_length)
    most, random, length = (b if a is None else a for a, b in zip(own, last, strict=True))
    return most, random, min(length, last[2])


@dataclass
class GroupData:
    """What a run trains a reranker on and judges it by; as data.datasets.Data."""

    train: GroupStore
    dev: dict[str, RerankSet]
    test: dict[str, RerankSet]
    report: dict[str, Any]
    prompts: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    compared = Data.compared


def open_groups(
    c: DataConfig,
    spec: Spec,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    with_scores: bool = False,
) -> GroupData:
    """Read and tokenise the data of `c`, or open what an earlier run left for the same content.

    spec        prompts and maximum length of the model
    tokenizer   with truncation and padding off
    seed        of the choice of data.max_examples
    vocab_size  rows of the model's embedding table; None: not checked
    with_scores  whether the loss learns a teacher's scores
    Raises ValueError for anything wrong with the data or its settings, where groups are positives
    alone, and where scores are wanted but there are none.
    """
    found = read_sets(c, groups=True)
    template = PairTemplate.of(tokenizer)
    max_length = min(spec.max_length, c.max_train_length or spec.max_length)
    lengths = {"model.max_pair_length": spec.max_length, "data.max_train_length": max_length}
    for i, stage in enumerate(c.curriculum):
        lengths[f"data.curriculum[{i}].max_train_length"] = stage.max_train_length or max_length
    sets = []
    for one in found.sets:
        prompts = prompts_of(one.source, spec)
        template.check_room(tokenise_plain(tokenizer, prompts), lengths)
        stores = token_stores(
            one, c, prompts, (tokenizer, tokenizer), (max_length, max_length),
            vocab_size=vocab_size, tokenise_with=tokenise_plain,
        )  # fmt: skip
        sets.append(train_set(one, stores, prompts))
    kept = kept_examples([len(s.query_E) for s in sets], c.max_examples, seed)
    store = GroupStore(
        sets, c.mix, c.mix_temperature, kept, template=template, max_length=max_length
    )
    if with_scores:
        check_scores(store)
    if not len(store._negatives.values) and not c.random_negatives:
        raise ValueError(
            f"{c.root or ', '.join(c.sets)}: no query has a passage that does not answer it, and a"
            " reranker learns from the difference; set data.random_negatives (e.g. 4), or mine"
            " negatives: python prepare.py 'stages=[mine]' data=<folder> out=<folder>"
        )
    return GroupData(store, found.dev, found.test, found.report_of(store), found.prompts)
