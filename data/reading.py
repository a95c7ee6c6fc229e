"""Data sets read, split and indexed once, then opened from the cache by content.

A data set's folder in the cache (set-<digest>) holds what data/stored.py writes, and what was found
on the way: bad rows, how it was split, what leaks between the splits.
"""

# Shapes: E examples, R rows

import logging
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DataConfig, SourceConfig
from data.batches import TrainStore
from data.beir import part
from data.cache import Strings, built_once, digest_of, read_memo, remembered_digests, write_memo
from data.formats import (
    BadRows,
    Example,
    RerankSet,
    RetrievalSet,
    available_splits,
    content_hash,
    detect,
    opened_files,
    read_examples,
    read_groups,
    read_rerank_set,
    read_retrieval_set,
    rerank_set,
    retrieval_set,
    splits_called,
    tell_files,
)
from data.pydocs import read_pydocs, sources_digest
from data.splits import (
    SPLITS,
    Assignment,
    incidences,
    leakage_report,
    split_by_components,
    split_examples,
)
from data.stored import (
    MAX_LEAKAGE_EXAMPLES,
    ExamplesWriter,
    load_set,
    save_sets,
    stored_among,
    stored_examples,
    text_counts,
)
from data.toy import TOY_VERSION, toy_examples

log = logging.getLogger(__name__)

INDEX_VERSION = 4  # raise it when the same files and settings would give another folder
MAX_EXAMPLES = 10  # shown of what two sets share
NO_POSITIVE = "all in train: no query has a positive"


@dataclass
class ReadSet:
    """One data set in the cache."""

    name: str
    source: SourceConfig
    folder: Path
    info: dict[str, Any]


@dataclass
class ReadSets:
    """All data sets of the settings, not yet tokenised. The rest as in Data.

    shared  what leaks from the training of one set into the dev and test of another; None of one
            set
    """

    sets: list[ReadSet]
    dev: dict[str, Any]
    test: dict[str, Any]
    prompts: dict[str, tuple[str | None, str | None]]
    shared: dict[str, Any] | None = None

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
        digest = digest_of(store.num_examples, [one.folder.name for one in self.sets])
        report = {"digest": digest, "train_examples": store.num_examples, "data_sets": reports}
        return report if self.shared is None else report | {"leakage_between_sets": self.shared}


def read_sets(c: DataConfig, *, groups: bool = False) -> ReadSets:
    """Every data set of `c` from the cache, read now where it is not there.

    groups  for rerankers: see data.formats.read_groups; dev and test are RerankSets
    Raises ValueError for anything wrong with the data or its settings.
    """
    found = ReadSets([], {}, {}, {})
    judged: dict[tuple[str, str], RetrievalSet] = {}
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
            one = load_set(folder, stored, label, groups)
            if not extra:
                judged[name, split] = one
            sets[label] = _limited(one, c) if split == "dev" else one
            found.prompts[label] = (source.query_prompt, source.passage_prompt)
    if len(found.sets) > 1:
        found.shared = _leakage_between(found.sets, judged)
        warn_of_leaks("data.sets", found.shared)
    return found


def _leakage_between(
    sets: list[ReadSet], judged: dict[tuple[str, str], RetrievalSet]
) -> dict[str, Any]:
    """Texts of a set's dev and test that another set trains on, as leakage_report has them.

    judged  (set, split) -> what is judged
    Exact alone: queries that are queries there, positives that are passages there (positives or
    negatives). Counts are distinct texts.
    """
    own = {one.name: one.folder for one in sets}
    pairs = {}
    for (name, split), one in judged.items():
        sides: dict[str, dict[int, tuple[str, str]]] = {"queries": {}, "passages": {}}
        for e in _judged(one):
            for side, texts in (("queries", [e.query]), ("passages", e.positives)):
                for text in texts:
                    sides[side].setdefault(content_hash(text), (e.where, text[:200]))
        for other, folder in own.items():
            if folder == own[name]:  # one set under two names: what it shares is in its report
                continue
            counts, examples = {}, []
            for side, texts_there in sides.items():
                wanted = np.array(list(texts_there), np.int64)
                shared = np.sort(stored_among(folder, side, wanted)[1]).tolist()
                kind = f"exact_{side}"
                counts[kind] = len(shared)
                for key in shared[: MAX_EXAMPLES // 2]:
                    where, text = texts_there[key]
                    examples.append({"kind": kind, "where": where, "text": text})
            pairs[f"train of {other}/{split} of {name}"] = {**counts, "examples": examples}
    return {"method": "exact after NFKC and whitespace", "pairs": pairs}


# -- one data set -------------------------------------------------------------------------------


def _open_set(
    name: str, source: SourceConfig, c: DataConfig, groups: bool
) -> tuple[Path, dict[str, Any]]:
    cache_dir = Path(c.cache_dir)

    def key_of(content: str) -> str:
        return digest_of(
            INDEX_VERSION,
            content,
            source.root,
            source.format,
            source.columns,
            source.filter,
            (source.train_split, source.dev_split, source.test_split),
            (c.dev_fraction, c.test_fraction, c.max_held_out, c.split_seed),
            c.eval_corpus,
            c.on_bad_row,
            *(["groups", source.texts, _texts_digest(source, cache_dir)] if groups else []),
        )

    try:
        content = _content_digest(source, cache_dir)
    except _NoHub as e:
        if e.last is None or not (cache_dir / f"set-{key_of(e.last)}").is_dir():
            raise
        content = e.last
        log.warning(
            "%s: the hub does not answer; taken from the cache as of %s", source.root, content
        )
    key = key_of(content)
    if _is_on_hub(source):  # what is read is what the key says, whatever is pushed meanwhile
        source = replace(source, revision=content)
    folder = cache_dir / f"set-{key}"
    list_path = cache_dir / f"bad_rows-{key}.jsonl"
    shown = name or source.root or source.format
    info = built_once(
        folder, lambda f: _build(f, source, c, list_path, groups), what=f"index of {shown}"
    )
    warn_of_leaks(shown, info["report"]["leakage"])
    bad = info["report"]["bad_rows"]
    if bad["count"]:
        log.warning("%s: %d bad rows left out, listed in %s", shown, bad["count"], bad["file"])
    return folder, info


def shared_texts(leakage: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What of a leakage report is not 0: {"train and test": {"exact queries": 3}}."""
    counted = {
        pair.replace("/", " and "): {
            kind.replace("_", " "): n for kind, n in of.items() if kind != "examples" and n
        }
        for pair, of in leakage["pairs"].items()
    }
    return {pair: counts for pair, counts in counted.items() if counts}


def warn_of_leaks(shown: str | None, leakage: dict[str, Any]) -> None:
    """Questions asked in two splits are a warning; passages may belong to one corpus, and are
    told."""
    for pair, counts in shared_texts(leakage).items():
        level = logging.WARNING if any("queries" in kind for kind in counts) else logging.INFO
        told = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
        log.log(level, "%s: %s share %s; result.json shows examples", shown, pair, told)
    if note := sample_note(leakage):
        log.info("%s: %s", shown, note)


def sample_note(leakage: dict[str, Any]) -> str:
    """What has to be said beside the counts of a leakage report; "" where all was compared."""
    left_out = leakage.get("not_compared_for_near", 0)  # between sets none is compared for near
    if not left_out:
        return ""
    total = sum(
        n for texts in leakage["texts"].values() for n in (texts["queries"], texts["positives"])
    )
    return (
        f"near duplicates were looked for in a sample: {left_out:,} of {total:,} queries and"
        " positives are compared exactly alone"
    )


def _content_digest(source: SourceConfig, cache_dir: Path) -> str:
    """Of everything that reading the source depends on, its settings left out."""
    if source.format == "toy":
        return f"toy {TOY_VERSION}"
    if source.format == "pydocs":
        return sources_digest(source.root)
    if source.root and (path := Path(source.root).expanduser()).exists():
        is_hub = source.format == "hub" or (source.format == "auto" and detect(path) == "hub")
        own = {} if is_hub else _own_splits(source)
        files = opened_files(source, own.values())
        if not is_hub and not _is_beir(source):
            tell_files(source, own.values())
        names = [str(f.relative_to(path)) for f in files]
        return digest_of(own, names, remembered_digests(files, cache_dir))
    if _is_on_hub(source):
        return _hub_commit(str(source.root), source.revision, cache_dir)
    detect(str(source.root or ""))  # raises, saying what is missing
    raise AssertionError


def _texts_digest(source: SourceConfig, cache_dir: Path) -> str | None:
    """Of the texts that rows of ids stand for."""
    if source.texts is None:
        return None
    folder = Path(source.texts).expanduser()
    files = [p for p in (part(folder, n) for n in ("corpus.jsonl", "queries.jsonl")) if p]
    return digest_of([f.name for f in files], remembered_digests(files, cache_dir))


def _is_on_hub(source: SourceConfig) -> bool:
    root = source.root
    return source.format == "hub" and bool(root) and not Path(str(root)).expanduser().exists()


class _NoHub(ValueError):
    """The hub cannot be asked; last: the commit it named when it was asked last, if it ever was."""

    last: str | None = None


def _hub_commit(root: str, revision: str | None, cache_dir: Path) -> str:
    """The commit a hub id stands for now, remembered in cache_dir/hub.json; a revision that is a
    commit stands for itself. Raises ValueError, _NoHub where it is not the hub that says no.
    """
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    name = root.partition(":")[0]
    shown, memo_path = f"{name}@{revision or ''}", cache_dir / "hub.json"
    memo = read_memo(memo_path)
    try:
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as e:  # no package, no network, no such data set
        at = f" at revision {revision}" if revision else ""
        status = getattr(getattr(e, "response", None), "status_code", None)
        is_answer = status is not None and status < 500 and status not in (408, 429)
        error = (ValueError if is_answer else _NoHub)(
            f"data.root={root}{at} is no file or folder here, and the hub does not answer for it"
            f" ({type(e).__name__}: {e}); check the id and the network, or give a local copy"
        )
        last = memo.get(shown)
        if isinstance(error, _NoHub) and isinstance(last, str):
            error.last = last
        raise error from e
    if memo.get(shown) != commit:
        write_memo(memo_path, memo | {shown: commit})
    return commit


def _build(
    folder: Path, source: SourceConfig, c: DataConfig, list_path: Path, groups: bool
) -> dict[str, Any]:
    list_path.unlink(missing_ok=True)
    with BadRows(c.on_bad_row, list_path, "data.on_bad_row") as bad:
        writer = ExamplesWriter(folder, groups)
        if source.format in ("toy", "pydocs"):
            sets, split_info = _made_sets(source, c, writer, groups)
        else:
            sets, split_info = _read_sets(source, c, writer, bad, groups)
        sizes = writer.close()
    if c.eval_corpus == "all" and not _is_beir(source):
        sets = {
            key: _with_all_passages(s, folder, sets) for key, s in sets.items() if "-" not in key
        }
    own = {k: s for k, s in sets.items() if "-" not in k}
    held = chain.from_iterable(map(_judged, own.values()))
    leakage = leakage_report(
        {"train": stored_examples(folder, held), **{k: _judged(s) for k, s in own.items()}}
    )
    if sizes["examples"] > MAX_LEAKAGE_EXAMPLES:
        seen, leakage["texts"]["train"] = leakage["texts"]["train"], text_counts(folder)
        for role in ("queries", "positives"):
            leakage["not_compared_for_near"] += leakage["texts"]["train"][role] - seen[role]
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
    return {"sets": save_sets(folder, sets), "report": report, "digests": writer.digests}


def _is_beir(source: SourceConfig) -> bool:
    return source.format == "beir" or (
        source.format == "auto" and detect(str(source.root)) == "beir"
    )


def _made_sets(
    source: SourceConfig, c: DataConfig, writer: ExamplesWriter, groups: bool
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
    source: SourceConfig, c: DataConfig, writer: ExamplesWriter, bad: BadRows, groups: bool
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
            max_held_out=c.max_held_out,
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
    all_asked = dict(
        zip(SPLITS, (source.train_split, source.dev_split, source.test_split), strict=True)
    )
    if not there:
        named = {split: asked for split, asked in all_asked.items() if asked != split}
        if named:
            settings = " and ".join(f"data.{split}_split={n}" for split, n in named.items())
            raise ValueError(
                f"data.root={source.root} has no splits of its own, got {settings}; give a folder"
                f" with a file for each split, such as {next(iter(named.values()))}.jsonl, or leave"
                " out what names them: dev and test are then held out (data.dev_fraction,"
                " data.test_fraction)"
            )
        return dict.fromkeys(SPLITS)
    for split, asked in all_asked.items():
        found = splits_called(asked, there)
        if len(found) > 1:
            raise ValueError(
                f"data.root={source.root}: {' and '.join(map(repr, found))} could both be taken for"
                f" {split}; set data.{split}_split to one of them"
            )
        # a split the user named, or one that there must be
        if not found and (asked != split or split == "train"):
            raise ValueError(
                f"data.root={source.root} has no split {asked!r} to take for {split}; it has"
                f" {', '.join(there)}; set data.{split}_split"
            )
        own[split] = found[0] if found else None
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
