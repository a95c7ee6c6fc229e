"""Groups from files to pairs of tokens, against plain Python: coverage, ranks, draws, cache."""

import dataclasses
import json
import logging
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conf.schema import (
    DataConfig,
    LossConfig,
    OptimConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
)
from data import reading
from data.datasets import open_data
from data.formats import read_rerank_set
from data.groups import GroupBatches, open_groups

CLS, SEP = 1, 2


def letters() -> Tokenizer:
    """One token a character and BERT's special tokens, so that pairs can be read back."""
    vocab = {chr(c): c for c in range(32, 127)} | {"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def spec(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"query_prompt": "", "passage_prompt": "", "max_length": 99} | changes)


def settings(tmp_path: Path, **changes) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), **changes)


def batches(data, c: DataConfig, batch_size: int = 7, *, seed: int = 0, **ranks) -> GroupBatches:
    loss = LossConfig(kind="softmax", temperature=1.0)
    optim = OptimConfig(batch_size=batch_size)
    train = TrainConfig(task="rerank", data=c, optim=optim, loss=loss, seed=seed)
    return data.train.batches(train, **ranks)


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def labelled(num: int, *, seed: int = 0, name: str = "") -> list[dict]:
    """Rows of `num` queries with 1 to 3 positives and 0 to 5 negatives, some with scores."""
    rng = random.Random(seed)
    rows = []
    for i in range(num):
        passages = rng.sample(range(60), rng.randint(2, 8))
        for k, p in enumerate(passages):
            label = rng.randint(1, 3) if k == 0 or (k < 3 and rng.random() < 0.3) else 0
            score = rng.choice([None, round(rng.gauss(0, 3), 2)])
            words = "x" * (p % 17)
            rows.append(
                {
                    "query": f"{name}q{i}" + "y" * (i % 5),
                    "passage": f"p{p}{words}",
                    "label": label,
                    "score": score,
                }
            )
    return rows


def folder(root: Path, num: int = 40, *, seed: int = 0) -> Path:
    write(root / "train.jsonl", labelled(num, seed=seed))
    write(root / "dev.jsonl", labelled(9, seed=seed + 1, name="dev"))
    write(root / "test.jsonl", labelled(8, seed=seed + 2, name="test"))
    return root


def texts_of(ids: np.ndarray, types: np.ndarray) -> tuple[str, str]:
    """(query, passage) of a pair, which must be laid out as [CLS] q [SEP] p [SEP]."""
    assert ids.dtype == types.dtype == np.int32
    ids, types = ids.tolist(), types.tolist()
    middle = ids.index(SEP)
    assert ids[0] == CLS and ids[-1] == SEP and SEP not in ids[middle + 1 : -1]
    assert types == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
    return "".join(map(chr, ids[1:middle])), "".join(map(chr, ids[middle + 1 : -1]))


def read_back(batch) -> list[dict[tuple[str, str], tuple[float, float]]]:
    """For each group: (query, passage) -> (label, score)."""
    found: list[dict] = [{} for _ in range(batch.num_examples)]
    scores = batch.score_P if batch.score_P is not None else np.full(len(batch.group_P), np.nan)
    for ids, types, g, label, score in zip(
        batch.pair_tokens, batch.pair_types, batch.group_P, batch.label_P, scores, strict=True
    ):
        pair = texts_of(ids, types)
        assert pair not in found[g]
        found[g][pair] = (float(label), float(score))
    return found


def wanted_of(rows: list[dict]) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
    groups: dict[str, dict] = {}
    for r in rows:
        score = float("nan") if r.get("score") is None else r["score"]
        groups.setdefault(r["query"], {})[r["query"], r["passage"]] = (r["label"], score)
    return groups


def same(a: dict, b: dict) -> bool:
    """Equal groups; scores to float32, NaN equal to NaN."""
    return a.keys() == b.keys() and all(
        np.allclose(a[k], b[k], rtol=1e-6, equal_nan=True) for k in a
    )


def assert_equal(a, b) -> None:
    for field in a.__dataclass_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        elif field.startswith("pair_"):
            assert [t.tolist() for t in x] == [t.tolist() for t in y]
        else:
            assert list(x) == list(y) if field == "example_ids" else x == y


# -- what a step holds --------------------------------------------------------------------------


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_an_epoch_holds_every_group_once_and_whole(tmp_path, is_shuffled):
    """Texts, labels and scores take different ways through the cache, and rows of a query may
    stand far apart."""
    rows = labelled(40)
    if is_shuffled:
        random.Random(3).shuffle(rows)
    root = folder(tmp_path / "data")
    write(root / "train.jsonl", rows)
    c = settings(tmp_path, root=str(root))
    data = open_groups(c, spec(), letters())
    some = batches(data, c)
    assert data.train.num_steps(OptimConfig(batch_size=7)) == 6
    wanted = wanted_of(rows)
    seen: Counter = Counter()
    for step in range(6):
        batch = some.batch_at(step)
        found = read_back(batch)
        assert batch.num_pairs_global == len(batch.pair_tokens) == sum(map(len, found))
        assert batch.num_examples == batch.num_examples_global == (7 if step < 5 else 5)
        assert batch.num_tokens == sum(map(len, batch.pair_tokens))
        assert batch.label_P.dtype == batch.score_P.dtype == np.float32
        assert (np.diff(batch.group_P) >= 0).all() and batch.group_P.dtype == np.int64
        for group, name in zip(found, batch.example_ids, strict=True):
            query = next(iter(group))[0]
            seen[query] += 1
            assert same(group, wanted[query])
            line = int(name.rpartition(":")[2])
            assert rows[line - 1]["query"] == query  # named by its first row
            assert query not in [r["query"] for r in rows[: line - 1]]
    assert seen == dict.fromkeys(wanted, 1)
    assert some.num_examples_until(6) == 40 and some.num_examples_until(8) == 54


def test_batches_do_not_depend_on_what_was_asked_before(tmp_path):
    """A resumed run starts at a step that no state has led to."""
    c = settings(tmp_path, root=str(folder(tmp_path / "data")), max_negatives=2, random_negatives=2)
    data = open_groups(c, spec(), letters())
    first = [batches(data, c).batch_at(s) for s in range(14)]
    again = batches(open_groups(c, spec(), letters()), c)
    for step in (13, 2, 7, 0):
        assert_equal(again.batch_at(step), first[step])
    other = batches(data, c, seed=1)
    assert list(other.batch_at(0).example_ids) != list(first[0].example_ids)


@pytest.mark.parametrize("world", [2, 3, 11])
def test_ranks_share_a_step_by_whole_groups(tmp_path, world):
    """Every rank must agree on who takes what without a word; with 11 ranks four have nothing."""
    c = settings(tmp_path, root=str(folder(tmp_path / "data")), max_negatives=3, random_negatives=1)
    data = open_groups(c, spec(), letters())
    for step in range(6):
        whole = batches(data, c).batch_at(step)
        parts = [batches(data, c, rank=r, world=world).batch_at(step) for r in range(world)]
        groups = [g for p in parts for g in read_back(p)]
        assert all(same(a, b) for a, b in zip(groups, read_back(whole), strict=True))
        assert [i for p in parts for i in p.example_ids] == list(whole.example_ids)
        assert {(p.num_examples_global, p.num_pairs_global) for p in parts} == {
            (whole.num_examples, len(whole.pair_tokens))
        }
        if world < 7:
            largest = max(
                int(np.bincount(whole.group_P, [len(t) for t in whole.pair_tokens])[g])
                for g in range(whole.num_examples)
            )
            for p in parts:
                assert p.num_examples > 0
                assert p.num_tokens <= whole.num_tokens / world + largest
        else:
            assert sum(p.num_examples == 0 for p in parts) >= 4
            assert all(len(p.group_P) == len(p.label_P) == p.num_tokens == 0
                       for p in parts if p.num_examples == 0)  # fmt: skip


def test_own_negatives_are_drawn_anew_each_epoch(tmp_path):
    """Their scores must go with them, and in the end each has been drawn."""
    rows = [
        {"query": f"q{i}", "passage": f"p{i}-{k}", "label": int(k == 0), "score": i + k / 100}
        for i in range(10)
        for k in range(1 + i)
    ]
    c = settings(tmp_path, root=str(write(tmp_path / "data" / "train.jsonl", rows).parent),
                 max_negatives=3, dev_fraction=0.0, test_fraction=0.0)  # fmt: skip
    data = open_groups(c, spec(), letters())
    some = batches(data, c, batch_size=5)
    drawn: dict[str, Counter] = {}
    for step in range(2 * 40):
        for group in read_back(some.batch_at(step)):
            query = next(iter(group))[0]
            i = int(query[1:])
            assert len(group) == 1 + min(i, 3)
            for (_, passage), (label, score) in group.items():
                k = int(passage.partition("-")[2])
                assert passage.startswith(f"p{i}-") and label == (k == 0)
                assert score == pytest.approx(i + k / 100, rel=1e-6)
                drawn.setdefault(query, Counter())[k] += 1
    counts = np.array([drawn["q9"][k] for k in range(1, 10)])
    # 40 epochs x 3 of 9: 13.3 each, standard deviation 3; four of them
    assert counts.min() > 1 and counts.max() < 26 and drawn["q9"][0] == 40


def test_random_passages_join_as_not_relevant(tmp_path):
    """None may be known to answer the query, be its own text, or be in the group already."""
    rows = labelled(60, seed=4)
    rows += [{"query": f"extra{i}", "passage": "qa", "label": 1, "score": None} for i in range(3)]
    rows += [{"query": "qa", "passage": "p1", "label": 1, "score": None}]
    root = write(tmp_path / "data" / "train.jsonl", rows).parent
    fractions = {"dev_fraction": 0.0, "test_fraction": 0.0}
    c = settings(tmp_path, root=str(root), random_negatives=4, **fractions)
    data = open_groups(c, spec(), letters())
    wanted = wanted_of(rows)
    everything = {p for own in wanted.values() for _, p in own}
    some = batches(data, c, batch_size=2)  # two groups alone have not as many
    drawn = Counter()
    for step in range(64):
        batch = some.batch_at(step)
        found = read_back(batch)
        for group in found:
            query = next(iter(group))[0]
            own = wanted[query]
            extra = {pair for pair in group if pair not in own}
            assert len(extra) == 4 and own.keys() <= group.keys()
            for pair in extra:
                label, score = group[pair]
                assert label == 0 and np.isnan(score)
                assert pair[1] in everything and pair[1] != query
                drawn[pair[1]] += 1
        again = read_back(some.batch_at(step))
        assert all(same(a, b) for a, b in zip(found, again, strict=True))
    assert len(drawn) > 40  # of 61 passages


def test_whatever_is_known_to_answer_is_left_out_of_the_draw(tmp_path):
    """Asked for more than there are, the draw is all passages of the set but the forbidden ones:
    answers known from another data set and the query's own text among them."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i % 2}"} for i in range(6)]
    a = write(tmp_path / "a.jsonl", [*rows, {"query": "z", "positive": "q2", "negative": "n0"}])
    b = write(tmp_path / "b.jsonl", [{"query": "q1", "positive": "p4", "negative": "m"}])
    sets = {"a": SourceConfig(root=str(a)), "b": SourceConfig(root=str(b))}
    c = settings(tmp_path, sets=sets, random_negatives=50, dev_fraction=0, test_fraction=0)
    batch = batches(open_groups(c, spec(), letters()), c, batch_size=8).batch_at(0)
    found = {}
    for group in read_back(batch):
        query = next(iter(group))[0]
        found.setdefault(query, []).append({p for _, p in group})
    everything = {*(f"p{i}" for i in range(6)), "n0", "n1", "q2"}
    of_a, of_b = sorted(everything - {"p4"}), ["m", "p4"]
    assert sorted(map(sorted, found.pop("q1"))) == sorted([of_a, of_b])
    assert found.pop("q2") == [everything - {"q2"}]
    assert all(some == [everything] for some in found.values()) and len(found) == 5


def test_scores_stay_with_the_negatives_that_are_left(tmp_path):
    """A negative that answers its query in another row is left out, with its score."""
    rows = [
        {"query": "a", "positive": "p", "negatives": ["w", "x", "y", "x"],
         "negative_scores": [1, 2, 3, 4], "positive_scores": [9]},
        {"query": "b", "positive": "w", "negatives": ["p", "y"],
         "negative_scores": [5, 6], "positive_scores": [8]},
        {"query": "a", "positive": "x", "negatives": ["z", "y"],
         "negative_scores": [-1, 0], "positive_scores": [7]},
    ]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    c = settings(tmp_path, root=str(path), dev_fraction=0, test_fraction=0)
    data = open_groups(c, spec(), letters())
    found = {next(iter(g))[0]: g for g in read_back(batches(data, c).batch_at(0))}
    a = {"p": (1, 9), "x": (1, 7), "w": (0, 1), "y": (0, 3), "z": (0, -1)}
    assert same(found["a"], {("a", p): v for p, v in a.items()})
    b = {"w": (1, 8), "p": (0, 5), "y": (0, 6)}
    assert same(found["b"], {("b", p): v for p, v in b.items()})
    assert data.report["data_sets"]["data"]["train"]["negatives_that_are_positives"] == 1


def test_a_small_set_has_fewer_passages_to_draw(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(3)]
    root = write(tmp_path / "data" / "train.jsonl", rows).parent
    c = settings(tmp_path, root=str(root), random_negatives=9, dev_fraction=0.0, test_fraction=0)
    batch = batches(open_groups(c, spec(), letters()), c).batch_at(0)
    assert [len(g) for g in read_back(batch)] == [3, 3, 3]
    assert batch.score_P is None  # no data set has a teacher's scores


def test_sets_that_share_their_passages_draw_from_all_of_them(tmp_path):
    """Natural negatives beside a set of the same corpus: no set owns a passage that both have."""
    a = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(6)]
    b = [{"query": f"z{i}", "passage": f"p{i}", "label": 0} for i in range(6)]
    sets = {
        name: SourceConfig(root=str(write(tmp_path / f"{name}.jsonl", rows)))
        for name, rows in (("a", a), ("b", b))
    }
    c = settings(tmp_path, sets=sets, random_negatives=50, dev_fraction=0, test_fraction=0)
    batch = batches(open_groups(c, spec(), letters()), c, batch_size=12).batch_at(0)
    assert [len(group) for group in read_back(batch)] == [6] * 12


def test_a_curriculum_changes_the_first_steps_alone(tmp_path):
    """Stage by stage: which negatives, how many, how long; then as without one, to the last id."""
    root = str(folder(tmp_path / "data"))
    plain = settings(tmp_path, root=root, max_negatives=3, random_negatives=1)
    stages = [
        StageConfig(steps=3, max_negatives=0, random_negatives=5, max_train_length=24),
        StageConfig(steps=2, max_negatives=1, max_train_length=1000),  # more than a pair takes
    ]
    c = dataclasses.replace(plain, curriculum=stages)
    data = open_groups(c, spec(), letters())
    staged, without = batches(data, c), batches(open_groups(plain, spec(), letters()), plain)
    easy = dataclasses.replace(plain, max_negatives=0, random_negatives=5, max_train_length=24)
    one = dataclasses.replace(plain, max_negatives=1)
    for step, expected in enumerate([easy] * 3 + [one] * 2 + [plain] * 3):
        other = batches(open_groups(expected, spec(), letters()), expected)
        assert_equal(staged.batch_at(step), other.batch_at(step))
    assert_equal(staged.batch_at(13), without.batch_at(13))
    assert max(map(len, staged.batch_at(0).pair_tokens)) == 24
    assert max(map(len, staged.batch_at(5).pair_tokens)) > 24


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"steps": 0}, r"data\.curriculum\[1\]\.steps \(0\) must be >= 1"),
        ({"steps": 2, "max_train_length": 2}, r"\[1\]\.max_train_length \(2\) must be >= 3"),
        ({"steps": 2, "random_negatives": -1}, r"\[1\]\.random_negatives \(-1\) must be >= 0"),
    ],
)
def test_a_stage_that_cannot_be_is_named(tmp_path, stage, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, curriculum=[StageConfig(steps=1), StageConfig(**stage)])


def test_scores_that_the_loss_needs_must_be_there(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(20)]
    c = settings(tmp_path, root=str(write(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(ValueError, match=r"loss\.teacher_weight.*stages=\[score\]"):
        open_groups(c, spec(), letters(), with_scores=True)


def test_pairs_are_cut_as_the_tokenizer_cuts_them(tmp_path):
    """Texts are kept without special tokens and joined later; prompts are part of the text."""
    rng = random.Random(0)
    rows = [
        {
            "query": f"{i}" + "q" * rng.randint(0, 14),
            "passage": f"{i} {k}" + "p" * rng.randint(0, 60),
            "label": int(not k),
        }
        for i in range(20)
        for k in range(3)
    ]
    root = write(tmp_path / "data" / "train.jsonl", rows).parent
    c = settings(tmp_path, root=str(root), passage_prompt="doc: ", dev_fraction=0, test_fraction=0)
    tokenizer = letters()
    data = open_groups(c, spec(query_prompt="ask: ", max_length=44), tokenizer)
    batch = batches(data, c, batch_size=60).batch_at(0)
    tokenizer.enable_truncation(44, strategy="only_second")
    encoded = [tokenizer.encode(f"ask: {r['query']}", f"doc: {r['passage']}") for r in rows]
    assert max(len(e.ids) for e in encoded) == 44
    found = zip(batch.pair_tokens, batch.pair_types, strict=True)
    assert sorted((i.tolist(), t.tolist()) for i, t in found) == sorted(
        (e.ids, e.type_ids) for e in encoded
    )
    for key, wrong in (
        ("max_train_length", 29),
        ("curriculum", [StageConfig(steps=1), StageConfig(steps=1, max_train_length=20)]),
    ):
        other = dataclasses.replace(c, **{key: wrong})
        with pytest.raises(ValueError, match=rf"data\.{key}.* must be > 29: prompts and special"):
            open_groups(other, spec(query_prompt="ask: ", max_length=44), letters())
    c.max_train_length = 40
    short = open_groups(c, spec(max_length=44), letters())
    assert max(map(len, batches(short, c, batch_size=60).batch_at(0).pair_tokens)) == 40


# -- several sets, groups without a positive ----------------------------------------------------


def test_natural_negatives_are_a_second_data_set(tmp_path):
    """Questions without an answer train but judge nothing, so none of them is held out."""
    main = folder(tmp_path / "main")
    rows = [{"query": f"none{i}", "passage": f"p{i}", "label": 0} for i in range(30)]
    path = write(tmp_path / "natural.jsonl", rows)
    sets = {"main": SourceConfig(root=str(main)), "natural": SourceConfig(root=str(path))}
    c = settings(tmp_path, sets=sets, random_negatives=1)
    data = open_groups(c, spec(), letters())
    assert data.train.num_examples == 70
    assert list(data.dev) == ["main"] and list(data.test) == ["main"]
    assert data.report["data_sets"]["natural"]["train"]["without_positives"] == 30
    seen = Counter()
    for step in range(10):
        for group in read_back(batches(data, c).batch_at(step)):
            query = next(iter(group))[0]
            seen[query.startswith("none")] += 1
            if query.startswith("none"):
                assert len(group) == 2 and {label for label, _ in group.values()} == {0.0}
    assert seen == {True: 30, False: 40}


def test_queries_without_an_answer_stay_in_training(tmp_path):
    rows = [{"query": f"q{i}", "passage": f"p{i}-{k}", "label": int(k == 0 and i % 2)}
            for i in range(100) for k in range(3)]  # fmt: skip
    random.Random(0).shuffle(rows)
    c = settings(tmp_path, root=str(write(tmp_path / "rows.jsonl", rows)))
    data = open_groups(c, spec(), letters())
    sizes = data.report["data_sets"]["data"]["train"]
    assert sizes["without_positives"] == 50
    held = {*data.dev["dev"].query_texts, *data.test["test"].query_texts}
    # a tenth of the 50 that have an answer, twice
    assert 8 <= len(held) <= 12 and all(int(q[1:]) % 2 for q in held)
    assert sizes["examples"] == 100 - len(held)
    for one in (data.dev["dev"], data.test["test"]):
        assert all(len(c) == 3 for c in one.candidates.values())


def test_an_answer_in_one_data_set_is_no_negative_in_another(tmp_path, caplog):
    a = write(tmp_path / "a.jsonl", [{"query": "q", "positive": "yes", "negative": "no"}])
    rows = [{"query": "q", "passage": p, "label": 0, "score": s}
            for p, s in (("bad", 1), ("yes", 2), ("ugly", 3))]  # fmt: skip
    b = write(tmp_path / "b.jsonl", rows)
    sets = {"a": SourceConfig(root=str(a)), "b": SourceConfig(root=str(b))}
    c = settings(tmp_path, sets=sets, dev_fraction=0, test_fraction=0)
    with caplog.at_level(logging.WARNING):
        data = open_groups(c, spec(), letters())
    assert "1 negatives answer the same query in another data set" in caplog.text
    groups = read_back(batches(data, c).batch_at(0))
    found = {(p, label, score) for g in groups for (_, p), (label, score) in g.items() if g}
    assert ("bad", 0, 1) in found and ("ugly", 0, 3) in found
    assert [p for p, label, _ in found if p == "yes"] == ["yes"]


def test_a_group_left_without_pairs_does_no_harm(tmp_path):
    """max_negatives=0 leaves an unanswered query with nothing."""
    rows = [*labelled(5), {"query": "none", "passage": "p1", "label": 0, "score": None}]
    root = write(tmp_path / "data" / "train.jsonl", rows).parent
    c = settings(tmp_path, root=str(root), max_negatives=0, dev_fraction=0, test_fraction=0)
    batch = batches(open_groups(c, spec(), letters()), c).batch_at(0)
    assert batch.num_examples == 6 and len(set(batch.group_P.tolist())) == 5
    assert (batch.label_P > 0).all()


def test_positives_alone_are_refused_with_the_remedy(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(30)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl.*set data\.random_negatives.*stages=\[mine\]"
    ):
        open_groups(settings(tmp_path, root=str(path)), spec(), letters())
    data = open_groups(settings(tmp_path, root=str(path), random_negatives=2), spec(), letters())
    assert data.dev["dev"].candidates is None


# -- cache, held-out sets -----------------------------------------------------------------------


def test_groups_are_read_once(tmp_path, monkeypatch):
    c = settings(tmp_path, root=str(folder(tmp_path / "data")))
    first = open_groups(c, spec(), letters())
    monkeypatch.setattr(reading, "read_groups", None)
    monkeypatch.setattr(reading, "read_rerank_set", None)
    again = open_groups(c, spec(), letters())
    assert (again.dev, again.test, again.report) == (first.dev, first.test, first.report)
    assert_equal(batches(again, c).batch_at(3), batches(first, c).batch_at(3))


def test_held_out_sets_come_back_from_the_cache_as_they_were_read(tmp_path):
    root = folder(tmp_path / "data")
    data = open_groups(settings(tmp_path, root=str(root)), spec(), letters())
    for split, one in (("dev", data.dev["dev"]), ("test", data.test["test"])):
        assert one == read_rerank_set(SourceConfig(root=str(root)), split, name=split)
        assert all(one.candidates.values())
    few = open_groups(settings(tmp_path, root=str(root), max_eval_queries=4), spec(), letters())
    assert len(few.dev["dev"].query_ids) == 4
    assert list(few.dev["dev"].candidates) == few.dev["dev"].query_ids
    assert len(few.test["test"].query_ids) == 8


def test_other_texts_behind_the_same_ids_are_read_anew(tmp_path):
    """The rows stay as they are when the corpus they point to changes."""
    root = write(tmp_path / "rows" / "train.jsonl", [
        {"query_id": "q", "doc_id": d, "label": int(d == "a")} for d in "ab"]).parent  # fmt: skip
    texts = tmp_path / "texts"
    write(texts / "queries.jsonl", [{"_id": "q", "text": "ask"}])
    c = settings(tmp_path, root=str(root), texts=str(texts), dev_fraction=0, test_fraction=0)
    for word in ("old", "new"):
        write(texts / "corpus.jsonl", [{"_id": d, "text": f"{word} {d}"} for d in "ab"])
        batch = batches(open_groups(c, spec(), letters()), c).batch_at(0)
        assert {p for g in read_back(batch) for _, p in g} == {f"{word} a", f"{word} b"}


def test_one_cache_serves_a_retriever_and_a_reranker(tmp_path):
    """Same file and settings, other tokens and other groups: neither may take the other's."""
    rows = [{"query": f"q{i % 20}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(40)]
    root = write(tmp_path / "data" / "train.jsonl", rows).parent
    c = settings(tmp_path, root=str(root), dev_fraction=0, test_fraction=0)
    groups = open_groups(c, spec(), letters())
    towers = spec(max_query_length=99, max_passage_length=99, prompt_in_pooling=True)
    data = open_data(c, towers, letters(), letters())
    assert (data.train.num_examples, groups.train.num_examples) == (40, 20)
    assert data.train.sets[0].queries[0].tolist() == [CLS, ord("q"), ord("0"), SEP]
    assert groups.train.sets[0].queries[0].tolist() == [ord("q"), ord("0")]
    assert data.train.sets[0].positive_grades is None


def test_examples_can_be_fewer(tmp_path):
    c = settings(tmp_path, root=str(folder(tmp_path / "data")), max_examples=11)
    data = open_groups(c, spec(), letters(), seed=3)
    some = batches(data, c)
    names = [i for s in range(2) for i in some.batch_at(s).example_ids]
    assert data.train.num_examples == 11 == len(set(names))
    assert data.report["train_examples"] == 11


def test_toy_groups_train_and_are_judged(tmp_path):
    c = settings(tmp_path, format="toy")
    data = open_groups(c, spec(max_length=512), letters())
    some = batches(data, c)
    labels = np.concatenate([some.batch_at(s).label_P for s in range(69)])
    assert [(labels == x).sum() for x in (0, 1)] == [120, 540]  # of 480 queries
    assert data.dev["dev"].query_ids and list(data.compared) == ["test"]
