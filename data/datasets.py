"""The data of a run: every data set read, split, tokenised and indexed once, then opened from the
cache by content.

A data set's folder in the cache (set-<digest>) holds the training examples as texts and index
vectors, the held-out retrieval sets, and what was found on the way: bad rows, how it was split,
what leaks between the splits.
"""

# Shapes: E examples, P (example, passage) pairs, Q queries and G judgements of a retrieval set

import logging
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from conf.schema import DataConfig, SourceConfig
from data.batches import Ragged, TrainSet, TrainStore
from data.beir import part
from data.cache import Strings, StringsWriter, built_once, digest_of, file_digest
from data.formats import (
    BadRows,
    Example,
    RerankSet,
    RetrievalSet,
    available_splits,
    content_hash,
    detect,
    read_examples,
    read_groups,
    read_rerank_set,
    read_retrieval_set,
    rerank_set,
    resolve_split,
    retrieval_set,
)
from data.pydocs import read_pydocs, sources_digest
from data.records import HashIndex
from data.splits import (
    SPLITS,
    Assignment,
    incidences,
    leakage_report,
    split_by_components,
    split_examples,
)
from data.tokens import Tokenise, TokenStore, open_token_store
from data.toy import TOY_VERSION, toy_examples

log = logging.getLogger(__name__)

INDEX_VERSION = 2  # raise it when the same files and settings would give another folder
MAX_LEAKAGE_EXAMPLES = (
    200_000  # training examples compared with the held-out ones; 10 microseconds a text each
)
NO_POSITIVE = "all in train: no query has a positive"
GROUP_VALUES = ("positive_grades", "positive_scores", "negative_scores")  # beside the passages
_ENDINGS = frozenset(".jsonl .ndjson .json .tsv .csv .parquet .arrow .gz".split())


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
        return {name: one for name, one in self.test.items() if not name.endswith("test-all")}


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
    return Data(store, found.dev, found.test, found.prompts, found.report_of(store))


def check_scores(store: TrainStore) -> None:
    """Raise ValueError where a retriever cannot learn a teacher's scores from these examples."""
    _, *scores = store.group_values
    if not any(np.isfinite(s).any() for s in scores):
        raise ValueError(
            "loss.kind=margin_mse and kl learn a teacher's scores, but no row has positive_scores"
            " and negative_scores; python prepare.py 'stages=[mine]' mine.reranker=<reranker>"
            " writes them"
        )
    for one in store.sets:
        alone = int((np.diff(one.positives.offsets) == 0).sum())
        if alone:
            raise ValueError(
                f"{one.name or 'data'}: {alone} queries have no positive; a retriever needs one for"
                " each (task=rerank trains on such groups too)"
            )


@dataclass
class ReadSet:
    """One data set in the cache."""

    name: str
    source: SourceConfig
    folder: Path
    info: dict[str, Any]


@dataclass
class ReadSets:
    """All data sets of the settings, not yet tokenised. The rest as in Data."""

    sets: list[ReadSet]
    dev: dict[str, Any]
    test: dict[str, Any]
    prompts: dict[str, tuple[str | None, str | None]]

    def report_of(self, store: TrainStore) -> dict[str, Any]:
        log.info(
            "data: %s training examples; %s",
            f"{store.num_examples:,}",
            "; ".join(
                f"{split} {label}: {len(s.query_ids):,} queries, {len(s.doc_ids):,} passages"
                for split, sets in (("dev", self.dev), ("test", self.test))
                for label, s in sets.items()
            ),
        )
        reports = {one.name or "data": one.info["report"] for one in self.sets}
        return {"train_examples": store.num_examples, "data_sets": reports}


def read_sets(c: DataConfig, *, groups: bool = False) -> ReadSets:
    """Every data set of `c` from the cache, read now where it is not there.

    groups  for rerankers: see data.formats.read_groups; dev and test are RerankSets
    Raises ValueError for anything wrong with the data or its settings.
    """
    found = ReadSets([], {}, {}, {})
    for name, source in (c.sets or {"": c}).items():
        folder, info = _open_set(name, source, c, groups)
        found.sets.append(ReadSet(name, source, folder, info))
        for key, stored in info["sets"].items():
            split, _, extra = key.partition("-")
            label = (name or split) + (f"-{extra}" if extra else "")
            sets = found.dev if split == "dev" else found.test
            if label in sets:
                raise ValueError(
                    f"two data sets would be reported as {label!r}; rename one of data.sets"
                )
            one = _load_set(folder, stored, label, groups)
            sets[label] = _limited(one, c) if split == "dev" else one
            found.prompts[label] = (source.query_prompt, source.passage_prompt)
    return found


# -- one data set -------------------------------------------------------------------------------


def _open_set(
    name: str, source: SourceConfig, c: DataConfig, groups: bool
) -> tuple[Path, dict[str, Any]]:
    cache_dir = Path(c.cache_dir)
    content = _content_digest(source)
    key = digest_of(
        INDEX_VERSION,
        content,
        source.root,
        source.format,
        source.columns,
        source.filter,
        (source.train_split, source.dev_split, source.test_split),
        (c.dev_fraction, c.test_fraction, c.split_seed),
        c.eval_corpus,
        c.on_bad_row,
        *(["groups", source.texts, _texts_digest(source)] if groups else []),
    )
    folder = cache_dir / f"set-{key}"
    list_path = cache_dir / f"bad_rows-{key}.jsonl"
    shown = name or source.root or source.format
    info = built_once(
        folder, lambda f: _build(f, source, c, list_path, groups), what=f"index of {shown}"
    )
    bad = info["report"]["bad_rows"]
    if bad["count"]:
        log.warning("%s: %d bad rows left out, listed in %s", shown, bad["count"], bad["file"])
    return folder, info


def _content_digest(source: SourceConfig) -> str:
    """Of everything that reading the source depends on, its settings left out."""
    if source.format == "toy":
        return f"toy {TOY_VERSION}"
    if source.format == "pydocs":
        return sources_digest(source.root)
    if source.root and (path := Path(source.root).expanduser()).exists():
        files = [path] if path.is_file() else sorted(_data_files(path))
        return digest_of([(str(f.relative_to(path)), file_digest(f, full=True)) for f in files])
    if source.format == "hub" and source.root:
        return _hub_commit(source.root)
    detect(str(source.root or ""))  # raises, saying what is missing
    raise AssertionError


def _texts_digest(source: SourceConfig) -> str | None:
    """Of the texts that rows of ids stand for."""
    if source.texts is None:
        return None
    folder = Path(source.texts).expanduser()
    files = [p for p in (part(folder, n) for n in ("corpus.jsonl", "queries.jsonl")) if p]
    return digest_of([(f.name, file_digest(f, full=True)) for f in files])


def _data_files(folder: Path) -> Iterator[Path]:
    for depth in ("*", "*/*"):
        yield from (p for p in folder.glob(depth) if p.is_file() and p.suffix.lower() in _ENDINGS)


def _hub_commit(root: str) -> str:
    """The commit a hub id stands for now."""
    name = root.partition(":")[0]
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name).sha)
    except Exception as e:  # no package, no network, no such data set
        raise ValueError(
            f"data.root={root} is no file or folder here, and the hub does not answer for it"
            f" ({type(e).__name__}: {e}); check the id and the network, or give a local copy"
        ) from e


def _build(
    folder: Path, source: SourceConfig, c: DataConfig, list_path: Path, groups: bool
) -> dict[str, Any]:
    list_path.unlink(missing_ok=True)
    with BadRows(c.on_bad_row, list_path) as bad:
        writer = _Writer(folder, groups)
        if source.format in ("toy", "pydocs"):
            sets, split_info = _made_sets(source, c, writer, groups)
        else:
            sets, split_info = _read_sets(source, c, writer, bad, groups)
        sizes = writer.close()
    if c.eval_corpus == "all" and not _is_beir(source):
        sets = {
            key: _with_all_passages(s, folder, sets) for key, s in sets.items() if "-" not in key
        }
    leakage = leakage_report(
        {"train": _examples(folder), **{k: _judged(s) for k, s in sets.items() if "-" not in k}}
    )
    if sizes["examples"] > MAX_LEAKAGE_EXAMPLES:
        leakage["train_examples_compared"] = MAX_LEAKAGE_EXAMPLES
    report = {
        "root": source.root,
        "format": source.format,
        "train": sizes,
        **{k: {"queries": len(s.query_ids), "passages": len(s.doc_ids)} for k, s in sets.items()},
        "bad_rows": {
            "count": bad.count,
            "first": bad.first,
            "file": str(list_path) if bad.count else None,
        },
        "split": split_info,
        "leakage": leakage,
    }
    return {"sets": _save_sets(folder, sets), "report": report, "digests": writer.digests}


def _is_beir(source: SourceConfig) -> bool:
    return source.format == "beir" or (
        source.format == "auto" and detect(str(source.root)) == "beir"
    )


def _made_sets(
    source: SourceConfig, c: DataConfig, writer: "_Writer", groups: bool
) -> tuple[dict[str, RetrievalSet], dict[str, Any]]:
    """Python sources and the toy set: splits of their own."""
    if source.format == "toy":
        by_split = {split: toy_examples(split) for split in SPLITS}
        info: dict[str, Any] = {
            "method": "as made",
            "rows": {s: len(e) for s, e in by_split.items()},
        }
    else:
        docs = read_pydocs(source.root, cache_dir=c.cache_dir)
        by_split = {split: docs.examples(split) for split in SPLITS}
        info = {"method": "by module", **docs.report}
    for example in by_split["train"]:
        writer.add(example)
    set_of = rerank_set if groups else retrieval_set
    sets = {split: set_of(iter(by_split[split]), split) for split in ("dev", "test")}
    if source.format == "pydocs":
        everything = set_of((e for s in SPLITS for e in by_split[s]), "test-all")
        test = sets["test"]
        sets["test-all"] = replace(
            everything, query_ids=test.query_ids, query_texts=test.query_texts, qrels=test.qrels
        )
    return sets, info


def _read_sets(
    source: SourceConfig, c: DataConfig, writer: "_Writer", bad: BadRows, groups: bool
) -> tuple[dict[str, RetrievalSet], dict[str, Any]]:
    """Files and hub data: the splits that are there, the others held out of the training rows.

    Queries without a positive judge nothing: of a file without splits they are all trained on.
    """
    read = read_groups if groups else read_examples
    read_set = read_rerank_set if groups else read_retrieval_set
    own = _own_splits(source)
    fractions = {"dev": c.dev_fraction, "test": c.test_fraction}
    missing = [s for s in ("dev", "test") if own[s] is None and fractions[s] > 0]
    info: dict[str, Any] = {"own": own}
    if not missing:
        for example in read(source, own["train"], bad):
            writer.add(example)
        held: dict[str, list[Example]] = {}
    else:
        assignment = (_split_groups if groups else split_examples)(
            read(source, own["train"], bad),
            dev_fraction=fractions["dev"] if "dev" in missing else 0.0,
            test_fraction=fractions["test"] if "test" in missing else 0.0,
            seed=c.split_seed,
        )
        info.update(assignment.info)
        held = {s: [] for s in missing}
        rows = 0
        for row, example in enumerate(read(source, own["train"], bad)):
            rows = row + 1
            split = SPLITS[assignment.split_R[row]] if row < len(assignment.split_R) else None
            if split == "train":
                writer.add(example)
            elif split is not None:
                held[split].append(example)
        if rows != len(assignment.split_R):
            raise ValueError(
                f"data.root={source.root} changed while it was read: {len(assignment.split_R)}"
                f" rows, then {rows}; start again"
            )
    sets = {}
    for split in ("dev", "test"):
        if own[split] is not None:
            sets[split] = read_set(source, own[split], bad, name=split)
        elif held.get(split):
            sets[split] = _held_out(source, own["train"], held[split], split, bad, groups)
        elif info.get("method") != NO_POSITIVE:
            log.warning(
                "%s: no %s queries (set data.%s_fraction, or give a %s split)",
                source.root,
                split,
                split,
                split,
            )
    return sets, info


def _split_groups(examples: Iterable[Example], **settings: Any) -> Assignment:
    """split_examples of rows whose query has a positive in some row; the others are in train."""
    is_answered_R = array("b")

    def noted() -> Iterator[Example]:
        for example in examples:
            is_answered_R.append(bool(example.positives))
            yield example

    row_E, text_E, num_rows = incidences(noted())
    _, first = np.unique(row_E, return_index=True)
    query_R = text_E[first]  # a row's query comes before its positives
    answered = np.unique(query_R[np.array(is_answered_R, bool)])
    is_kept_R = np.isin(query_R, answered)
    split_R = np.zeros(num_rows, np.int8)
    if not is_kept_R.any():
        log.info("no query has a positive: all are trained on, none is held out")
        return Assignment(split_R, {"method": NO_POSITIVE})
    is_kept_E = is_kept_R[row_E]
    number_R = np.cumsum(is_kept_R) - 1
    kept = split_by_components(
        number_R[row_E[is_kept_E]], text_E[is_kept_E], num_rows=int(is_kept_R.sum()), **settings
    )
    split_R[is_kept_R] = kept.split_R
    return Assignment(split_R, kept.info)


def _own_splits(source: SourceConfig) -> dict[str, str | None]:
    """The data's names for train, dev and test; None for a split it does not have."""
    there = available_splits(source)
    own: dict[str, str | None] = {}
    if not there:
        return dict.fromkeys(SPLITS)
    for split, asked in zip(
        SPLITS, (source.train_split, source.dev_split, source.test_split), strict=True
    ):
        try:
            own[split] = resolve_split(source, asked)
        except ValueError:
            # a split the user named, or one that there must be
            if asked != split or split == "train":
                raise ValueError(
                    f"data.root={source.root} has no split {asked!r} to take for {split}; it has"
                    f" {', '.join(there)}; set data.{split}_split"
                ) from None
            own[split] = None
    for split in ("dev", "test"):
        if own[split] == own["train"]:  # train_split=test: the rest is held out of it
            own[split] = None
    if own["dev"] is not None and own["dev"] == own["test"]:
        raise ValueError(
            f"data.dev_split and data.test_split are both {own['dev']!r}; dev chooses, test judges"
        )
    return own


def _held_out(
    source: SourceConfig,
    train_split: str | None,
    held: list[Example],
    name: str,
    bad: BadRows,
    groups: bool,
) -> RetrievalSet:
    if not _is_beir(source):
        return (rerank_set if groups else retrieval_set)(iter(held), name, bad)
    whole = (read_rerank_set if groups else read_retrieval_set)(source, train_split, bad, name=name)
    chosen = {e.id for e in held}
    return _of_queries(whole, [i for i, q in enumerate(whole.query_ids) if q in chosen])


def _with_all_passages(
    one: RetrievalSet, folder: Path, sets: dict[str, RetrievalSet]
) -> RetrievalSet:
    """data.eval_corpus=all: the set's own passages, then those of training and of the other
    sets.
    """
    seen = {content_hash(t) for t in one.doc_texts}
    taken = set(one.doc_ids)
    ids, texts = list(one.doc_ids), list(one.doc_texts)
    others = (t for s in sets.values() if s is not one for t in s.doc_texts)
    for pool in (Strings(folder, "passages"), others):
        for text in pool:
            key = content_hash(text)
            if key in seen:
                continue
            seen.add(key)
            new = f"all{len(ids)}"
            while new in taken:
                new += "_"
            taken.add(new)
            ids.append(new)
            texts.append(text)
    return replace(one, doc_ids=ids, doc_texts=texts)


# -- training examples on disk ------------------------------------------------------------------


class _Side:
    """Distinct texts of one side in order of appearance."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._writer = StringsWriter(folder, name)
        self._numbers = HashIndex()
        self._hashes = array("q")

    def __len__(self) -> int:
        return len(self._writer)

    def add(self, text: str) -> int:
        key = content_hash(text)
        number = self._numbers.add(key, len(self._writer))
        if number is None:
            number = self._writer.append(text)
            self._hashes.append(key)
        return number

    def close(self) -> str:
        np.save(self._folder / f"{self._name}.hash.npy", np.array(self._hashes, np.int64))
        return self._writer.close()


class _Writer:
    """Streams examples into a folder; in memory 30 to 50 bytes a distinct text and 8 a pair.

    groups  for rerankers: grades and scores are kept, the examples of one query become one, and an
            example may have no positive
    """

    def __init__(self, folder: Path, groups: bool = False) -> None:
        self._folder, self._groups = folder, groups
        self._queries, self._passages = _Side(folder, "queries"), _Side(folder, "passages")
        self._labels = StringsWriter(folder, "labels")
        self._query_E = array("q")
        self._positives, self._negatives = array("q"), array("q")
        self._positive_ends, self._negative_ends = array("q", [0]), array("q", [0])
        self._values = {name: array("f") for name in GROUP_VALUES} if groups else {}
        self.digests: dict[str, str] = {}
        self._bar = tqdm(desc="read", unit="example", leave=False, delay=2)

    def add(self, example: Example) -> None:
        self._bar.update()
        query = self._queries.add(example.query)
        self._query_E.append(query)
        assert example.positives or (self._groups and example.negatives), example
        self._add_side(example, "positives", self._positives)
        self._positive_ends.append(len(self._positives))
        self._add_side(example, "negatives", self._negatives)
        self._negative_ends.append(len(self._negatives))
        if self._groups and query < len(self._labels):
            return  # a group is labelled by its first row
        same = example.id == example.where
        self._labels.append(example.id if same else f"{example.id} ({example.where})")

    def _add_side(self, example: Example, side: str, numbers: array) -> None:
        """The distinct passages of one side, with the values of the first of equal ones."""
        first: dict[int, int] = {}
        for i, text in enumerate(getattr(example, side)):
            first.setdefault(self._passages.add(text), i)
        numbers.extend(first)
        for name, values in self._values.items():
            if name.startswith(side[:8]):
                given = getattr(example, name)
                missing = 1.0 if name == "positive_grades" else math.nan
                values.extend(missing if given is None else given[i] for i in first.values())

    def close(self) -> dict[str, int]:
        """Sizes. Negatives that answer their query somewhere in the data are left out here, and
        counted.
        """
        self._bar.close()
        if not self._query_E:
            raise ValueError("the training split has no examples")
        query_E, positives, negatives = (
            np.array(a, np.int64) for a in (self._query_E, self._positives, self._negatives)
        )
        positive_ends, negative_ends = np.array(self._positive_ends), np.array(self._negative_ends)
        num_passages = max(1, len(self._passages))

        def keys(passages: np.ndarray, ends: np.ndarray) -> np.ndarray:
            return np.repeat(query_E, np.diff(ends)) * num_passages + passages

        is_answer = np.isin(keys(negatives, negative_ends), keys(positives, positive_ends))
        kept_before = np.concatenate([[0], np.cumsum(~is_answer)])
        arrays = {
            "query_E": query_E,
            "positive_ends": positive_ends,
            "positives": positives,
            "negative_ends": kept_before[negative_ends],
            "negatives": negatives[~is_answer],
        }
        if self._groups:
            arrays |= {name: np.array(v, np.float32) for name, v in self._values.items()}
            arrays["negative_scores"] = arrays["negative_scores"][~is_answer]
            arrays = _one_a_query(arrays, num_passages)
        for name, values in arrays.items():
            np.save(self._folder / f"{name}.npy", values)
        sizes = {
            "examples": len(arrays["query_E"]),
            "queries": len(self._queries),
            "passages": len(self._passages),
            "positives": len(arrays["positives"]),
            "negatives": len(arrays["negatives"]),
            "negatives_that_are_positives": int(is_answer.sum()),
        }
        if self._groups:
            sizes["without_positives"] = int((np.diff(arrays["positive_ends"]) == 0).sum())
        if is_answer.any():
            log.warning(
                "%s negatives are positives of the same query and are left out",
                f"{int(is_answer.sum()):,}",
            )
        self.digests = {"queries": self._queries.close(), "passages": self._passages.close()}
        self._labels.close()
        return sizes


def _one_a_query(arrays: dict[str, np.ndarray], num_passages: int) -> dict[str, np.ndarray]:
    """The arrays of a folder with the examples of each query as one, in the order of queries;
    a passage that comes twice keeps its first values.
    """
    query_E = arrays["query_E"]
    num_queries = int(query_E.max()) + 1  # numbered by first appearance, so all are there
    out = {"query_E": np.arange(num_queries)}
    for side in ("positive", "negative"):
        owner = np.repeat(query_E, np.diff(arrays[f"{side}_ends"]))
        _, first = np.unique(owner * num_passages + arrays[f"{side}s"], return_index=True)
        kept = np.sort(first)
        kept = kept[np.argsort(owner[kept], kind="stable")]
        count = np.bincount(owner[kept], minlength=num_queries)
        out[f"{side}_ends"] = np.concatenate([[0], np.cumsum(count)])
        for name in (f"{side}s", *(n for n in GROUP_VALUES if n.startswith(side))):
            out[name] = arrays[name][kept]
    return out


def _examples(folder: Path) -> Iterator[Example]:
    """The training examples of a finished folder, MAX_LEAKAGE_EXAMPLES of them at most, evenly
    spread.
    """
    queries, passages, labels = (Strings(folder, n) for n in ("queries", "passages", "labels"))
    query_E, positives, negatives = _index_arrays(folder)
    num = len(query_E)
    chosen = np.unique(np.linspace(0, num - 1, min(num, MAX_LEAKAGE_EXAMPLES)).astype(np.int64))
    for start in range(0, len(chosen), 4096):
        rows = chosen[start : start + 4096]
        sides = []
        for ragged in (positives, negatives):
            values, owner = ragged.take(rows)
            sides.append(np.split(values, np.searchsorted(owner, np.arange(1, len(rows)))))
        for e, some, others in zip(rows.tolist(), *sides, strict=True):
            yield Example(
                query=queries[query_E[e]],
                positives=[passages[p] for p in some.tolist()],
                negatives=[passages[p] for p in others.tolist()],
                where=labels[e],
                id=labels[e],
            )


def _index_arrays(folder: Path) -> tuple[np.ndarray, Ragged, Ragged]:
    def array_of(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy")

    return (
        array_of("query_E"),
        Ragged(array_of("positive_ends"), array_of("positives")),
        Ragged(array_of("negative_ends"), array_of("negatives")),
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


def prompts_of(source: SourceConfig, spec: Any) -> tuple[str, str]:
    """(query, passage) prompt of a data set: its own, else the model's."""
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
    query_E, positives, negatives = _index_arrays(folder)
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


# -- retrieval sets on disk ---------------------------------------------------------------------


def _judged(one: RetrievalSet) -> Iterator[Example]:
    text = dict(zip(one.doc_ids, one.doc_texts, strict=True))
    for query_id, query in zip(one.query_ids, one.query_texts, strict=True):
        answers = [text[d] for d, grade in one.qrels[query_id].items() if grade > 0]
        yield Example(
            query=query,
            positives=answers,
            negatives=[],
            where=f"{one.name}: {query_id}",
            id=query_id,
        )


def _save_strings(folder: Path, name: str, texts: Iterable[str]) -> None:
    writer = StringsWriter(folder, name)
    for text in texts:
        writer.append(text)
    writer.close()


def _save_sets(folder: Path, sets: dict[str, RetrievalSet]) -> dict[str, dict[str, str]]:
    """Set -> names of its tables. Sets over the same corpus share one."""
    stored: dict[str, dict[str, str]] = {}
    for key, one in sets.items():
        twin = next(
            (
                k
                for k in stored
                if sets[k].doc_ids == one.doc_ids and sets[k].doc_texts == one.doc_texts
            ),
            None,
        )
        if twin is None:
            _save_strings(folder, f"{key}.doc_ids", one.doc_ids)
            _save_strings(folder, f"{key}.doc_texts", one.doc_texts)
        _save_strings(folder, f"{key}.query_ids", one.query_ids)
        _save_strings(folder, f"{key}.query_texts", one.query_texts)
        doc_number = {d: n for n, d in enumerate(one.doc_ids)}
        judged_G3 = [
            (n, doc_number[d], grade)
            for n, q in enumerate(one.query_ids)
            for d, grade in one.qrels[q].items()
        ]
        np.save(folder / f"{key}.qrels.npy", np.array(judged_G3, np.int64).reshape(-1, 3))
        if isinstance(one, RerankSet) and one.candidates is not None:
            offered = [
                (n, doc_number[d]) for n, q in enumerate(one.query_ids) for d in one.candidates[q]
            ]
            np.save(folder / f"{key}.candidates.npy", np.array(offered, np.int64).reshape(-1, 2))
        stored[key] = {"queries": key, "docs": stored[twin]["docs"] if twin else key}
    return stored


def _load_set(
    folder: Path, stored: dict[str, str], name: str, groups: bool
) -> RetrievalSet | RerankSet:
    queries, docs = stored["queries"], stored["docs"]
    doc_ids, query_ids = (
        list(Strings(folder, f"{docs}.doc_ids")),
        list(Strings(folder, f"{queries}.query_ids")),
    )
    qrels: dict[str, dict[str, int]] = {q: {} for q in query_ids}
    for q, d, grade in np.load(folder / f"{queries}.qrels.npy").tolist():
        qrels[query_ids[q]][doc_ids[d]] = grade
    one = RetrievalSet(
        name=name,
        doc_ids=doc_ids,
        doc_texts=list(Strings(folder, f"{docs}.doc_texts")),
        query_ids=query_ids,
        query_texts=list(Strings(folder, f"{queries}.query_texts")),
        qrels=qrels,
    )
    if not groups:
        return one
    path = folder / f"{queries}.candidates.npy"
    candidates: dict[str, list[str]] | None = None
    if path.is_file():
        candidates = {q: [] for q in query_ids}
        for q, d in np.load(path).tolist():
            candidates[query_ids[q]].append(doc_ids[d])
    return RerankSet(**vars(one), candidates=candidates)


def _limited(one: RetrievalSet, c: DataConfig) -> RetrievalSet:
    """At most data.max_eval_queries of the queries, over all the passages."""
    if c.max_eval_queries is None or len(one.query_ids) <= c.max_eval_queries:
        return one
    chosen = np.random.default_rng(c.split_seed).permutation(len(one.query_ids))[
        : c.max_eval_queries
    ]
    return _of_queries(one, np.sort(chosen).tolist())


def _of_queries(one: RetrievalSet, rows: list[int]) -> RetrievalSet:
    """Some of the queries, by number, over all the passages."""
    query_ids = [one.query_ids[i] for i in rows]
    some = replace(
        one,
        query_ids=query_ids,
        query_texts=[one.query_texts[i] for i in rows],
        qrels={q: one.qrels[q] for q in query_ids},
    )
    if isinstance(some, RerankSet) and some.candidates is not None:
        some.candidates = {q: some.candidates[q] for q in query_ids}
    return some
