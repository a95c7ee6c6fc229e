"""What the stages of prepare.py hand to each other: rows read as examples, pairs of them, rows and
reports written.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig, SourceConfig
from data.formats import (
    available_splits,
    detect,
    read_examples,
    read_groups,
    resolve_split,
    tell_files,
)
from data.records import BadRows, Example, hash_bytes
from data.tables import open_table, sniff
from runtime.run_dir import write_lines_atomic

log = logging.getLogger(__name__)

EXAMPLES_SHOWN = 10
# train.py's settings in the readers' messages, and prepare.py's; what it has none for is left out
_IN_OUR_WORDS = (
    (r" data\.filter=\{[^}]*\} keeps those rows,|, task=rerank trains a reranker on it", ""),
    (r"; for a data set of the hub add data\.format=hub|, or set data\.format(=jsonl)?", ""),
    (r"set data\.format=jsonl, tsv, csv or parquet", "name it .jsonl, .tsv, .csv or .parquet"),
    (r"data\.columns and data\.filter do not", "columns does not"),
    (r"data\.columns", "columns"),
    (r"data\.texts", "score.texts"),
)
_OF_POSITIVES = ("positives", "positive_ids", "positive_scores", "positive_grades")


@dataclass(frozen=True)
class Pair:
    """A query and one of its positives.

    answers  texts of which one should be in the passage; None where the data gives none
    row, place  number of the example, and of the positive in it
    """

    query: str
    passage: str
    answers: tuple[str, ...] | None = None
    row: int = 0
    place: int = 0


def read_source(c: PrepareConfig, source: Path, *, groups: bool = False) -> list[Example]:
    """The examples that a stage begins with: c.data, or the rows that an earlier stage wrote.

    groups  as data.formats.read_groups has them, rows of ids included
    Raises ValueError for anything wrong with them, by the names of prepare.py's settings.
    """
    is_data = is_the_data(c, source)
    texts = c.score.texts if is_data and groups else None
    spec = SourceConfig(root=str(source), columns=c.columns if is_data else {}, texts=texts)
    read = read_groups if groups else read_examples
    try:
        split = c.split if is_data and available_splits(spec) else None
        if is_data and detect(source) not in ("beir", "hub"):
            tell_files(spec, [split and resolve_split(spec, split)])
        examples = list(read(spec, split))
        if not groups and detect(source) == "beir":  # whose scores are grades, no teacher's
            return [
                replace(e, positive_scores=None, positive_grades=e.positive_scores)
                for e in examples
            ]
        return examples
    except ValueError as e:
        raise ValueError(in_our_words(str(e))) from None


def read_corpus_rows(c: PrepareConfig, path: Path) -> list[Example]:
    """The rows of mine.corpus, of every split that it has; where it is c.data, as these are read.

    Raises ValueError for anything wrong with them, by the names of prepare.py's settings.
    """
    if is_the_data(c, path):
        return read_source(c, path)
    spec = SourceConfig(root=str(path))
    try:
        return [e for s in available_splits(spec) or [None] for e in read_examples(spec, s)]
    except ValueError as e:
        message = in_our_words(str(e), "mine.corpus")
        if "columns=" in message:
            message += "; columns= is of data= alone: rename them in mine.corpus"
        raise ValueError(message) from None


def is_the_data(c: PrepareConfig, path: Path) -> bool:
    return path.resolve() == Path(c.data).expanduser().resolve()


def in_our_words(message: str, setting: str = "data") -> str:
    """A message of the readers, which name train.py's settings, with those of prepare.py.

    setting  whose path is read
    """
    for theirs, ours in _IN_OUR_WORDS:
        message = re.sub(theirs, ours, message)
    return message.replace("data.root", setting)


def pairs_of(
    examples: Sequence[Example], answers: Sequence[tuple[str, ...] | None] | None = None
) -> list[Pair]:
    """Every (query, positive), in the order of the rows."""
    answers = answers or [None] * len(examples)
    return [
        Pair(e.query, passage, answers[row], row, place)
        for row, e in enumerate(examples)
        for place, passage in enumerate(e.positives)
    ]


def read_answers(examples: Sequence[Example], column: str) -> list[tuple[str, ...]]:
    """The texts of a column of the files that the examples come from, one tuple an example.

    A cell is a text or a list of them. Raises ValueError for data without the column.
    """
    paths = dict.fromkeys(e.where.rpartition(":")[0] for e in examples)
    cells: dict[str, Any] = {}
    for path in paths:
        try:
            kind = sniff(Path(path))
            table = open_table(Path(path), kind, BadRows("skip"), lambda _, names, __: names)
            rows = table.rows(None)
            cells |= {where: row[column] for where, row in rows if column in row}
        except (OSError, ValueError):
            pass  # qrels of a BEIR folder; said below
    lacking = [e.where for e in examples if e.where not in cells]
    if lacking:
        raise ValueError(
            f"filter.answer_column={column}: {len(lacking)} of {len(examples)} rows have no such"
            f" column, first {lacking[0]}; want rows of a file (JSONL, TSV, CSV, Parquet) with it"
        )
    found = (cells[e.where] for e in examples)
    return [tuple(map(str, x)) if isinstance(x, list) else (str(x),) for x in found]


def row_of(example: Example) -> dict[str, Any]:
    """The JSONL row of an example, as data.formats reads it."""
    e = example
    row: dict[str, Any] = {} if e.id == e.where else {"query_id": e.id}
    row |= {"query": e.query, "positive": e.positives, "negative": e.negatives}
    for name in (
        "positive_ids", "negative_ids", "positive_scores", "negative_scores", "positive_grades",
        "mined",
    ):  # fmt: skip
        if getattr(e, name) is not None:
            row[name] = getattr(e, name)
    return row


def write_rows(target: Path, rows: Iterable[dict[str, Any]]) -> int:
    """JSONL, atomically; how many rows there were."""
    return write_lines_atomic(target, (json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def keep_pairs(
    examples: Sequence[Example], pairs: Sequence[Pair], is_kept: Sequence[bool]
) -> list[Example]:
    """The examples with those of their positives that are kept; without any an example is left
    out."""
    places: list[list[int]] = [[] for _ in examples]
    for pair, stays in zip(pairs, is_kept, strict=True):
        if stays:
            places[pair.row].append(pair.place)
    kept = []
    for example, chosen in zip(examples, places, strict=True):
        values = {name: getattr(example, name) for name in _OF_POSITIVES}
        if chosen:
            some = {name: v and [v[i] for i in chosen] for name, v in values.items()}
            kept.append(replace(example, **some))
    return kept


def shown(pairs_and_reasons: Iterable[tuple[str, Pair, str]]) -> dict[str, list[str]]:
    """Up to ten pairs of each kind as lines of a report, chosen by hash: not the file's first."""
    by_kind: dict[str, list[tuple[int, str]]] = {}
    for kind, pair, why in pairs_and_reasons:
        line = f"{why}: {pair.query[:200]!r}: {pair.passage[:300]!r}"
        by_kind.setdefault(kind, []).append((hash_bytes(line.encode("utf-8", "replace")), line))
    return {k: [line for _, line in sorted(v)[:EXAMPLES_SHOWN]] for k, v in by_kind.items()}


def report_of(
    examples: Sequence[Example],
    pairs: Sequence[Pair],
    dropped: Sequence[tuple[str, str] | None],
    num_rows: int,
) -> dict[str, Any]:
    """A stage's part of report.json: what was kept and dropped, with examples.

    dropped  (by what, why) of each pair; None: kept
    """
    by = Counter(verdict[0] for verdict in dropped if verdict)
    counts = {"pairs": len(pairs), "kept": len(pairs) - by.total()}
    return {
        "in": len(examples),
        "out": num_rows,
        "counts": counts | {f"dropped by {name}": n for name, n in by.items()},
        "examples": shown(
            (f"dropped by {verdict[0]}", pair, verdict[1])
            for pair, verdict in zip(pairs, dropped, strict=True)
            if verdict
        ),
    }
