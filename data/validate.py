"""Out-of-fold validation: is each pair one that a cross-encoder trained on others would believe?

Stage `validate` of prepare.py. Rows are parted into folds that share no text; a judge of each fold
(data/judge.py) is trained on the others, so it never judges a pair, a query or a passage that it
saw (folds_of says when it may have seen the passage). Pairs below validate.min_probability are
dropped.

validate.corrupt says what that is worth: this share of the pairs gets another passage, on record,
before the judges are trained, and the report says how many good and how many bad pairs were kept.
Without it, too, each judge meets some queries with a random passage of its fold.

Shapes: R rows, P (query, positive) pairs, n pairs of one kind.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from conf.schema import PrepareConfig
from data.judge import fresh_judge, judged
from data.records import Example, content_hash, hash_bytes
from data.rows import Pair, keep_pairs, pairs_of, read_source, report_of, row_of, shown, write_rows
from data.splits import component_keys, incidences
from data.stages import check_stage

log = logging.getLogger(__name__)

THRESHOLDS = (0.5, 0.7, 0.85, 0.95)
MAX_CONTROLS = 300  # random pairs a fold
MIN_AUC = 0.8  # below it the judges have hardly learned


def validate_file(c: PrepareConfig, source: Path, target: Path) -> dict[str, Any]:
    """Stage `validate`: the rows of `source` with the positives that their judge believes.

    <target without .jsonl>.judged.jsonl has every pair with its probability and fold.
    Raises ValueError for settings that do not fit the data or the model, and where nothing is kept.
    """
    v = c.validate
    check_stage(c, "validate")
    fresh_judge(v)  # what does not fit is said before the data are read
    examples = read_source(c, source)
    fold_R = folds_of(examples, v.folds, c.seed)
    bad: set[tuple[int, int]] = set()
    if v.corrupt:
        examples, bad = corrupted(examples, fold_R, v.corrupt, c.seed)
    pairs = pairs_of(examples)
    is_bad_P = np.array([(p.row, p.place) in bad for p in pairs])
    fold_P = fold_R[[p.row for p in pairs]]
    probability_P, control_n = _judge(c, examples, pairs, fold_R)
    is_kept_P = probability_P >= v.min_probability
    dropped = [
        None if kept else ("the judge", f"probability {x:.3f}, want {v.min_probability:g}")
        for kept, x in zip(is_kept_P.tolist(), probability_P.tolist(), strict=True)
    ]
    kept = keep_pairs(examples, pairs, is_kept_P.tolist())
    report = report_of(examples, pairs, dropped, len(kept))
    report["judges"] = _judges_report(probability_P[~is_bad_P], control_n, v.min_probability)
    report["kept_at"] = _kept_at({"pairs": probability_P, "random pairs": control_n})
    if v.corrupt:
        _add_corruption(report, pairs, probability_P, is_bad_P, v.min_probability)
    log.info("validate: %s", "; ".join(f"{k} {n:,}" for k, n in report["counts"].items()))
    auc = report["judges"]["auc"]
    if auc < MIN_AUC:
        log.warning(
            "the judges tell pairs from random ones with an AUC of %.3f (.5 is chance): train them"
            " longer (validate.epochs) or from another validate.base", auc,
        )  # fmt: skip
    if not kept:
        raise ValueError(
            f"validate: no pair of {len(pairs)} reaches validate.min_probability"
            f" ({v.min_probability}); the judges' AUC is {auc:.3f} (.5 is chance): train them"
            " longer (validate.epochs, validate.lr), or lower it"
        )
    records = zip(pairs, probability_P.tolist(), fold_P.tolist(), is_bad_P.tolist(), strict=True)
    write_rows(
        target.with_suffix(".judged.jsonl"),
        (
            {"query": p.query, "passage": p.passage, "probability": round(x, 6), "fold": f,
             "corrupted": is_bad}
            for p, x, f, is_bad in records
        ),
    )  # fmt: skip
    values: dict[int, list[float]] = {}
    for p in np.flatnonzero(is_kept_P).tolist():
        values.setdefault(pairs[p].row, []).append(round(float(probability_P[p]), 6))
    rows = zip(kept, values.values(), strict=True)  # both in the order of the rows
    write_rows(target, (row_of(e) | {"probability": some} for e, some in rows))
    return report


def _judge(
    c: PrepareConfig, examples: Sequence[Example], pairs: Sequence[Pair], fold_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(probability of every pair, of the random pairs), each by the judge of its fold."""
    probability_P, controls = np.zeros(len(pairs)), []
    for fold in range(c.validate.folds):
        mine = [n for n, pair in enumerate(pairs) if fold_R[pair.row] == fold]
        asked = [pairs[n] for n in mine]
        texts = {content_hash(t) for p in asked for t in (p.query, p.passage)}
        rows = [
            without_negatives(e, texts)
            for e, f in zip(examples, fold_R.tolist(), strict=True)
            if f != fold
        ]
        random = random_pairs(asked, c.seed)[:MAX_CONTROLS]
        found = judged(c, fold, rows, [*asked, *random])
        probability_P[mine] = found[: len(mine)]
        controls.append(found[len(mine) :])
    return probability_P, np.concatenate(controls)


def without_negatives(e: Example, keys: set[int]) -> Example:
    """The example without the negatives of these content hashes: a judge must not see them."""
    stays = [i for i, text in enumerate(e.negatives) if content_hash(text) not in keys]
    if len(stays) == len(e.negatives):
        return e
    return replace(
        e,
        negatives=[e.negatives[i] for i in stays],
        negative_ids=e.negative_ids and [e.negative_ids[i] for i in stays],
        negative_scores=e.negative_scores and [e.negative_scores[i] for i in stays],
        mined=e.mined and [e.mined[i] for i in stays],
    )


# ------------------------------------------------------------------------------------------- folds


def folds_of(examples: Sequence[Example], num_folds: int, seed: int) -> np.ndarray:
    """fold_R, the fold of each row: rows that share a query or a positive are in one. No fold is
    empty.

    Connected rows that are more than a fold's share are parted by query, and so are those of most
    queries while there are fewer components than folds. The log says so: a judge may then have seen
    a passage of its pairs, but never a pair.
    Raises ValueError for fewer distinct queries than folds.
    """
    query_R = np.array([content_hash(e.query) for e in examples])
    num_queries = len(np.unique(query_R))
    if num_queries < num_folds:
        raise ValueError(
            f"validate.folds ({num_folds}) needs as many distinct queries, the data has"
            f" {num_queries}"
        )
    row_E, text_E, num_rows = incidences(examples)
    key_R = component_keys(row_E, text_E, num_rows=num_rows)
    _, label_R, size_C = np.unique(key_R, return_inverse=True, return_counts=True)
    is_parted_R = size_C[label_R] > num_rows / num_folds
    while len(np.unique(part_R := np.where(is_parted_R, query_R, key_R))) < num_folds:
        part_U, _ = np.unique(np.stack([part_R, query_R]), axis=1)  # U distinct (part, query)
        part_C, num_queries_C = np.unique(part_U, return_counts=True)
        is_parted_R |= key_R == part_C[num_queries_C.argmax()]
    if is_parted_R.any():
        log.warning(
            "%d of %d rows hang together by shared texts, and %d folds cannot hold them whole: they"
            " are parted by query, so that a judge may have seen a passage of a pair, never the"
            " pair", is_parted_R.sum(), num_rows, num_folds,
        )  # fmt: skip
    key_C, label_R, size_C = np.unique(part_R, return_inverse=True, return_counts=True)
    drawn_C = np.array([hash_bytes(f"{seed}/{key}".encode()) for key in key_C.tolist()])
    fold_C, load = np.zeros(len(key_C), np.int64), np.zeros(num_folds, np.int64)
    for component in np.lexsort((drawn_C, -size_C)).tolist():  # large ones first, to the emptiest
        fold_C[component] = load.argmin()
        load[fold_C[component]] += size_C[component]
    return fold_C[label_R]


# -------------------------------------------------------------------------------------- corruption


def random_pairs(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Each query with a passage of another pair that is none of its own, in a drawn order; those
    for which there is none are left out.

    What is drawn follows from the texts and the seed, not from the order of the pairs.
    """
    passages = {content_hash(p.passage): p.passage for p in pairs}
    own: dict[int, set[int]] = {}
    for p in pairs:
        own.setdefault(content_hash(p.query), set()).add(content_hash(p.passage))
    keys, found = sorted(passages), {}
    for p in pairs:
        drawn = hash_bytes(f"{seed}\0{p.query}\0{p.passage}".encode())
        answers = own[content_hash(p.query)]
        start = drawn % len(keys)
        places = (keys[(start + n) % len(keys)] for n in range(len(keys)))
        other = next((k for k in places if k not in answers), None)
        if other is not None:
            found[drawn] = replace(p, passage=passages[other])
    return [found[drawn] for drawn in sorted(found)]


def corrupted(
    examples: Sequence[Example], fold_R: np.ndarray, share: float, seed: int
) -> tuple[list[Example], set[tuple[int, int]]]:
    """The rows with that share of their positives replaced, and which: (row, place).

    The other passage is a positive of the same fold, so that folds share no more texts than before,
    and none of the query's own. A row with a replaced positive keeps neither ids, scores nor grades
    of its positives; the others stay as they are.
    Raises ValueError where the folds have too few passages.
    """
    pairs = pairs_of(examples)
    by_fold = [[p for p in pairs if fold_R[p.row] == fold] for fold in np.unique(fold_R).tolist()]
    others = [p for some in by_fold for p in random_pairs(some, seed)]
    wanted = round(share * len(pairs))
    if len(others) < wanted:
        raise ValueError(
            f"validate.corrupt ({share}): only {len(others)} of {len(pairs)} pairs can get another"
            " passage of their fold; use fewer folds"
        )
    others.sort(key=lambda p: hash_bytes(f"{seed}\1{p.query}\0{p.passage}".encode()))
    result = list(examples)
    for row in {p.row for p in others[:wanted]}:
        result[row] = replace(
            result[row], positives=list(result[row].positives), positive_ids=None,
            positive_scores=None, positive_grades=None,
        )  # fmt: skip
    for p in others[:wanted]:
        result[p.row].positives[p.place] = p.passage
    return result, {(p.row, p.place) for p in others[:wanted]}


# ------------------------------------------------------------------------------------------ report


def _judges_report(
    good_n: np.ndarray, control_n: np.ndarray, min_probability: float
) -> dict[str, float]:
    """How well the judges tell pairs (as far as known: the good ones) from random ones."""
    return {
        "auc": round(area_under_curve(good_n, control_n), 4),
        "random_pairs": len(control_n),
        "random_pairs_believed": round(float((control_n >= min_probability).mean()), 4)
        if len(control_n)
        else 0.0,
    }


def area_under_curve(high_n: np.ndarray, low_n: np.ndarray) -> float:
    """Probability that a value of the first is above one of the second, ties half; .5 without."""
    if not len(high_n) or not len(low_n):
        return 0.5
    rank_n = rankdata(np.concatenate([high_n, low_n]))[: len(high_n)]
    return float((rank_n.sum() / len(high_n) - (len(high_n) + 1) / 2) / len(low_n))


def _kept_at(kinds: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Share of each kind of pair at or above some probabilities."""
    return {
        f"{least:g}": {
            kind: round(float((x_n >= least).mean()), 4) for kind, x_n in kinds.items() if len(x_n)
        }
        for least in THRESHOLDS
    }


def _add_corruption(
    report: dict[str, Any],
    pairs: Sequence[Pair],
    probability_P: np.ndarray,
    is_bad_P: np.ndarray,
    min_probability: float,
) -> None:
    """Counts and shares of good and bad pairs, and bad pairs that were kept, into `report`."""
    is_kept_P = probability_P >= min_probability
    for kind, is_kind_P in (("good", ~is_bad_P), ("bad", is_bad_P)):
        report["counts"][f"{kind} pairs"] = int(is_kind_P.sum())
        report["counts"][f"{kind} pairs kept"] = int((is_kind_P & is_kept_P).sum())
        for least, shares in _kept_at({kind: probability_P[is_kind_P]}).items():
            report["kept_at"][least] |= shares
    believed = np.flatnonzero(is_bad_P & is_kept_P).tolist()
    report["examples"] |= shown(
        ("bad pairs kept", pairs[p], f"probability {probability_P[p]:.3f}") for p in believed
    )
    report["corruption"] = {
        "auc of good against bad": round(
            area_under_curve(probability_P[~is_bad_P], probability_P[is_bad_P]), 4
        ),
        "share of bad pairs before": round(float(is_bad_P.mean()), 4),
        "share of bad pairs after": round(float(is_bad_P[is_kept_P].mean()), 4)
        if is_kept_P.any()
        else 0.0,
    }
