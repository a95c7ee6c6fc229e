"""Labelled rows of rerankers, one by one: texts for their ids, and pairs that have two labels."""

import struct
from typing import Any

from data.beir import BeirTexts
from data.columns import ColumnError, Layout
from data.records import Example, HashIndex, as_id, hash_bytes, kind_of, normalise


def with_texts(row: dict[str, Any], layout: Layout, texts: BeirTexts) -> dict[str, Any]:
    """The row with the texts that its ids stand for. Raises ColumnError for an unknown id."""
    row = dict(row)
    for column, id_column in layout.looked_up.items():
        name = "queries.jsonl" if column == layout.query else "corpus.jsonl"
        value, found = row[id_column], []
        for one in value if isinstance(value, list) else [value]:
            item_id = as_id(one)
            if item_id is None:
                raise ColumnError(f"{id_column!r} to be an id", kind_of(one))
            text = texts.text(name, item_id)
            if text is None:
                raise ColumnError(f"{id_column!r} to be an id of {texts.folder / name}", f"{one!r}")
            found.append(text)
        row[column] = found if isinstance(value, list) else found[0]
    return row


class Labels:
    """Labels given so far, to find a (query, passage) pair that has two; 20 to 40 bytes a pair."""

    def __init__(self) -> None:
        self._index = HashIndex()

    def check(self, example: Example) -> None:
        """Raises ColumnError for a pair, by id where there are ids, that an earlier row labels
        otherwise.
        """
        query = example.id if example.id != example.where else normalise(example.query)
        line = int(example.where.rpartition(":")[2])
        grades = [*(example.positive_grades or []), *[0.0] * len(example.negatives)]
        if example.positive_ids is not None and example.negative_ids is not None:
            passages = [*example.positive_ids, *example.negative_ids]
        else:
            passages = [normalise(t) for t in (*example.positives, *example.negatives)]
        for passage, grade in zip(passages, grades, strict=True):
            key = hash_bytes(f"{len(query)} {query}{passage}".encode())
            bits = struct.unpack("<I", struct.pack("<f", grade))[0]
            held = self._index.add(key, (line & 0x7FFFFFFF) << 32 | bits)
            if held is not None and held & 0xFFFFFFFF != bits:
                before = struct.unpack("<f", struct.pack("<I", held & 0xFFFFFFFF))[0]
                raise ColumnError(
                    f"one label a query and passage, as on line {held >> 32} ({before:g})",
                    f"label {grade:g}",
                )
