"""Out-of-fold validation: what a judge sees, what is replaced on record, what the report says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import PrepareConfig, ValidateConfig
from data import validate
from data.formats import SourceConfig, read_examples
from data.judge import Lessons, judged, train_judge
from data.records import Example, content_hash
from data.rows import Pair, pairs_of
from data.validate import (
    area_under_curve,
    corrupted,
    folds_of,
    random_pairs,
    validate_file,
    without_negatives,
)


def examples_of(num: int = 60) -> list[Example]:
    """Two queries a passage, ids and own negatives on every third."""
    return [
        Example(
            query=f"query {n}", positives=[f"passage {n // 2}"],
            negatives=[f"passage {(n + 9) % num // 2}", f"negative {n}"] if n % 3 == 0 else [],
            where=f"data.jsonl:{n + 1}", id=f"q{n}", positive_ids=[f"p{n // 2}"],
        )
        for n in range(num)
    ]  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(tmp_path, source="", **validate_settings) -> PrepareConfig:
    return PrepareConfig(
        data=str(source), out=str(tmp_path), device="cpu", precision="fp32",
        cache_dir=str(tmp_path / "cache"),
        validate=ValidateConfig(**{"max_pair_length": 64} | validate_settings),
    )  # fmt: skip


# -- folds and corruption -----------------------------------------------------------------------


def test_folds_are_even_and_share_no_text():
    """Rows of one passage in two folds would let a judge see the passage that it judges."""
    examples = examples_of()
    fold_R = folds_of(examples, 4, seed=1)
    assert np.bincount(fold_R).tolist() == [16, 16, 14, 14]
    for fold in range(4):
        inside, outside = (
            {t for e, f in zip(examples, fold_R, strict=True) if (f == fold) == is_inside
             for t in (e.query, *e.positives)}
            for is_inside in (True, False)
        )  # fmt: skip
        assert not inside & outside


def test_folds_follow_texts_and_seed_not_the_order_of_rows():
    examples = examples_of()
    fold_R = folds_of(examples, 4, seed=1)
    order = np.random.default_rng(0).permutation(len(examples))
    assert (folds_of([examples[i] for i in order], 4, seed=1) == fold_R[order]).all()
    assert (folds_of(examples, 4, seed=2) != fold_R).any()


def test_one_large_component_is_parted_by_query_and_said(caplog):
    """All rows hang on one passage: no fold could hold them; rows of one query stay together."""
    examples = [
        Example(f"query {n % 20}", ["the passage", f"other {n}"], [], f"f:{n}", f"q{n}")
        for n in range(40)
    ]
    fold_R = folds_of(examples, 4, seed=0)
    assert "40 of 40 rows hang together" in caplog.text
    assert np.bincount(fold_R).tolist() == [10, 10, 10, 10]
    assert (fold_R[:20] == fold_R[20:]).all()
    with pytest.raises(ValueError, match=r"validate.folds \(21\) needs as many distinct queries"):
        folds_of(examples, 21, seed=0)


@pytest.mark.parametrize(
    ("queries", "passages", "num_folds", "sizes"),
    [
        ("AAAAAAABC", "1234567xx", 3, [1, 1, 7]),  # B and C share a passage
        ("AAAAAAABCD", "1234567xxx", 4, [1, 1, 1, 7]),
        ("AAAAAAABCDE", "1234567xxyy", 4, [1, 1, 2, 7]),  # one of two pairs is parted
        ("AAAAAAABCDEF", "1234567xxyyy", 4, [1, 2, 2, 7]),  # of most queries first
    ],
)
def test_no_fold_is_empty(queries, passages, num_folds, sizes, caplog):
    """One query of most rows, and fewer components than folds: a judge judged nothing."""
    examples = [
        Example(q, [p], [], f"f:{n}", "")
        for n, (q, p) in enumerate(zip(queries, passages, strict=True))
    ]
    fold_R = folds_of(examples, num_folds, seed=0)
    assert sorted(np.bincount(fold_R, minlength=num_folds).tolist()) == sizes
    assert len(set(fold_R[:7].tolist())) == 1
    assert "parted by query" in caplog.text
    order = np.random.default_rng(0).permutation(len(examples))
    assert (folds_of([examples[i] for i in order], num_folds, seed=0) == fold_R[order]).all()


def test_corruption_replaces_the_share_within_the_fold_and_is_on_record():
    """30% of 60 pairs; a replaced passage is of the fold and none of the query's own, so that the
    folds still share no text; nothing else changes, and rows without one stay as they are."""
    examples = [
        replace(e, positive_scores=[n / 60], positive_grades=[1.0 + n % 3])
        for n, e in enumerate(examples_of())
    ]
    fold_R = folds_of(examples, 3, seed=0)
    changed, bad = corrupted(examples, fold_R, 0.3, seed=0)
    assert len(bad) == 18
    for row, (before, after) in enumerate(zip(examples, changed, strict=True)):
        if (row, 0) in bad:
            assert after.positives != before.positives
            donors = {r for r, e in enumerate(examples) if e.positives == after.positives}
            assert {fold_R[r] for r in donors} == {fold_R[row]}
            # what is said of another passage would be a lie
            assert after.positive_ids is after.positive_scores is after.positive_grades is None
        else:
            assert after == before
        assert (after.query, after.negatives) == (before.query, before.negatives)
    assert examples[0].positives == ["passage 0"], "the caller's examples are changed"


def test_corruption_follows_texts_and_seed_not_the_order_of_rows():
    examples = examples_of()
    order = np.random.default_rng(0).permutation(len(examples)).tolist()

    def texts(some, seed):
        changed, bad = corrupted(some, folds_of(some, 3, seed=0), 0.3, seed)
        return {(changed[r].query, changed[r].positives[p]) for r, p in bad}

    assert texts(examples, 0) == texts([examples[i] for i in order], 0)
    assert texts(examples, 0) != texts(examples, 1)


def test_corruption_that_no_fold_can_serve_is_an_error():
    examples = [Example(f"q{n}", ["one passage"], [], "f:1", f"{n}") for n in range(6)]
    with pytest.raises(ValueError, match=r"validate.corrupt \(0.5\): only 0 of 6 pairs"):
        corrupted(examples, np.zeros(6, int), 0.5, seed=0)


def test_random_pairs_are_never_known_pairs():
    """A query with several positives in several rows: none of them may be drawn."""
    examples = [
        Example(f"query {n % 5}", [f"passage {n % 10}"], [], f"f:{n}", "") for n in range(30)
    ]
    pairs = pairs_of(examples)
    known = {(p.query, p.passage) for p in pairs}
    found = random_pairs(pairs, seed=0)
    assert len(found) == len(known) and not known & {(p.query, p.passage) for p in found}


def test_area_under_curve_against_all_pairs_compared():
    rng = np.random.default_rng(0)
    high, low = rng.integers(3, 9, 40) / 10, rng.integers(0, 7, 30) / 10  # with ties
    wins = np.mean([(h > x) + 0.5 * (h == x) for h in high for x in low])
    assert area_under_curve(high, low) == pytest.approx(wins)
    assert area_under_curve(high, low[:0]) == 0.5


# -- what a judge sees --------------------------------------------------------------------------


def test_no_judge_sees_a_text_of_its_fold(tmp_path, monkeypatch, tiny_base):
    """The point of it all. Own negatives are passages of other rows: those of the fold must go."""
    source = write(
        tmp_path / "data.jsonl",
        [{"query": e.query, "positive": e.positives, "negative": e.negatives}
         for e in examples_of()],
    )  # fmt: skip
    seen = []

    def spy(c, fold, rows, asked):
        taught = {t for e in rows for t in (e.query, *e.positives, *e.negatives)}
        judged_texts = {t for p in asked for t in (p.query, p.passage)}
        assert not taught & judged_texts
        seen.append((fold, len(rows), len({(p.row, p.place) for p in asked})))
        return np.full(len(asked), 0.9)

    monkeypatch.setattr(validate, "judged", spy)
    c = settings(tmp_path, source, base=str(tiny_base), folds=3, corrupt=0.3)
    report = validate_file(c, source, tmp_path / "validate.jsonl")
    assert [fold for fold, _, _ in seen] == [0, 1, 2]
    assert all(rows + asked == 60 for _, rows, asked in seen)
    assert report["in"] == report["out"] == 60


def test_without_negatives_keeps_what_belongs_together():
    e = Example("q", ["p"], ["a", "b", "c"], "f:1", "1", negative_ids=["1", "2", "3"],
                negative_scores=[0.1, 0.2, 0.3])  # fmt: skip
    found = without_negatives(e, {content_hash("b")})
    assert (found.negatives, found.negative_ids) == (["a", "c"], ["1", "3"])
    assert found.negative_scores == [0.1, 0.3]


@pytest.fixture
def tiny_reranker(tiny_base):
    from models.reranker import load_reranker

    return load_reranker(str(tiny_base))


def text_of(tokenizer, ids) -> str:
    return "".join(tokenizer.id_to_token(int(i)).removeprefix("##") for i in ids)


def test_lessons_are_groups_of_one_positive_and_wrong_passages(tiny_reranker):
    """Every pair once an epoch; own negatives first; a passage that answers the query in any row is
    never its negative; the same batch whenever it is asked for."""
    examples = examples_of(24)
    examples.append(replace(examples[0], positives=["passage 7"], negatives=["passage 0"]))
    lessons = Lessons(examples, tiny_reranker, 3, 5, seed=1, fold=0)
    answers: dict[str, set[str]] = {}
    for e in examples:
        answers.setdefault(e.query.replace(" ", ""), set()).update(
            p.replace(" ", "") for p in e.positives
        )
    positives = []
    for step in range(5):
        batch = lessons.batch_at(step)
        assert batch.group_P.tolist() == sorted(batch.group_P.tolist())
        assert batch.label_P.tolist() == [1, 0, 0, 0] * 5
        groups: dict[int, list[tuple[str, str]]] = {}
        for ids, group in zip(batch.pair_tokens, batch.group_P.tolist(), strict=True):
            text = text_of(tiny_reranker.tokenizer, ids)
            query, passage = text.replace("[CLS]", "").split("[SEP]")[:2]
            groups.setdefault(group, []).append((query, passage))
        for (query, positive), *others in groups.values():
            positives.append((query, positive))
            assert {q for q, _ in others} == {query}
            assert positive in answers[query]
            assert not {p for _, p in others} & answers[query]
            assert len({p for _, p in others}) == 3
            if int(query.removeprefix("query")) % 3 == 0 and positive != "passage7":
                assert f"negative{query.removeprefix('query')}" in {p for _, p in others}
    assert len(set(positives)) == 25
    again = lessons.batch_at(3)
    fresh = Lessons(examples, tiny_reranker, 3, 5, seed=1, fold=0).batch_at(3)
    for one, other in zip(again.pair_tokens, fresh.pair_tokens, strict=True):
        assert (one == other).all()


def test_a_query_with_every_passage_as_positive_has_no_random_negative(tiny_reranker):
    """The draw must end."""
    lessons = Lessons(
        [Example("q", ["a", "b", "c"], [], "f:1", "1"), Example("r", ["a"], [], "f:2", "2")],
        tiny_reranker, 2, 4, seed=0, fold=0,
    )  # fmt: skip
    batch = lessons.batch_at(0)
    assert sorted(np.bincount(batch.group_P).tolist()) == [1, 1, 1, 3]


# -- the stage ----------------------------------------------------------------------------------


def test_report_and_files_tell_good_and_bad_pairs_kept(tmp_path, monkeypatch, tiny_base):
    """A judge that believes what was true and every third bad pair: counts and shares of the
    report, against the files."""
    rows = [{"query_id": f"q{n}", "query": f"query {n}", "positive": [f"passage {n}"]}
            for n in range(100)]  # fmt: skip
    truth = {(r["query"], r["positive"][0]) for r in rows}
    source, target = write(tmp_path / "data.jsonl", rows), tmp_path / "validate.jsonl"
    bad_pairs = []

    def some_judge(c, fold, rows, asked):
        probabilities = []
        for p in asked:
            is_true = (p.query, p.passage) in truth
            if not is_true and (p.query, p.passage) not in bad_pairs:
                bad_pairs.append((p.query, p.passage))
            is_believed = is_true or bad_pairs.index((p.query, p.passage)) % 3 == 0
            probabilities.append(0.9 if is_believed else 0.6)
        return np.array(probabilities)

    monkeypatch.setattr(validate, "judged", some_judge)
    c = settings(tmp_path, source, base=str(tiny_base), folds=5, corrupt=0.3)
    report = validate_file(c, source, target)
    records, kept = read(tmp_path / "validate.judged.jsonl"), read(target)
    assert all(((r["query"], r["passage"]) in truth) != r["corrupted"] for r in records)
    assert [r["query"] for r in kept] == [r["query"] for r in records if r["probability"] == 0.9]
    assert all(r["probability"] == [0.9] for r in kept)
    believed = sum(r["corrupted"] and r["probability"] == 0.9 for r in records)
    assert report["counts"] == {
        "pairs": 100, "kept": 70 + believed, "dropped by the judge": 30 - believed,
        "good pairs": 70, "good pairs kept": 70, "bad pairs": 30, "bad pairs kept": believed,
    }  # fmt: skip
    shares = report["kept_at"]
    assert shares["0.85"]["good"] == shares["0.5"]["bad"] == 1 and shares["0.95"]["good"] == 0
    assert shares["0.85"]["bad"] == pytest.approx(believed / 30, abs=1e-4)
    assert report["corruption"]["share of bad pairs before"] == 0.3
    after = report["corruption"]["share of bad pairs after"]
    assert after == pytest.approx(believed / (70 + believed), abs=1e-4)
    assert len(report["examples"]["bad pairs kept"]) == min(10, believed)
    assert len(list(read_examples(SourceConfig(root=str(target)), None))) == len(kept)


# -- training -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_judge_learns_what_own_negatives_show(tmp_path, tiny_base):
    """Negatives of one kind, unseen pairs of both: a loop that did not step, a label that was
    turned round, or a head without gradient would leave them mixed."""
    rng = np.random.default_rng(0)

    def text(letters: str) -> str:
        return " ".join(letters[i] for i in rng.integers(0, len(letters), 6))

    rows = [
        Example(f"query {n}", [f"{text('abcd')} {n}"], [text("wxyz"), text("wxyz")], "f:1", str(n))
        for n in range(120)
    ]
    c = settings(
        tmp_path, base=str(tiny_base), epochs=6, batch_size=8, lr=2e-3, head_lr=5e-3,
        num_negatives=2, max_pair_length=48,
    )  # fmt: skip
    asked = [Pair(f"query {n}", text("abcd" if n % 2 else "wxyz")) for n in range(200, 240)]
    found = judged(c, 0, rows, asked)
    assert found[1::2].min() > 0.85 and found[::2].max() < 0.15


def test_a_judge_is_the_same_twice_and_follows_the_seed(tmp_path, tiny_base):
    """Same rows and seed: the same bits. Chunks are no part of the result (up to rounding)."""
    import torch

    rows = examples_of(20)
    v = {"base": str(tiny_base), "epochs": 1, "batch_size": 8, "max_pair_length": 48}

    def weights(seed=0, **more):
        c = replace(settings(tmp_path, **v, **more), seed=seed)
        reranker = train_judge(c, rows, 0, device=torch.device("cpu"), precision="fp32")
        return torch.cat([p.detach().flatten() for p in reranker.parameters()])

    once = weights()
    assert torch.equal(once, weights())
    assert not torch.equal(once, weights(seed=1))


def test_judgements_are_cached_by_all_that_they_depend_on(tmp_path, tiny_base, monkeypatch):
    """Another text, seed or number of epochs is another judge; the threshold is not."""
    from data import judge

    calls = []
    monkeypatch.setattr(judge, "train_judge", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(judge, "pair_probabilities", lambda r, asked, *a: np.ones(len(asked)))
    rows, asked = examples_of(6)[2:], pairs_of(examples_of(2))
    c = settings(tmp_path, base=str(tiny_base))
    judged(c, 0, rows, asked)
    judged(c, 0, rows, asked)
    judged(settings(tmp_path, base=str(tiny_base), min_probability=0.1), 0, rows, asked)
    assert len(calls) == 1
    judged(c, 1, rows, asked)
    judged(c, 0, rows[:-1], asked)
    judged(c, 0, rows, asked[:1])
    judged(settings(tmp_path, base=str(tiny_base), epochs=3), 0, rows, asked)
    judged(replace(c, seed=1), 0, rows, asked)
    assert len(calls) == 6


def test_what_cannot_be_validated_is_an_error(tmp_path, monkeypatch, tiny_base):
    source = write(tmp_path / "data.jsonl", [{"query": f"q{n}", "positive": f"p{n}"} for n in
                                             range(9)])  # fmt: skip
    with pytest.raises(ValueError, match=r"validate.base is not set"):
        validate_file(settings(tmp_path, source), source, tmp_path / "v.jsonl")
    monkeypatch.setattr(validate, "judged", lambda c, f, rows, asked: np.full(len(asked), 0.2))
    c = settings(tmp_path, source, base=str(tiny_base), folds=3)
    with pytest.raises(ValueError, match=r"no pair of 9 reaches .* AUC is 0.500 \(.5 is chance\)"):
        validate_file(c, source, tmp_path / "v.jsonl")
    for bad in ({"folds": 1}, {"corrupt": 1.0}, {"min_probability": 1.2}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=f"validate.{next(iter(bad))}"):
            ValidateConfig(**bad)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_pair_length": 4096}, r"validate\.max_pair_length|validate\.base"),
        ({"freeze": ["layers:9"]}, r"validate\.freeze=layers:9: .* has 2 layers"),
        ({"freeze": ["embedings"]}, r"validate\.freeze"),
    ],
)
def test_settings_that_do_not_fit_the_base_are_named_before_the_data_are_read(
    tmp_path, monkeypatch, tiny_base, wrong, message
):
    monkeypatch.setattr(validate, "read_source", lambda *a: pytest.fail("the data were read"))
    c = settings(tmp_path, tmp_path / "data.jsonl", base=str(tiny_base), **wrong)
    with pytest.raises(ValueError, match=message) as error:
        validate_file(c, tmp_path / "data.jsonl", tmp_path / "v.jsonl")
    assert "model." not in str(error.value).replace("model.safetensors", "")
