"""Stages `triplets` and `split` of prepare.py: rows of three texts; parts that share no text."""

import logging
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig
from data.records import Example
from data.rows import pairs_of, read_source, row_of, shown, write_rows
from data.splits import SPLITS, leakage_report, split_examples

log = logging.getLogger(__name__)


def triplets_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `triplets`: a row for every positive and each of its first negatives.

    Rows without a negative are left out. A negative's id and scores stay with it.
    Raises ValueError where no row has a negative.
    """
    examples = read_source(c, source)
    rows = [t for e in examples for t in triplets_of(e, c.triplets.max_negatives)]
    alone = [pair for pair in pairs_of(examples) if not examples[pair.row].negatives]
    if not rows:
        raise ValueError(
            f"triplets: none of {len(examples)} rows of {source} has a negative; mine some first,"
            " e.g. 'stages=[...,mine,triplets]'"
        )
    write_rows(target, map(row_of, rows))
    kind = "without a negative"
    return {
        "in": len(examples),
        "out": len(rows),
        "counts": {"triplets": len(rows), f"pairs {kind}": len(alone)},
        "examples": shown((f"pairs {kind}", pair, kind) for pair in alone),
    }


def triplets_of(e: Example, max_negatives: int) -> list[Example]:
    """Each positive with each of the first `max_negatives` negatives."""

    def only(values: list[Any] | None, place: int) -> list[Any] | None:
        return None if values is None else [values[place]]

    return [
        Example(
            query=e.query, positives=[e.positives[p]], negatives=[e.negatives[n]],
            where=e.where, id=e.id,
            positive_ids=only(e.positive_ids, p), negative_ids=only(e.negative_ids, n),
            positive_scores=only(e.positive_scores, p),
            negative_scores=only(e.negative_scores, n),
            positive_grades=only(e.positive_grades, p), mined=only(e.mined, n),
        )
        for p in range(len(e.positives))
        for n in range(min(max_negatives, len(e.negatives)))
    ]  # fmt: skip


def split_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `split`: {train,dev,test}.jsonl in the folder <target without .jsonl>, which train.py
    reads as data.root; `target` itself says which part each row is in.

    Rows that share a query or a positive are in one part (data/splits.py).
    """
    examples = read_source(c, source)
    parts = c.parts
    assignment = split_examples(
        examples, dev_fraction=parts.dev_fraction, test_fraction=parts.test_fraction, seed=c.seed
    )
    chosen = {name: list(assignment.select(examples, name)) for name in SPLITS}
    folder = target.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, some in chosen.items():
        path = folder / f"{name}.jsonl"
        path.unlink(missing_ok=True)  # of other fractions
        if some:
            write_rows(path, map(row_of, some))
    leakage = leakage_report({name: some for name, some in chosen.items() if some})
    records = zip(examples, assignment.split_R.tolist(), strict=True)
    write_rows(target, ({"where": e.where, "id": e.id, "split": SPLITS[s]} for e, s in records))
    leaks = {
        f"{kind} of {pair}": count
        for pair, found in leakage["pairs"].items()
        for kind, count in found.items()
        if kind != "examples" and count
    }
    log.info("split: %s in %s", {name: len(some) for name, some in chosen.items()}, folder)
    return {
        "in": len(examples),
        "out": len(examples),
        "counts": {name: len(some) for name, some in chosen.items()} | leaks,
        "examples": {
            f"nearly equal in {pair}": [
                f"{leak['texts'][0]!r} and {leak['texts'][1]!r}"
                for leak in found["examples"]
                if leak["kind"].startswith("near_")
            ]
            for pair, found in leakage["pairs"].items()
            if any(leak["kind"].startswith("near_") for leak in found["examples"])
        },
        "split": assignment.info,
        "leakage": leakage,
    }
