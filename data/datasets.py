"""The data of a run: every data set of the settings (data/reading.py), tokenised, ready for
batches.
"""

# Shapes: E examples

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from conf.schema import DataConfig, ModelConfig, SourceConfig
from data.batches import TrainSet, TrainStore
from data.cache import Strings
from data.formats import RetrievalSet
from data.reading import ReadSet, read_sets
from data.stored import GROUP_VALUES, index_arrays
from data.tokens import Tokenise, TokenStore, open_token_store


class Spec(Protocol):
    """What of models.towers.TowerSpec is needed here."""

    query_prompt: str
    passage_prompt: str
    prompt_in_pooling: bool
    max_query_length: int
    max_passage_length: int


@dataclass
class Data:
    """What a run trains and is judged on.

    dev, test  retrieval sets by name: "dev" and "test", with several data sets the names of those.
               The first is the one to judge by; Python sources add "test-all", the test questions
               among the passages of every split.
    prompts    (query, passage) prompt of each retrieval set, None for the model's own
    report     sizes, bad rows, splits and leakage, ready for JSON
    """

    train: TrainStore
    dev: dict[str, RetrievalSet]
    test: dict[str, RetrievalSet]
    prompts: dict[str, tuple[str | None, str | None]]
    report: dict[str, Any]

    @property
    def compared(self) -> dict[str, RetrievalSet]:
        """The test sets that the untrained model answers too. "test-all" is not among them: its
        passages are ten times those of "test", and encoding them twice would double the run."""
        left_out = "test-all" if "test" in self.test else None  # a user's set may be called so
        return {name: one for name, one in self.test.items() if name != left_out}


def open_data(
    c: DataConfig,
    spec: Spec,
    tokenizer_query: Tokenizer,
    tokenizer_passage: Tokenizer,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    with_scores: bool = False,
) -> Data:
    """Read and tokenise the data of `c`, or open what an earlier run left for the same content.

    spec         prompts and maximum lengths of the model
    tokenizers   with truncation and padding off
    seed         of the choice of data.max_examples
    vocab_size   rows of the model's embedding table; None: not checked
    with_scores  keep a teacher's scores of each query's own passages; rows of one query are joined
    Raises ValueError for anything wrong with the data or its settings, and where scores are wanted
    but there are none.
    """
    found = read_sets(c, groups=with_scores)
    tokenizers = tokenizer_query, tokenizer_passage
    lengths = [
        length if c.max_train_length is None else min(length, c.max_train_length)
        for length in (spec.max_query_length, spec.max_passage_length)
    ]
    train_sets = []
    for one in found.sets:
        prompts = prompts_of(one.source, spec)
        stores = token_stores(one, c, prompts, tokenizers, lengths, vocab_size=vocab_size)
        train_sets.append(train_set(one, stores, prompts, prompt_in_pooling=spec.prompt_in_pooling))
    kept = kept_examples([len(s.query_E) for s in train_sets], c.max_examples, seed)
    store = TrainStore(train_sets, c.mix, c.mix_temperature, kept)
    if with_scores:
        check_scores(store)
        check_positives(store)
    return Data(store, found.dev, found.test, found.prompts, found.report_of(store))


def check_scores(store: TrainStore) -> None:
    """Raise ValueError where these examples have no scores of a teacher."""
    _, *scores = store.group_values
    if not any(np.isfinite(s).any() for s in scores):
        raise ValueError(
            "loss.kind=margin_mse and kl, and loss.teacher_weight of a reranker, learn a teacher's"
            " scores, but no row has positive_scores and negative_scores; python prepare.py"
            " 'stages=[score]' score.model=<reranker or retriever>, or 'stages=[mine]'"
            " mine.reranker=<reranker> where there are no negatives yet, writes them"
        )


def check_positives(store: TrainStore) -> None:
    """Raise ValueError where a retriever has nothing to learn from an example."""
    for one in store.sets:
        alone = int((np.diff(one.positives.offsets) == 0).sum())
        if alone:
            raise ValueError(
                f"{one.name or 'data'}: {alone} queries have no positive; a retriever needs one for"
                " each (task=rerank trains on such groups too)"
            )


def token_stores(
    one: ReadSet,
    c: DataConfig,
    prompts: tuple[str, str],
    tokenizers: tuple[Tokenizer, Tokenizer],
    lengths: tuple[int, int],
    *,
    vocab_size: int | None,
    tokenise_with: Tokenise | None = None,
) -> tuple[TokenStore, TokenStore]:
    """Queries and passages of one data set as tokens; prompts, tokenizers and most tokens of a text
    are given for both.
    """
    stores = []
    for side, prompt, tokenizer, length in zip(
        ("queries", "passages"), prompts, tokenizers, lengths, strict=True
    ):
        texts = Strings(one.folder, side)
        stores.append(
            open_token_store(
                lambda texts=texts: texts,
                num_texts=len(texts),
                texts_digest=one.info["digests"][side],
                tokenizer=tokenizer,
                prompt=prompt,
                max_length=length,
                cache_dir=c.cache_dir,
                vocab_size=vocab_size,
                what=f"{side} of {one.name}" if one.name else side,
                tokenise_with=tokenise_with,
            )
        )
    return stores[0], stores[1]


def adopt_prompts(spec: Any, c: DataConfig) -> None:
    """Make the prompts of the data sets, where all have the same, the model's own: the export then
    has what was trained and judged. Where they differ they are noted in spec.set_prompts."""
    of_sets = {name: prompts_of(source, spec) for name, source in (c.sets or {"": c}).items()}
    if len(set(of_sets.values())) == 1:
        spec.query_prompt, spec.passage_prompt = next(iter(of_sets.values()))
    else:
        spec.set_prompts = of_sets


def prompts_of(source: SourceConfig | ModelConfig, spec: Any) -> tuple[str, str]:
    """(query, passage) prompt of a data set, or of a run's settings: its own, else the model's."""
    return (
        spec.query_prompt if source.query_prompt is None else source.query_prompt,
        spec.passage_prompt if source.passage_prompt is None else source.passage_prompt,
    )


def train_set(
    one: ReadSet,
    stores: tuple[TokenStore, TokenStore],
    prompts: tuple[str, str],
    *,
    prompt_in_pooling: bool = True,
) -> TrainSet:
    folder, digests = one.folder, one.info["digests"]
    queries, passages = stores
    query_E, positives, negatives = index_arrays(folder)
    values = {n: np.load(p) for n in GROUP_VALUES if (p := folder / f"{n}.npy").is_file()}
    return TrainSet(
        name=one.name,
        queries=queries,
        passages=passages,
        query_E=query_E,
        positives=positives,
        negatives=negatives,
        query_hash=np.load(folder / "queries.hash.npy"),
        passage_hash=np.load(folder / "passages.hash.npy"),
        labels=Strings(folder, "labels"),
        weight=one.source.weight,
        query_skip=0 if prompt_in_pooling else queries.num_prompt_tokens,
        passage_skip=0 if prompt_in_pooling else passages.num_prompt_tokens,
        query_prompt=prompts[0],
        passage_prompt=prompts[1],
        query_texts=Strings(folder, "queries"),
        passage_texts=Strings(folder, "passages"),
        query_digest=digests["queries"],
        passage_digest=digests["passages"],
        **values,
    )


def kept_examples(sizes: list[int], num: int | None, seed: int) -> list[np.ndarray | None]:
    """The examples of each set among the first `num` of all after a seeded shuffle; None for a set
    of which all are.
    """
    if num is None or num >= sum(sizes):
        return [None] * len(sizes)
    bases = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.sort(np.random.default_rng([seed, num]).permutation(int(bases[-1]))[:num])
    kept = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(bases)]
    if not all(map(len, kept)):
        raise ValueError(
            f"data.max_examples ({num}) leaves a data set without examples; sizes are {sizes}"
        )
    return kept
