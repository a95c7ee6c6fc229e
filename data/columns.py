"""What the columns of a row mean, and a row as an Example.

Understood without a mapping: the names in QUERY, POSITIVE and NEGATIVE, which cover plain (query,
positive, negative) files, sentence-transformers, FlagEmbedding and Tevatron. Any other name is
given in data.columns={ours: theirs}; an empty name there means "not used".

For rerankers also labelled rows (query, passage, label), one judgement or a list of them a row, as
texts or as ids that data.texts explains.
"""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conf.schema import SourceConfig
from data.records import Example, as_id, as_score, join_title, kind_of, short, text_problem
from data.tables import looks_like_names, positional_names

log = logging.getLogger(__name__)

QUERY = ("query", "anchor", "question")
POSITIVE = ("positive", "positives", "pos", "positive_passages")
# taken for positives only where no column of POSITIVE is there and just one of these
POSITIVE_WEAK = ("passage", "document", "answer", "context", "response")
NEGATIVE = ("negative", "negatives", "neg", "negative_passages", "hard_negative", "hard_negatives")
UNTOLD = ("label", "labels")  # relevance in one data set, a class in another
ROW_SCORE = ("score", "relevance", "grade")
EXTRA = {
    "id": ("query_id", "query-id", "qid", "_id", "id"),
    "positive_id": ("positive_id", "positive_ids", "pos_id", "pos_ids"),
    "negative_id": ("negative_id", "negative_ids", "neg_id", "neg_ids"),
    "positive_scores": ("positive_scores", "pos_scores"),
    "negative_scores": ("negative_scores", "neg_scores"),
    "positive_grades": ("positive_grades",),
}
ROLES = ("query", "positive", "negative", "score", *EXTRA)

# of labelled rows
LABEL = ("label", "labels", "relevance", "grade")
LABELLED_QUERY = (*QUERY, "sentence1", "text1")
PASSAGE = (
    *POSITIVE, *POSITIVE_WEAK, "passages", "documents", "doc", "docs", "text", "sentence2", "text2",
)  # fmt: skip
TEACHER = ("score", "scores", "teacher_score", "teacher_scores")
QUERY_ID = ("query_id", "query-id", "qid")
DOC_ID = ("doc_id", "doc-id", "docid", "corpus_id", "corpus-id", "passage_id", "pid", "positive_id")
GROUP_ROLES = (*ROLES, "passage", "label", "doc_id")


class ColumnError(ValueError):
    """Columns that cannot be read; becomes a bad row (JSONL) or an error of the file."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


@dataclass
class Layout:
    """Which columns play which role.

    label       of labelled rows, whose passages are `positives` whatever their label
    looked_up   columns that no row has: texts, by the column that holds their ids
    """

    query: str
    positives: list[str]
    negatives: list[str]
    score: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    filtered: list[str] = field(default_factory=list)
    label: str | None = None
    looked_up: dict[str, str] = field(default_factory=dict)

    def needed(self) -> list[str]:
        names = [
            self.query,
            *self.positives,
            *self.negatives,
            *([self.score] if self.score else []),
            *([self.label] if self.label else []),
            *self.extra.values(),
            *self.filtered,
        ]
        return list(dict.fromkeys(self.looked_up.get(n, n) for n in names))


def check_mapping(source: SourceConfig, roles: Sequence[str] = ROLES) -> None:
    for role in source.columns:
        if role not in roles and not re.fullmatch(r"(positive|negative)_\d+", role):
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"data.columns has {role!r}; known: {', '.join(roles)}, positive_<n>,"
                f" negative_<n>{hint} (write ours: theirs, e.g. {{query: premise, positive: text}})"
            )


def _numbered(names: Sequence[str], bases: Sequence[str]) -> list[str]:
    """Columns base, base_1, base_2, ... in the order of their numbers."""
    found = []
    for name in names:
        base, _, number = name.lower().rpartition("_")
        if name.lower() in bases:
            found.append((-1, name))
        elif base in bases and number.isdigit():
            found.append((int(number), name))
    return [name for _, name in sorted(found, key=lambda f: f[0])]


def layout_of(columns: Sequence[str], source: SourceConfig) -> Layout:
    """Roles of `columns` after data.columns and data.filter. Raises ColumnError."""
    free, listed = _free(columns, source)
    query = source.columns.get("query") or _only(
        "query", [c for c in free if c.lower() in QUERY], listed
    )
    if not query:
        raise ColumnError(
            f"a query column ({', '.join(QUERY)}, or data.columns={{query: <name>}})", listed
        )
    positives = _mapped(source, "positive")
    if positives is None:
        positives = _one_family("positive", _numbered(free, POSITIVE), listed)
        if not positives:
            weak = [c for c in free if c.lower() in POSITIVE_WEAK]
            positives = [_only("positive", weak, listed)] if weak else []
    if not positives:
        names = ", ".join((*POSITIVE, *POSITIVE_WEAK))
        raise ColumnError(
            f"a positive column ({names}, or data.columns={{positive: <name>}})", listed
        )
    negatives = _mapped(source, "negative")
    if negatives is None:
        negatives = _one_family("negative", _numbered(free, NEGATIVE), listed)

    extra = {}
    for role, names in EXTRA.items():
        name = source.columns.get(role)
        if name is None:
            name = next((c for known in names for c in free if c.lower() == known), "")
        if name:
            extra[role] = name
    score = source.columns.get("score")
    if score is None:
        score = _only("score", [c for c in free if c.lower() in ROW_SCORE], listed)
        label = next((c for c in free if c.lower() in UNTOLD), None)
        if not score and label:
            raise ColumnError(
                f"to be told what column {label!r} is: data.filter={{{label}: <value>}} keeps those"
                f" rows, data.columns={{score: {label}}} reads it as relevance,"
                " data.columns={score: ''} leaves it unused, task=rerank trains a reranker on it",
                listed,
            )
    return Layout(query, positives, negatives, score or None, extra, list(source.filter))


def group_layout(columns: Sequence[str], source: SourceConfig) -> Layout:
    """layout_of for rerankers: labelled rows where there is a label column, else as for retrieval.

    source.texts  whether ids may stand for texts
    Raises ColumnError.
    """
    free, listed = _free(columns, source)
    label = _role("label", LABEL, free, source, listed)
    if not label:
        return _unlabelled(columns, source, listed)
    if _mapped(source, "negative") or _numbered(free, NEGATIVE):
        raise ColumnError(
            f"one passage column beside the label {label!r}, or negatives without labels"
            f" (data.columns={{label: ''}} leaves {label!r} unused, {{label: '', score: {label}}}"
            " reads it as a teacher's scores)",
            listed,
        )
    query = _role("query", LABELLED_QUERY, free, source, listed)
    query_id = _role("id", QUERY_ID, free, source, listed)
    passage_role = "positive" if "positive" in source.columns else "passage"
    passage = _role(passage_role, PASSAGE, free, source, listed)
    doc_id = _role("doc_id", DOC_ID, free, source, listed)
    looked_up = {}
    for text, number, side in ((query, query_id, "query"), (passage, doc_id, "passage")):
        if not text and not number:
            names = LABELLED_QUERY if side == "query" else PASSAGE
            raise ColumnError(
                f"a {side} column ({', '.join(names)}, or data.columns={{{side}: <name>}})", listed
            )
        if not text:
            looked_up[f"text of {number}"] = number
    if looked_up and not source.texts:
        raise ColumnError(
            f"texts; {' and '.join(map(repr, looked_up.values()))} hold ids: give the BEIR folder"
            " that has their texts, data.texts=<folder with corpus.jsonl and queries.jsonl>",
            listed,
        )
    if source.texts and not looked_up:
        raise ColumnError(
            "ids to be looked up in data.texts", f"texts in {query!r} and {passage!r}; leave it out"
        )
    extra = {"id": query_id, "positive_id": doc_id}
    return Layout(
        query or f"text of {query_id}",
        [passage or f"text of {doc_id}"],
        [],
        _role("score", TEACHER, free, source, listed) or None,
        {role: name for role, name in extra.items() if name},
        list(source.filter),
        label,
        looked_up,
    )


def _unlabelled(columns: Sequence[str], source: SourceConfig, listed: str) -> Layout:
    """Rows of positives and negatives, with a teacher's scores where they have scores."""
    if source.texts:
        raise ColumnError("a label column beside the ids (data.texts is set)", listed)
    told = set(source.columns.values()) | set(source.filter)
    layout = layout_of([c for c in columns if c in told or c.lower() not in UNTOLD], source)
    weak = [p for p in layout.positives if p.lower() in POSITIVE_WEAK]
    if layout.score and not layout.negatives and weak and "score" not in source.columns:
        raise ColumnError(
            f"to be told what column {layout.score!r} is: data.columns={{label: {layout.score}}}"
            f" reads it as relevance, data.columns={{score: {layout.score}}} as a teacher's score,"
            " data.columns={score: ''} leaves it unused",
            listed,
        )
    if layout.score is None:
        free, _ = _free(columns, source)
        layout.score = _role("score", TEACHER, free, source, listed) or None
    return layout


def _free(columns: Sequence[str], source: SourceConfig) -> tuple[list[str], str]:
    """(columns that data.columns and data.filter leave to be told by name, all for messages)."""
    listed = f"columns {', '.join(columns)}" if columns else "no columns"
    for role, name in source.columns.items():
        if name and name not in columns:
            raise ColumnError(f"a column {name!r} (data.columns.{role})", listed)
    for name in source.filter:
        if name not in columns:
            raise ColumnError(f"a column {name!r} (data.filter)", listed)
    taken = set(source.columns.values()) | set(source.filter)
    return [c for c in columns if c not in taken], listed


def _role(
    role: str, known: Sequence[str], free: list[str], source: SourceConfig, listed: str
) -> str:
    """The column that plays `role`: the one data.columns names, else the one of a known name."""
    given = source.columns.get(role)
    return _only(role, [c for c in free if c.lower() in known], listed) if given is None else given


def _mapped(source: SourceConfig, role: str) -> list[str] | None:
    """Columns that data.columns gives for role, role_1, role_2, ...; None where it gives none."""
    names = _numbered(list(source.columns), (role,))
    return [source.columns[n] for n in names if source.columns[n]] if names else None


def _only(role: str, names: list[str], listed: str) -> str:
    if len(names) > 1:
        choice = " and ".join(repr(n) for n in names)
        raise ColumnError(
            f"one {role} column (set data.columns={{{role}: <name>}})", f"{choice} among {listed}"
        )
    return names[0] if names else ""


def _one_family(role: str, names: list[str], listed: str) -> list[str]:
    """Lets positive, positive_1, positive_2 through, but not positive beside pos."""
    families = {re.sub(r"_\d+$", "", n.lower()) for n in names}
    if len(families) > 1:
        _only(role, names, listed)
    return names


def header_rule(
    source: SourceConfig,
    path: str,
    fields: list[str],
    later: Sequence[list[str]] = (),
    *,
    groups: bool = False,
) -> list[str] | None:
    """Column names of a TSV or CSV whose first row is `fields`; None: no header, names by position.

    later   some rows that follow, which tell a header of unknown names from texts
    groups  rows may be labelled ones, which only a header tells
    A mapping to numbers ({query: "0", positive: "3"}) says that there is no header.
    """
    by_number = [name for name in source.columns.values() if name.isdigit()]
    if by_number and not all(name in fields for name in by_number):
        return [str(i) for i in range(len(fields))]
    known = [c for c in fields if c.lower() in QUERY]
    answer = _numbered(fields, POSITIVE) or [c for c in fields if c.lower() in POSITIVE_WEAK]
    is_labelled = groups and any(c.lower() in LABEL for c in fields)
    if any(source.columns.values()) or source.filter or (known and answer) or is_labelled:
        repeated = sorted({f for f in fields if fields.count(f) > 1})
        if repeated:
            raise ValueError(
                f"{path}:1: expected distinct column names, found {', '.join(repeated)} twice"
            )
        return fields
    by_position = "data.columns={query: '0', positive: '1'} gives columns of a file without header"
    whole = [row for row in later if len(row) == len(fields)]
    if known or answer or looks_like_names(fields) or _stands_over_texts(fields, whole):
        raise ValueError(
            f"{path}:1: expected a header with a query and a positive column, or text,"
            f" found {short(fields, 120)}; set data.columns={{query: <name>, positive: <name>}};"
            f" {by_position}"
        )
    if len(fields) < 2:
        raise ValueError(
            f"{path}:1: expected at least 2 fields (query, positive), found 1: {short(fields[0])}"
        )
    if len(set(fields)) < len(fields) or any(as_score(f) is not None for f in fields):
        raise ValueError(
            f"{path}:1: expected a header or texts alone (query, positive, negative...),"
            f" found {short(fields, 120)}; {by_position}"
        )
    if numbers := _numbers_below(fields, whole):
        raise ValueError(
            f"{path}:1: expected a header or texts alone (query, positive, negative...), found"
            f" numbers below {' and '.join(short(n) for n in numbers)};"
            f" set data.columns={{query: <name>, positive: <name>}}; {by_position}"
        )
    roles = zip(positional_names(len(fields)), fields, strict=True)
    log.warning(
        "%s: no header with known names, so columns go by position; the first row is taken for %s;"
        " if it is a header, set data.columns={query: <name>, positive: <name>}",
        path,
        ", ".join(f"{role} {short(text, 40)}" for role, text in roles),
    )
    return None


def _stands_over_texts(fields: list[str], later: list[list[str]]) -> bool:
    """Whether names, in any script, stand over columns where every text is much longer."""
    return (
        len(later) >= 3
        and looks_like_names(fields, any_script=True)
        and all(
            len(text) >= 3 * len(name)
            for row in later
            for name, text in zip(fields, row, strict=True)
        )
    )


def _numbers_below(fields: list[str], later: list[list[str]]) -> list[str]:
    """The fields with a number below in every row. One row is enough for a query, which is never a
    number; an answer may be, so five for the others.
    """
    return [
        name
        for i, name in enumerate(fields)
        if len(later) >= (5 if i else 1) and all(as_score(row[i]) is not None for row in later)
    ]


def matches(value: Any, wanted: Any) -> bool:
    """Whether a cell equals a value of data.filter; text cells are compared as what they spell."""
    if isinstance(wanted, list | tuple):
        return any(matches(value, w) for w in wanted)
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    if value == wanted:
        return True
    if (
        isinstance(value, str) != isinstance(wanted, str)
        and value is not None
        and wanted is not None
    ):
        number, other = as_score(value), as_score(wanted)
        return number is not None and number == other
    return False


def read_row(
    row: dict[str, Any], layout: Layout, where: str, *, is_text: bool, needs_positive: bool = True
) -> Example:
    """The Example of one row. Raises ColumnError.

    is_text         the row comes from TSV or CSV: an empty cell stands for a missing value
    needs_positive  False: negatives alone will do
    """
    query = row[layout.query]
    problem = text_problem(query)
    if problem is not None:
        raise ColumnError(f"{layout.query!r} to be text that is not empty", problem)
    positives, positive_ids = _passages(row, layout.positives, is_text=is_text)
    negatives, negative_ids = _passages(row, layout.negatives, is_text=is_text)
    if not positives and (needs_positive or not negatives):
        columns = [layout.looked_up.get(p, p) for p in layout.positives]
        raise ColumnError(f"a passage in {' or '.join(columns)}", "none")
    extra = layout.extra
    query_id = where
    if "id" in extra and row[extra["id"]] is not None:
        given = as_id(row[extra["id"]])
        if given is None:
            raise ColumnError(
                f"{extra['id']!r} to be text or a whole number", kind_of(row[extra["id"]])
            )
        query_id = given
    if "positive_id" in extra:
        positive_ids = _ids(row, extra["positive_id"], len(positives)) or positive_ids
    if "negative_id" in extra:
        negative_ids = _ids(row, extra["negative_id"], len(negatives)) or negative_ids
    positive_scores = _scores(row, extra.get("positive_scores"), len(positives))
    negative_scores = _scores(row, extra.get("negative_scores"), len(negatives))
    if layout.score is not None and positive_scores is None:
        value = row[layout.score]
        if isinstance(value, list) and len(value) == len(positives) + len(negatives):
            scores = _scores(row, layout.score, len(value))
            assert scores is not None
            positive_scores, negative_scores = scores[: len(positives)], scores[len(positives) :]
        elif value is not None and value != "":
            positive_scores = _scores(row, layout.score, len(positives))
    grades = _scores(row, extra.get("positive_grades"), len(positives))
    if grades and min(grades) <= 0:
        raise ColumnError(f"grades above 0 in {extra['positive_grades']!r}", f"{min(grades)}")
    example = Example(
        query=query,
        positives=positives,
        negatives=negatives,
        where=where,
        id=query_id,
        positive_ids=positive_ids,
        negative_ids=negative_ids,
        positive_scores=positive_scores,
        negative_scores=negative_scores,
        positive_grades=grades,
        mined=_mined(row.get("mined"), len(negatives)),
    )
    return example if layout.label is None else _by_label(example, row, layout.label)


def _by_label(passages: Example, row: dict[str, Any], column: str) -> Example:
    """The Example whose positives are those of its passages that have a label above 0."""
    labels = _scores(row, column, len(passages.positives))
    if labels is None:
        raise ColumnError(f"a number as label in {column!r}", kind_of(row[column]))

    def chosen(values: list[Any] | None, is_relevant: bool) -> list[Any] | None:
        if values is None:
            return None
        return [v for v, x in zip(values, labels, strict=True) if (x > 0) == is_relevant]

    return replace(
        passages,
        positives=chosen(passages.positives, True),
        negatives=chosen(passages.positives, False),
        positive_ids=chosen(passages.positive_ids, True),
        negative_ids=chosen(passages.positive_ids, False),
        positive_scores=chosen(passages.positive_scores, True),
        negative_scores=chosen(passages.positive_scores, False),
        positive_grades=chosen(labels, True),
        mined=None,
    )


def _passages(
    row: dict[str, Any], columns: Sequence[str], *, is_text: bool
) -> tuple[list[str], list[str] | None]:
    """(texts, ids or None) of all `columns`; a cell is a text, a passage object or a list of these.

    A null, and in TSV and CSV an empty cell, holds no passage.
    """
    texts: list[str] = []
    ids: list[str | None] = []
    for name in columns:
        value = row[name]
        if value is None or (is_text and value == ""):
            continue
        for item in value if isinstance(value, list) else [value]:
            given = None
            if isinstance(item, dict):
                item, given = _passage_object(item, name)
            problem = text_problem(item)
            if problem is not None:
                raise ColumnError(f"{name!r} to hold text that is not empty", problem)
            texts.append(item)
            ids.append(given)
    known = [i for i in ids if i is not None]
    return texts, known if known and len(known) == len(ids) else None


def _passage_object(item: dict[str, Any], name: str) -> tuple[Any, str | None]:
    """(text, id) of a passage object as Tevatron writes it: docid, title, text."""
    if "text" not in item:
        raise ColumnError(
            f"objects in {name!r} with a field 'text'", f"fields {', '.join(item) or '(none)'}"
        )
    text, title = item["text"], item.get("title")
    if isinstance(title, str) and isinstance(text, str):
        text = join_title(title, text)
    given = next(
        (item[key] for key in ("docid", "doc_id", "_id", "id") if item.get(key) is not None), None
    )
    return text, as_id(given) if given is not None else None


def _mined(value: Any, wanted: int) -> list[dict[str, Any]] | None:
    """What data.negatives wrote; anything else of that name is a column like others."""
    is_ours = (
        isinstance(value, list)
        and len(value) == wanted
        and all(isinstance(entry, dict) and "source" in entry for entry in value)
    )
    return value if is_ours else None


def _ids(row: dict[str, Any], name: str, wanted: int) -> list[str] | None:
    value = row[name]
    if value is None or value == "":
        return None
    ids = [as_id(v) for v in (value if isinstance(value, list) else [value])]
    if len(ids) != wanted or None in ids:
        raise ColumnError(f"{wanted} ids in {name!r}, one a passage", kind_of(value))
    return [i for i in ids if i is not None]


def _scores(row: dict[str, Any], name: str | None, wanted: int) -> list[float] | None:
    if name is None or row[name] is None or row[name] == "":
        return None
    value = row[name]
    scores = [as_score(v) for v in (value if isinstance(value, list) else [value])]
    if len(scores) != wanted or None in scores:
        raise ColumnError(f"{wanted} finite numbers in {name!r}, one a passage", kind_of(value))
    return [s for s in scores if s is not None]
