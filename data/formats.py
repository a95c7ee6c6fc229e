"""Text data of any common layout as Examples for training or a RetrievalSet for evaluation.

Formats (told by content): BEIR folders; JSONL, TSV, CSV and Parquet, one file or one a split
(train.jsonl, dev.tsv, validation.*, shards train-00000-of-00002.parquet; where no file has such a
name, squad_train.jsonl and my.test.tsv), also with .gz; hub data sets and folders saved by
`datasets`. Which columns are understood: data/columns.py.

Files are read as streams. What stays in memory is 16 to 32 bytes for each id that the data gives.
"""

import difflib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from conf.schema import SourceConfig
from data.beir import (
    BeirTexts,
    beir_paths,
    beir_splits,
    is_beir,
    part,
    read_beir,
    read_beir_examples,
)
from data.columns import (
    GROUP_ROLES,
    ROLES,
    ColumnError,
    Layout,
    check_mapping,
    group_layout,
    header_rule,
    layout_of,
    matches,
    read_row,
)
from data.judged_sets import rerank_set, retrieval_set
from data.labelled import Labels, with_texts
from data.records import (
    BadRows,
    Example,
    HashIndex,
    RerankSet,
    RetrievalSet,
    content_hash,
    hash_bytes,
    normalise,
    short,
)
from data.tables import (
    EXTENSIONS,
    Table,
    extension_format,
    hub_splits,
    hub_table,
    is_saved_dataset,
    open_table,
    sniff,
)

__all__ = [
    "BadRows",
    "Example",
    "RerankSet",
    "RetrievalSet",
    "available_splits",
    "content_hash",
    "detect",
    "normalise",
    "opened_files",
    "read_beir",
    "read_examples",
    "read_groups",
    "read_rerank_set",
    "read_retrieval_set",
    "rerank_set",
    "retrieval_set",
    "splits_called",
    "tell_files",
]

log = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test", "testing"),
}
_SHARD = re.compile(r"(.+?)[-_.]\d+(?:[-_]?of[-_]?\d+)?")


# -- where the data lies ------------------------------------------------------------------------


def _root(source: SourceConfig) -> Path:
    """The existing path of source.root. Raises ValueError naming the nearest one that exists."""
    if not source.root:
        raise ValueError(
            "data.root is not set; give the file or folder that holds the data: data.root=<path>"
        )
    path = Path(source.root).expanduser()
    if path.exists():
        return path
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    names = sorted(p.name for p in parent.iterdir()) if parent == path.parent else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if near:
        hint = f"; did you mean {parent / near[0]}?"
    elif parent == path.parent:
        hint = f"; {parent} holds {_listed(names)}"
    else:
        hint = f"; the nearest folder that exists is {parent}"
    if not path.is_absolute() and len(path.parts) == 2 and not path.suffix:
        hint += "; for a data set of the hub add data.format=hub"
    raise ValueError(f"data.root={source.root}: no such file or folder{hint}")


def _listed(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def detect(root: str | Path) -> str:
    """Format of a file or folder by its content: beir, hub, jsonl, tsv, csv or parquet.

    Raises ValueError for a path that does not exist, an empty file, or a folder with nothing
    recognisable.
    """
    path = _root(SourceConfig(root=str(root)))
    if path.is_dir():
        if is_beir(path):
            return "beir"
        if is_saved_dataset(path):
            return "hub"
        return sniff(_data_files(path, None)[0])
    return sniff(path)


def _data_files(folder: Path, kind: str | None) -> list[Path]:
    """Files of a folder that may hold rows, by name; of format `kind` alone where it is given."""
    kinds = set(EXTENSIONS.values()) if kind is None else {kind}
    beir_parts = {part(folder, "corpus.jsonl"), part(folder, "queries.jsonl")}
    for place in (folder, folder / "data"):  # hub repositories keep their Parquet under data/
        if not place.is_dir():
            continue
        files = [
            p
            for p in sorted(place.iterdir())
            if p.is_file()
            and extension_format(p) in kinds
            and p not in beir_parts
            and not p.name.startswith(".")
        ]
        # stats.json, dataset_infos.json: .json counts only where nothing else is there
        rows = [p for p in files if Path(p.name.removesuffix(".gz")).suffix.lower() != ".json"]
        files = rows or [p for p in files if _split_of(p) in _known_names()]
        if files:
            return files
    wanted = "corpus.jsonl with queries.jsonl and qrels/ (BEIR), dataset_dict.json (datasets)"
    found = _listed(sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir()))
    endings = ", ".join(f"*.{k}" for k in sorted(kinds))
    raise ValueError(f"{folder}: looked for {wanted}, or {endings}; found {found}")


def _known_names() -> set[str]:
    return {name for names in SPLIT_NAMES.values() for name in names}


def _split_of(path: Path) -> str:
    """train for train.jsonl, train.tsv.gz, train-00000-of-00002.parquet, train_1.csv."""
    stem = Path(path.name.removesuffix(".gz")).stem
    shard = _SHARD.fullmatch(stem)
    return shard.group(1) if shard else stem


def _split_files(source: SourceConfig, root: Path) -> dict[str | None, list[Path]]:
    """Files by split; {None: files} where the data has no split of its own."""
    if root.is_file():
        return {None: [root]}
    kind = None if source.format in ("auto", "hub") else source.format
    files = _data_files(root, kind)
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_split_of(path), []).append(path)
    asked = {source.train_split, source.dev_split, source.test_split}
    is_named = any(name in asked or name.lower() in _known_names() for name in groups)
    if not is_named and (by_word := _by_word(groups)) is not None:
        _check_one_way(root, groups)
        groups, is_named = by_word, True
    if not is_named:
        formats = {extension_format(p) for p in files}
        if len(formats) > 1:
            names = _listed([p.name for p in files])
            raise ValueError(
                f"{root}: expected one format, found {names}; name one file, or set data.format"
            )
        return {None: files}
    _check_one_way(root, groups)
    rank = {name: i for i, names in enumerate(SPLIT_NAMES.values()) for name in names}
    return {
        name: groups[name] for name in sorted(groups, key=lambda n: (rank.get(n.lower(), 9), n))
    }


def _by_word(groups: dict[str, list[Path]]) -> dict[str, list[Path]] | None:
    """Groups with squad_train, train_v2 and my.train as train; None where the words of the names do
    not tell: one names two splits, or none names train.
    """
    if len(groups) < 2:
        return None
    joined: dict[str, list[Path]] = {}
    for name, paths in groups.items():
        words = set(re.split(r"[-_.]", name.lower()))
        told = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
        if len(told) > 1:
            return None
        joined.setdefault(told[0] if told else name, []).extend(paths)
    return joined if "train" in joined else None


def _check_one_way(root: Path, groups: dict[str, list[Path]]) -> None:
    """Raises ValueError for a split in two formats, or in one file and in shards."""
    for name, paths in groups.items():
        formats = {extension_format(p) for p in paths}
        if len(formats) > 1 or (len(paths) > 1 and any(_is_whole(p, name) for p in paths)):
            names = _listed([p.name for p in paths])
            raise ValueError(
                f"{root}: split {name!r} is ambiguous, found {names};"
                " name one file, or set data.format"
            )


def _is_whole(path: Path, split: str) -> bool:
    return Path(path.name.removesuffix(".gz")).stem == split


def _kind(source: SourceConfig) -> str:
    """The format to read `source` as: the one it names, else the one its content shows."""
    if source.format in ("pydocs", "toy"):
        raise ValueError(
            f"data.format={source.format} is made by its own module, not read from a file"
        )
    if source.format == "hub":
        if not source.root:
            raise ValueError("data.root is not set; give the hub id: data.root=<owner>/<name>")
        if source.revision and Path(source.root).exists():
            raise ValueError(
                f"data.revision={source.revision} is of a data set of the hub; data.root="
                f"{source.root} lies here, leave it out"
            )
        return "hub"
    root = _root(source)
    if source.format == "beir" and not (root.is_dir() and is_beir(root)):
        found = _listed(sorted(p.name for p in root.iterdir())) if root.is_dir() else "a file"
        raise ValueError(
            f"{root}: expected corpus.jsonl, queries.jsonl and qrels/ (BEIR), found {found}"
        )
    return detect(root) if source.format == "auto" else source.format


def available_splits(source: SourceConfig) -> list[str]:
    """Names of the splits the data comes with, train, dev, test first; [] where it has none."""
    kind = _kind(source)
    if kind == "beir":
        return beir_splits(_root(source))
    if kind == "hub":
        return hub_splits(str(source.root), source.revision)
    return [name for name in _split_files(source, _root(source)) if name is not None]


def opened_files(source: SourceConfig, splits: Iterable[str | None]) -> list[Path]:
    """The files that the readers open for these splits, names of available_splits, or None for data
    without splits; of a local folder of the hub's all, since `datasets` goes to any depth.
    """
    kind, root = _kind(source), _root(source)
    if kind == "hub":
        return _files_below(root)
    if kind == "beir":
        return sorted({p for s in splits if s is not None for p in beir_paths(root, s)})
    by_split = _split_files(source, root)
    return sorted({p for s in splits for p in by_split.get(s, [])})


def tell_files(source: SourceConfig, splits: Iterable[str | None]) -> None:
    """Says in the log which files are read as what, where their names are not the splits', and
    warns of those that no split reads."""
    by_split = _split_files(source, _root(source))
    splits = list(dict.fromkeys(splits))
    others = [s for s in by_split if s not in splits]
    left = [p.name for s in others if str(s).lower() not in _known_names() for p in by_split[s]]
    for split in filter(None, splits):
        twins = [s for s in filter(None, others) if s.lower() in _same_split(split)]
        if twins:
            log.warning(
                "%s: not read: %s, since %s is there too and taken for that split",
                source.root,
                _listed([p.name for s in twins for p in by_split[s]]),
                split,
            )
    if left:
        log.warning(
            "%s: not read: %s; put train, dev or test into the name, or give the file by itself",
            source.root,
            _listed(left),
        )
    for split in splits:
        files = by_split.get(split, [])
        names = {_split_of(p) for p in files}
        listed = _listed([p.name for p in files])
        if split is not None and names - {split}:
            log.info("%s: split %s is %s", source.root, split, listed)
        elif split is None and len(names) > 1:
            log.warning(
                "%s: %d files are read as one set, of which the splits are held out (%s); if they"
                " are splits, name them train, dev and test",
                source.root,
                len(files),
                listed,
            )


def _files_below(root: Path) -> list[Path]:
    """Every file but hidden ones, also behind links to folders; each folder once."""
    files, seen = [root] if root.is_file() else [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        inner[:] = sorted(n for n in inner if not n.startswith(".")) if real not in seen else []
        if real not in seen:
            paths = [Path(folder, n) for n in names if not n.startswith(".")]
            files += [p for p in paths if p.is_file()]
        seen.add(real)
    return sorted(files)


def resolve_split(source: SourceConfig, split: str | None) -> str | None:
    """The data's own name for `split`: validation for dev and so on; None for data without splits.

    Raises ValueError for a split that is not there, and for None where there are several.
    """
    splits = available_splits(source)
    listed = ", ".join(splits)
    if split is None:
        if len(splits) > 1:
            raise ValueError(f"data.root={source.root} has splits {listed}; name one")
        return splits[0] if splits else None
    if split in splits:
        return split
    if not splits:
        root = Path(str(source.root)).expanduser()
        if root.is_file() and split in _same_split(_split_of(root)):
            return None  # test.jsonl alone, asked for "test"
        raise ValueError(
            f"data.root={source.root} has no splits of its own, so there is no {split!r};"
            f" give a folder with a file {split}.jsonl, or let it be split by shared texts"
        )
    others = splits_called(split, splits)
    if len(others) > 1:
        raise ValueError(
            f"data.root={source.root}: {' and '.join(map(repr, others))} could both be split"
            f" {split!r}; name one"
        )
    if not others:
        raise ValueError(
            f"data.root={source.root} has no split {split!r}; splits at hand: {listed}"
        )
    return others[0]


def splits_called(split: str, splits: Sequence[str]) -> list[str]:
    """Those of `splits` that `split` may mean: the one of that name, else Dev, validation, val...
    for dev.
    """
    if split in splits:
        return [split]
    return [s for s in splits if s.lower() in _same_split(split)]


def _same_split(split: str) -> tuple[str, ...]:
    name = split.lower()
    return next((names for names in SPLIT_NAMES.values() if name in names), (name,))


# -- rows to examples ---------------------------------------------------------------------------


def _tables(
    source: SourceConfig, split: str | None, bad: BadRows, *, groups: bool
) -> tuple[list[Table], SourceConfig]:
    kind = _kind(source)
    if kind == "hub":
        table, wanted = hub_table(str(source.root), split, source.filter, source.revision)
        return [table], replace(source, filter=wanted)
    files = _split_files(source, _root(source))[split]
    fixed = None if source.format == "auto" else source.format
    rule = partial(header_rule, source, groups=groups)
    return [open_table(p, fixed or sniff(p), bad, rule) for p in files], source


def _rows(
    source: SourceConfig,
    split: str | None,
    bad: BadRows,
    *,
    groups: bool = False,
    texts: BeirTexts | None = None,
) -> Iterator[Example]:
    """Every readable row, rows judged not relevant included.

    groups  for rerankers: labelled rows and rows without a positive too
    texts   of rows of ids
    Raises ValueError where not one row can be used.
    """
    if source.texts and not groups:
        raise ValueError(
            f"data.texts={source.texts} is for task=rerank; a retriever trains on the BEIR folder"
            f" itself, data.root={source.texts}"
        )
    check_mapping(source, GROUP_ROLES if groups else ROLES)
    layout_for = group_layout if groups else layout_of
    tables, source = _tables(source, split, bad, groups=groups)
    labels = Labels()
    num_rows = num_kept = num_read = 0
    ids = HashIndex()
    other_values: dict[str, None] = {}
    unused: set[str] = set()
    for table in tables:
        layouts: dict[tuple[str, ...], Layout] = {}
        needed = None
        if table.columns is not None:
            try:
                needed = layout_for(table.columns, source).needed()
            except ColumnError as e:
                raise ValueError(f"{table.where}: {e}") from None
            unused |= set(table.columns) - set(needed)
        for where, row in table.rows(needed):
            num_rows += 1
            keys = tuple(row)
            layout = layouts.get(keys)
            if layout is None:
                try:
                    layout = layouts[keys] = layout_for(keys, source)
                except ColumnError as e:
                    bad.report(where, e.expected, e.found, of_all=num_rows == 1)
                    continue
                if needed is None:
                    unused |= set(keys) - set(layout.needed())
            if not all(matches(row[name], value) for name, value in source.filter.items()):
                if len(other_values) < 8:
                    other_values[", ".join(f"{n}={short(row[n])}" for n in source.filter)] = None
                continue
            num_kept += 1
            try:
                if layout.looked_up:
                    assert texts is not None  # group_layout saw to it
                    row = with_texts(row, layout, texts)
                example = read_row(
                    row, layout, where, is_text=table.is_text, needs_positive=not groups
                )
                if example.id != where:
                    _check_id(example, layout.extra["id"], ids)
                if layout.label is not None:
                    labels.check(example)
            except ColumnError as e:
                bad.report(where, e.expected, e.found)
                continue
            num_read += 1
            yield example
    if unused:
        log.info("%s: columns not used: %s", source.root, ", ".join(sorted(unused)))
    if num_read:
        return
    if num_kept:
        raise ValueError(
            f"data.root={source.root}: all {num_kept} rows are bad; first: {bad.first}"
        )
    if num_rows and other_values:
        seen = "; ".join(other_values)
        raise ValueError(
            f"data.root={source.root}: data.filter {source.filter} keeps none of {num_rows} rows;"
            f" seen: {seen}"
        )
    reason = f"; first bad row: {bad.first}" if bad.first else ""
    raise ValueError(
        f"{_listed([t.where for t in tables])}: expected rows of data, found none{reason}"
    )


def _check_id(example: Example, column: str, ids: HashIndex) -> None:
    """Raises ColumnError for an id that an earlier row gave to another query."""
    query = content_hash(example.query)
    if ids.add(hash_bytes(example.id.encode("utf-8")), query) not in (None, query):
        raise ColumnError(
            f"one query an id in {column!r} (data.columns={{id: ''}} leaves that column unused)",
            f"duplicate id {example.id!r} with another query",
        )


def _is_judged_irrelevant(example: Example) -> bool:
    """A pair whose score says "not relevant".

    A row with negatives is a training row instead, whose score may be a teacher's margin.
    """
    scores = example.positive_scores
    return scores is not None and len(scores) == 1 and scores[0] <= 0 and not example.negatives


# -- what others call ---------------------------------------------------------------------------


def read_examples(
    source: SourceConfig, split: str | None, bad: BadRows | None = None
) -> Iterator[Example]:
    """Training examples of one data set, as a stream.

    split  one of available_splits(source), or a usual other name of it (dev for validation);
           None for data without splits
    bad    what to do about rows that cannot be read; default: stop at the first
    Pairs with a score of 0 or less are left out and counted in the log.
    Raises ValueError: path not found, nothing recognisable, unknown split, columns that cannot be
    told or do not exist, no usable row, and (unless `bad` skips) a bad row as
    "path:line: expected ..., found ...".
    """
    bad = bad if bad is not None else BadRows()
    name = resolve_split(source, split)
    if _kind(source) == "beir":
        _no_columns(source)
        yield from read_beir_examples(_root(source), str(name), bad)
        return
    num_left_out = num_used = 0
    for example in _rows(source, name, bad):
        if _is_judged_irrelevant(example):
            num_left_out += 1
            continue
        num_used += 1
        yield example
    if num_left_out:
        log.info("%s: left out %d pairs with a score of 0 or less", source.root, num_left_out)
    if not num_used:
        raise ValueError(
            f"data.root={source.root}: all {num_left_out} pairs have a score of 0 or less"
        )


def _no_columns(source: SourceConfig) -> None:
    if source.columns or source.filter:
        raise ValueError(
            f"data.columns and data.filter do not apply to a BEIR folder ({source.root});"
            " for rows of a file in it give that file as data.root, or set data.format=jsonl"
        )


def read_retrieval_set(
    source: SourceConfig, split: str | None, bad: BadRows | None = None, name: str = ""
) -> RetrievalSet:
    """An evaluation set: a BEIR folder's, or the rows' queries against the rows' distinct passages.

    split, bad, raises   as in read_examples
    name                 of the set; default the file's or folder's name
    For rows: equal texts (content_hash) are one document and one query; ids are the given ones,
    else d<number> and q<number> in order of appearance; negatives are documents not judged. A grade
    is the row's own, else its score, where that is a whole number (0 and below: not relevant), else
    1. Queries without a relevant passage are left out, their passages stay; ValueError where that
    leaves none.
    """
    bad = bad if bad is not None else BadRows()
    resolved = resolve_split(source, split)
    kind = _kind(source)
    if kind == "beir":
        _no_columns(source)
        return read_beir(_root(source), str(resolved), bad, name=name)
    found = retrieval_set(_rows(source, resolved, bad), name or Path(str(source.root)).name, bad)
    if not found.query_ids:
        where = f"split {resolved!r} of {source.root}" if resolved else str(source.root)
        raise ValueError(
            f"{where}: no query has a relevant passage (a score above 0), so that nothing can be"
            " judged; name another split, or take this one's file away"
        )
    return found


def read_groups(
    source: SourceConfig, split: str | None, bad: BadRows | None = None
) -> Iterator[Example]:
    """Groups for rerankers, as a stream: a query, its positives with grades, its negatives.

    source.texts   BEIR folder with the texts of rows of ids
    split, bad, raises   as in read_examples; further a pair that has two labels
    Rows of one query that follow each other are one Example, which may have no positive; where they
    do not, the query comes again.
    """
    bad = bad if bad is not None else BadRows()
    name = resolve_split(source, split)
    if _kind(source) == "beir":
        _no_columns(source)
        yield from read_beir_examples(_root(source), str(name), bad, groups=True)
        return
    texts = BeirTexts(source.texts, bad) if source.texts else None
    rows = _rows(source, name, bad, groups=True, texts=texts)
    try:
        for _, run in groupby(rows, key=lambda e: (e.query, e.id if e.id != e.where else "")):
            yield _as_one(list(run))
    finally:
        if texts is not None:
            texts.close()


def _as_one(rows: list[Example]) -> Example:
    """The rows of one query as one Example."""
    if len(rows) == 1:
        return rows[0]
    joined: dict[str, Any] = {}
    for side in ("positive", "negative"):
        texts = [t for e in rows for t in getattr(e, f"{side}s")]
        joined[f"{side}s"] = texts
        for what, missing in (("ids", None), ("scores", math.nan), ("grades", 1.0)):
            name = f"{side}_{what}"
            if name == "negative_grades" or all(getattr(e, name) is None for e in rows):
                continue
            values = [
                v for e in rows for v in getattr(e, name) or [missing] * len(getattr(e, f"{side}s"))
            ]
            joined[name] = None if None in values else values
    return replace(rows[0], **joined)


def read_rerank_set(
    source: SourceConfig, split: str | None, bad: BadRows | None = None, name: str = ""
) -> RerankSet:
    """Queries with the documents to be put in order, for evaluation.

    split, bad, raises   as in read_groups
    name                 of the set; default the file's or folder's name
    A BEIR folder has its whole corpus and no candidates. See rerank_set for rows.
    """
    bad = bad if bad is not None else BadRows()
    resolved = resolve_split(source, split)
    if _kind(source) == "beir":
        _no_columns(source)
        return RerankSet(**vars(read_beir(_root(source), str(resolved), bad, name=name)))
    groups = read_groups(source, resolved, bad)
    return rerank_set(groups, name or Path(str(source.root)).name, bad)
