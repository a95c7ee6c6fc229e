"""Batches against plain Python: coverage, ranks, relatives, negatives, position."""

import dataclasses
import itertools
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from conf.schema import LossConfig, OptimConfig, TrainConfig
from data.batches import Batches, Ragged, TrainSet, TrainStore, batches, chunks
from data.records import content_hash
from data.tokens import TokenStore


class Texts:
    """Stands in for a TokenStore: the ids of text i are its number, 1 to 9 times."""

    def __init__(self, first: int, texts: list[str]) -> None:
        self.first, self.texts = first, texts
        self.length_n = np.array([1 + i * 7 % 9 for i in range(len(texts))], np.int32)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: np.ndarray) -> list[np.ndarray]:
        return [np.full(self.length_n[i], self.first + i, np.int32) for i in index]


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged(np.cumsum([0, *map(len, rows)]), np.array(list(itertools.chain(*rows)), np.int64))


def numbered(texts: list[str], numbers: dict[str, int]) -> list[int]:
    return list(dict.fromkeys(numbers.setdefault(t, len(numbers)) for t in texts))


def train_set(
    examples: list[tuple[str, list[str], list[str]]], *, name: str = "", first: int = 0, **changes
) -> TrainSet:
    """A TrainSet of (query, positives, negatives), as data/stored.py numbers texts."""
    queries: dict[str, int] = {}
    passages: dict[str, int] = {}
    query_E = [numbered([q], queries)[0] for q, _, _ in examples]
    rows = [(numbered(p, passages), numbered(n, passages)) for _, p, n in examples]
    return TrainSet(
        name=name,
        queries=Texts(first, list(queries)),
        passages=Texts(first, list(passages)),
        query_E=np.array(query_E),
        positives=ragged([p for p, _ in rows]),
        negatives=ragged([n for _, n in rows]),
        query_hash=np.array([content_hash(q) for q in queries], np.int64),
        passage_hash=np.array([content_hash(p) for p in passages], np.int64),
        labels=[f"{name}{i}" for i in range(len(examples))],
        **changes,
    )


def some_examples(num: int, *, seed: int, num_texts: int = 40, prefix: str = ""):
    """Few distinct texts, so that queries repeat, share positives and equal passages."""
    rng = np.random.default_rng(seed)

    def pick(count: int) -> list[str]:
        return [f"{prefix}text {i}" for i in rng.integers(0, num_texts, count)]

    return [(pick(1)[0], pick(rng.integers(1, 4)), pick(rng.integers(0, 6))) for _ in range(num)]


def plain(num: int, name: str = "", **changes) -> TrainSet:
    rows = [(f"{name}q{i}", [f"{name}p{i}"], []) for i in range(num)]
    return train_set(rows, name=name, **changes)


def number_of(tokens: np.ndarray) -> int:
    assert len(set(tokens.tolist())) == 1
    return int(tokens[0])


def assert_equal(a, b) -> None:
    """Field by field, arrays exactly."""
    for field in a.__dataclass_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        elif field.endswith("_tokens"):
            assert [t.tolist() for t in x] == [t.tolist() for t in y]
        else:
            assert list(x) == list(y) if field == "example_ids" else x == y


# -- what a batch says --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_indices_say_what_the_examples_say(batch_size, world):
    """Every pair, weight and column recomputed with dicts from the examples' own texts."""
    examples = some_examples(64, seed=1)
    store = TrainStore([train_set(examples)])
    texts = store.sets[0].queries.texts, store.sets[0].passages.texts
    for step in range(store.steps_per_epoch(batch_size)):
        parts = [
            Batches(store, batch_size=batch_size, seed=3, rank=r, world=world).batch_at(step)
            for r in range(world)
        ]
        columns = [texts[1][number_of(t)] for p in parts for t in p.passage_tokens]
        taken = [examples[int(i)] for p in parts for i in p.example_ids]
        assert len(set(columns)) == len(columns) == parts[0].num_passages_global
        wanted_columns = {t for _, pos, neg in taken for t in [*pos, *neg]}
        assert set(columns) == wanted_columns
        weights: Counter = Counter()
        for query, positives, _ in taken:
            for p in set(positives):
                weights[query, p] += 1 / len(set(positives))
        found: Counter = Counter()
        for part in parts:
            queries = [texts[0][number_of(t)] for t in part.query_tokens]
            assert len(set(queries)) == len(queries)
            for q, p, w in zip(
                part.pair_query_P, part.pair_passage_P, part.pair_weight_P, strict=True
            ):
                found[queries[q], columns[p]] += float(w)
            assert part.num_examples == len(part.example_ids)
            np.testing.assert_allclose(part.pair_weight_P.sum(), part.num_examples, rtol=1e-6)
            assert part.num_examples_global == len(taken)
        assert found.keys() == weights.keys()
        for pair, weight in weights.items():  # float32 of thirds
            assert found[pair] == pytest.approx(weight, rel=1e-6)


def brute_relatives(all_examples, query: str, columns: list[str]) -> list[int]:
    known = {query}
    for q, positives, _ in all_examples:
        if q == query:
            known.update(positives)
    return [i for i, text in enumerate(columns) if text in known]


@pytest.mark.parametrize("num_texts", [12, 40, 400])
def test_relatives_equal_a_search_through_all_the_data(num_texts):
    """Of two sets, with texts that are equal on both sides, and queries with more relatives than a
    batch has columns."""
    one = some_examples(90, seed=5, num_texts=num_texts)
    two = some_examples(50, seed=6, num_texts=num_texts)
    one += [("text 3", ["text 1"], [])] * 3
    two += [("text 3", [f"text {i}" for i in range(num_texts)], [])]
    store = TrainStore(
        [
            train_set(one, name="one", query_prompt="q: ", passage_prompt="p: "),
            train_set(two, name="two", first=10_000),
        ]
    )
    seen_wide = 0
    for batch_size, world in ((4, 1), (33, 2)):
        steps = store.steps_per_epoch(batch_size)
        for step, rank in itertools.product(range(steps), range(world)):
            parts = [
                Batches(store, batch_size=batch_size, seed=0, rank=r, world=world).batch_at(step)
                for r in range(world)
            ]

            def text(tokens, side):
                n = number_of(tokens)
                part = store.sets[n >= 10_000]
                return (part.queries if side == "query" else part.passages).texts[n % 10_000]

            columns = [text(t, "passage") for p in parts for t in p.passage_tokens]
            for tokens, row in zip(parts[rank].query_tokens, parts[rank].relatives_BK, strict=True):
                wanted = brute_relatives(one + two, text(tokens, "query"), columns)
                assert [i for i in row.tolist() if i >= 0] == wanted
                assert row.tolist()[: len(wanted)] == wanted, "padding comes last"
                seen_wide += text(tokens, "query") == "text 3" and len(columns) < num_texts
    assert seen_wide or num_texts < 40


def brute_query_relatives(all_examples, query: str, others: list[str]) -> list[int]:
    answers: dict[str, set[str]] = {}
    for q, positives, _ in all_examples:
        answers.setdefault(q, set()).update(positives)
    mine = answers[query]
    return [
        i
        for i, other in enumerate(others)
        if other == query or other in mine or query in answers[other] or mine & answers[other]
    ]


@pytest.mark.parametrize("num_texts", [12, 60, 600])
@pytest.mark.parametrize("block_pairs", [None, 7])
def test_query_relatives_equal_a_search_through_all_the_data(num_texts, block_pairs, monkeypatch):
    """An answer that two queries share may be a positive of neither in this batch; texts are equal
    across sides and sets; with blocks of 7 pairs a query's relatives are found in several."""
    if block_pairs:
        monkeypatch.setattr("data.batches._BLOCK_PAIRS", block_pairs)
    one = some_examples(90, seed=5, num_texts=num_texts)
    two = some_examples(50, seed=6, num_texts=num_texts)
    sets = [
        train_set(one, name="one", query_prompt="q: ", passage_prompt="p: "),
        train_set(two, name="two", first=10_000),
    ]
    store = TrainStore(sets)
    outside = same_text = 0
    for batch_size, world in ((1, 1), (5, 3), (33, 2), (140, 1)):
        for step in range(store.steps_per_epoch(batch_size)):
            parts = [
                Batches(
                    store,
                    batch_size=batch_size,
                    seed=0,
                    query_relatives=True,
                    rank=r,
                    world=world,
                ).batch_at(step)
                for r in range(world)
            ]
            numbers = [number_of(t) for p in parts for t in p.query_tokens]
            texts = [sets[n >= 10_000].queries.texts[n % 10_000] for n in numbers]
            same_text += len(set(texts)) < len(texts)
            row = 0
            for part in parts:
                assert (part.query_offset, part.num_queries_global) == (row, len(texts))
                assert part.query_relatives_BK.dtype == np.int64
                assert len(part.query_relatives_BK) == len(part.query_tokens)
                for found in part.query_relatives_BK.tolist():
                    wanted = brute_query_relatives(one + two, texts[row], texts)
                    assert found[: len(wanted)] == wanted and set(found[len(wanted) :]) <= {-1}
                    outside += any(not part.query_offset <= j for j in wanted)
                    row += 1
            assert row == len(texts)
    assert outside, "relatives on other ranks were tried"
    assert same_text or num_texts == 600, "equal queries with different prompts were tried"


def test_query_relatives_come_when_asked_for():
    """The setting of the loss switches them on; nothing else in the batch changes."""
    store = TrainStore([train_set(some_examples(30, seed=1))])

    def first(**loss):
        c = TrainConfig(loss=LossConfig(**loss), optim=OptimConfig(batch_size=16))
        return store.batches(c).batch_at(0)

    without, asked = first(), first(negatives=["query_passage", "query_query"])
    assert without.query_relatives_BK is None
    assert asked.query_relatives_BK is not None
    assert_equal(dataclasses.replace(asked, query_relatives_BK=None), without)


def test_queries_that_all_share_an_answer_are_all_relatives():
    """Labels as passages: all queries of a class, and no other."""
    rows = [(f"q{i}", [f"label {i % 3}"], []) for i in range(60)]
    store = TrainStore([train_set(rows)])
    batch = Batches(store, batch_size=60, seed=0, query_relatives=True).batch_at(0)
    label = [number_of(t) % 3 for t in batch.query_tokens]
    wanted = [[j for j in range(60) if label[j] == label[i]] for i in range(60)]
    assert batch.query_relatives_BK.tolist() == wanted


def test_memory_follows_the_queries_that_are_related_not_the_answers_they_share(monkeypatch):
    """160 queries in groups of 20 that share 200 answers: 640,000 finds of 3,200 relatives."""
    monkeypatch.setattr("data.batches._BLOCK_PAIRS", 10_000)
    rows = [(f"q{i}", [f"p{i // 20}.{j}" for j in range(200)], []) for i in range(160)]
    store = TrainStore([train_set(rows)])
    numbers = np.arange(160)
    tracemalloc.start()
    found = store.query_relatives(numbers, 0, 160)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [[i // 20 * 20 + j for j in range(20)] for i in range(160)]
    # 32,160 relatives in a dozen vectors of 8 bytes; at once the finds alone would be 20 MB
    assert peak_bytes < 6e6


def test_numbers_name_the_texts_in_the_store():
    """Equal texts of two sets are one query of the batch: its number is that of the first set."""
    one, two = some_examples(30, seed=1), some_examples(30, seed=2)
    store = TrainStore([train_set(one), train_set(two, first=10_000)])

    def text(tokens, side: str) -> str:
        n = number_of(tokens)
        part = store.sets[n >= 10_000]
        return (part.queries if side == "query" else part.passages).texts[n % 10_000]

    for world in (1, 3):
        parts = [
            Batches(store, batch_size=20, seed=0, rank=r, world=world).batch_at(1)
            for r in range(world)
        ]
        for side, stores in (
            ("query", [s.queries for s in store.sets]),
            ("passage", [s.passages for s in store.sets]),
        ):
            texts = [t for one in stores for t in one.texts]
            wanted = [text(t, side) for p in parts for t in getattr(p, f"{side}_tokens")]
            field = "query_numbers_A" if side == "query" else "passage_numbers_N"
            for numbers in (getattr(p, field) for p in parts):
                assert numbers.dtype == np.int64
                assert numbers.tolist() == [texts.index(t) for t in wanted]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("different_prompts", [False, True])
def test_texts_used_are_those_that_batches_hold(kept, different_prompts):
    """A guide encodes these and no others: one left out would have no embedding."""
    changes = {"query_prompt": "q: ", "passage_prompt": "p: "} if different_prompts else {}
    sets = [
        train_set(some_examples(40, seed=1, num_texts=90)),
        train_set(some_examples(30, seed=2, num_texts=90), first=10_000, **changes),
    ]
    store = TrainStore(sets, kept=[np.arange(0, 40, 3), None] if kept else [])
    batches = Batches(store, batch_size=16, seed=0)
    held = [batches.batch_at(s) for s in range(2 * batches.plan.steps_per_epoch)]
    queries, passages = store.texts_used()
    assert queries.tolist() == sorted({n for b in held for n in b.query_numbers_A.tolist()})
    assert passages.tolist() == sorted({n for b in held for n in b.passage_numbers_N.tolist()})


def test_texts_that_differ_in_spaces_or_form_are_relatives():
    """content_hash, not the bytes: a no-break space or a ligature makes no new answer."""
    rows = [("q one", ["an  office\u00a0chair"], []), ("q two", ["an o\ufb03ce chair"], [])]
    store = TrainStore([train_set(rows[:1]), train_set(rows[1:], first=10_000)])
    batch = Batches(store, batch_size=2, seed=0).batch_at(0)
    assert len(batch.passage_tokens) == 1, "the same text with the same prompt is encoded once"
    store.sets[1].passage_prompt = "p: "
    batch = Batches(TrainStore(store.sets), batch_size=2, seed=0).batch_at(0)
    assert len(batch.passage_tokens) == 2
    assert batch.relatives_BK.tolist() == [[0, 1], [0, 1]]
    batch = Batches(TrainStore(store.sets), batch_size=2, seed=0, query_relatives=True).batch_at(0)
    assert batch.query_relatives_BK.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("num", [1, 2, 7, 64])
def test_ranks_side_by_side_are_the_batch_of_one(world, num):
    """The gradient must not depend on the number of ranks: same texts, same columns, same pairs."""
    store = TrainStore([train_set(some_examples(num, seed=num))])
    settings = dict(batch_size=64, seed=1, max_negatives=3, query_relatives=True)
    whole = Batches(store, **settings).batch_at(0)
    parts = [Batches(store, **settings, rank=r, world=world).batch_at(0) for r in range(world)]
    for field in ("query_tokens", "passage_tokens"):
        joined = [t.tolist() for p in parts for t in getattr(p, field)]
        assert joined == [t.tolist() for t in getattr(whole, field)]
        counts = [len(getattr(p, field)) for p in parts]
        assert min(counts) >= 1 or sum(counts) < world
    row, column = 0, 0
    pairs = []
    for part in parts:
        assert part.passage_offset == column
        pairs += zip(part.pair_query_P + row, part.pair_passage_P, part.pair_weight_P, strict=True)
        assert part.query_offset == row
        assert part.num_queries_global == len(whole.query_tokens)
        np.testing.assert_array_equal(part.query_numbers_A, whole.query_numbers_A)
        np.testing.assert_array_equal(part.passage_numbers_N, whole.passage_numbers_N)
        for field in ("relatives_BK", "query_relatives_BK"):
            found, rows = getattr(part, field), getattr(whole, field)
            rows = rows[row : row + len(part.query_tokens)]
            assert found.shape[1] <= rows.shape[1]
            np.testing.assert_array_equal(rows[:, : found.shape[1]], found)
            assert (rows[:, found.shape[1] :] == -1).all()
        row, column = row + len(part.query_tokens), column + len(part.passage_tokens)
    wanted = zip(whole.pair_query_P, whole.pair_passage_P, whole.pair_weight_P, strict=True)
    assert sorted(pairs) == sorted(wanted)
    assert sum(p.num_examples for p in parts) == whole.num_examples == num
    assert sorted(i for p in parts for i in p.example_ids) == sorted(whole.example_ids)
    if num == 64:  # the work is shared: within one text (9 tokens) of equal
        tokens = [sum(map(len, p.passage_tokens)) for p in parts]
        assert max(tokens) - min(tokens) <= 2 * 9


def test_prompt_tokens_come_with_the_texts():
    rows = some_examples(20, seed=2)
    sets = [
        train_set(rows, query_skip=3, passage_skip=0),
        train_set(
            rows,
            first=10_000,
            query_skip=5,
            passage_skip=4,
            query_prompt="x",
            passage_prompt="y",
        ),
    ]
    batch = Batches(TrainStore(sets), batch_size=40, seed=0).batch_at(0)
    wanted = [5 if number_of(t) >= 10_000 else 3 for t in batch.query_tokens]
    assert batch.query_prompt_tokens_B.tolist() == wanted
    wanted = [4 if number_of(t) >= 10_000 else 0 for t in batch.passage_tokens]
    assert batch.passage_prompt_tokens_N.tolist() == wanted
    assert batch.query_prompt_tokens_B.dtype == batch.passage_prompt_tokens_N.dtype == np.int32


# -- which examples come when -------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 50, 53, 200])
def test_an_epoch_takes_every_example_once(batch_size, world):
    """The last, smaller batch included; another order each epoch and seed."""
    store = TrainStore([plain(53)])
    steps = store.steps_per_epoch(batch_size)
    assert steps == -(-53 // batch_size)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            parts = [
                Batches(store, batch_size=batch_size, seed=seed, rank=r, world=world).batch_at(step)
                for r in range(world)
            ]
            total = sum(p.num_examples for p in parts)
            assert {p.num_examples_global for p in parts} == {total}
            assert total == (min(batch_size, 53 - batch_size * (step % steps)))
            order += [int(i) for p in parts for i in p.example_ids]
        assert sorted(order) == list(range(53))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("mix", ["mixed", "one"])
def test_the_position_is_the_step_alone(mix):
    """Resume at step s needs s and nothing that was drawn before."""
    rows = some_examples(45, seed=9)
    sets = [
        train_set(rows[:30], name="a", weight=2.0),
        train_set(rows[30:], name="b", first=10_000),
    ]
    store = TrainStore(sets, mix=mix, mix_temperature=2.0)
    settings = dict(batch_size=8, seed=4, max_negatives=2, query_relatives=True)
    straight = list(batches(store, **settings, steps=20))
    assert len(straight) == 20
    for start in (0, 1, 7, 19):
        resumed = list(batches(TrainStore(sets, mix, 2.0), **settings, start_step=start, steps=20))
        assert len(resumed) == 20 - start
        for a, b in zip(resumed, straight[start:], strict=True):
            assert_equal(a, b)
    one = Batches(store, **settings)
    for step in (13, 2, 19, 13, 0):
        assert_equal(one.batch_at(step), straight[step])


def test_epochs_may_be_fractions():
    store = TrainStore([plain(100)])
    assert len(list(batches(store, batch_size=10, seed=0, epochs=0.25))) == 3
    assert len(list(itertools.islice(batches(store, batch_size=10, seed=0), 45))) == 45


def test_negatives_are_drawn_anew_without_replacement():
    """As many as asked, the example's own, all of them in the long run, none twice in a step."""
    rows = [(f"q{i}", [f"p{i}"], [f"n{i}.{j}" for j in range(i % 7)]) for i in range(30)]
    store = TrainStore([train_set(rows)])
    passages = store.sets[0].passages.texts
    drawn: Counter = Counter()
    for step in range(60):
        batch = Batches(store, batch_size=30, seed=0, max_negatives=2).batch_at(step)
        texts = [passages[number_of(t)] for t in batch.passage_tokens]
        here = Counter(t.split(".")[0] for t in texts if t.startswith("n"))
        assert here == {f"n{i}": min(2, i % 7) for i in range(30) if i % 7}
        drawn.update(t for t in texts if t.startswith("n"))
    assert set(drawn) == {n for _, _, negatives in rows for n in negatives}
    sixes = [drawn[f"n{i}.{j}"] for i in range(6, 30, 7) for j in range(6)]
    # 60 draws of 2 in 6: binomial with mean 20, deviation 3.7; five deviations
    assert min(sixes) > 1 and max(sixes) < 39
    alone = TrainStore([train_set([("q", ["p"], list("abcdef"))])])
    steps = [Batches(alone, batch_size=1, seed=0, max_negatives=1).batch_at(s) for s in range(20)]
    assert len({number_of(b.passage_tokens[1]) for b in steps}) > 3, "another draw each step"
    batch = Batches(store, batch_size=30, seed=0, max_negatives=0).batch_at(0)
    assert len(batch.passage_tokens) == 30
    batch = Batches(store, batch_size=30, seed=0).batch_at(0)
    assert len(batch.passage_tokens) == 30 + sum(i % 7 for i in range(30))


# -- several sets -------------------------------------------------------------------------------


def names_in(batch) -> Counter:
    return Counter(label.split(": ")[0] for label in batch.example_ids)


@pytest.mark.parametrize("mix", ["mixed", "one"])
def test_natural_shares_take_every_example_once_an_epoch(mix):
    """With equal weights and temperature 1 an epoch over three sets is an epoch of each."""
    store = TrainStore([plain(n, s) for s, n in (("a", 40), ("b", 7), ("c", 100))], mix=mix)
    for epoch in range(3):
        steps = store.steps_per_epoch(16)
        seen = Counter(
            label
            for step in range(epoch * steps, (epoch + 1) * steps)
            for label in Batches(store, batch_size=16, seed=2).batch_at(step).example_ids
        )
        assert len(seen) == 147 and set(seen.values()) == {1}


@pytest.mark.parametrize(
    ("weights", "temperature"), [((1, 1, 1), 1.0), ((1, 5, 1), 1.0), ((1, 1, 1), 3.0)]
)
def test_shares_follow_weight_size_and_temperature(weights, temperature):
    sizes = (400, 70, 1000)
    store = TrainStore(
        [plain(n, s, weight=w) for s, n, w in zip("abc", sizes, weights, strict=True)],
        mix_temperature=temperature,
    )
    strength = [(w * n) ** (1 / temperature) for w, n in zip(weights, sizes, strict=True)]
    steps = store.steps_per_epoch(64)
    seen: Counter = Counter()
    for step in range(steps):
        seen += names_in(Batches(store, batch_size=64, seed=0).batch_at(step))
    assert seen.total() == 1470
    for name, s in zip("abc", strength, strict=True):
        assert abs(seen[name] - 1470 * s / sum(strength)) <= 1  # quotas are whole numbers
    if temperature == 3:
        assert seen["b"] > 3 * 70, "a small set is drawn more often than once"


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((5, 100), (20, 1)), ((40, 1000), (25, 1)), ((99, 99), (1, 1)), ((7, 130, 500), (9, 2, 1))],
)
def test_shares_hold_where_each_batch_is_from_one_set(sizes, weights):
    """Batches of a small set are smaller: as many of them as of a large one are not as many
    examples, and an epoch is short of them."""
    sets = [plain(n, weight=w) for n, w in zip(sizes, weights, strict=True)]
    store = TrainStore(sets, mix="one")
    plan = Batches(store, batch_size=64, seed=0).plan
    num_epochs = 48  # every set ends a lap with it: no smaller batch is still to come
    seen = np.zeros(len(sets))
    for step in range(num_epochs * store.steps_per_epoch(64)):
        np.add.at(seen, store.set_of(plan.examples(step)), 1)
    share = np.multiply(sizes, weights) / np.dot(sizes, weights)
    mean_batch = np.array([n / -(-n // 64) for n in sizes])
    # half a batch an epoch, which cannot be cut, and a quota that is a whole number
    assert (np.abs(seen / num_epochs - share * sum(sizes)) <= mean_batch / 2 + 1).all()


@pytest.mark.parametrize("mix", ["mixed", "one"])
def test_a_set_is_used_up_before_it_starts_over(mix):
    """Over epochs too: the set's own walk goes on where the last epoch left it."""
    store = TrainStore([plain(50, "a"), plain(11, "b", weight=3.0)], mix=mix, mix_temperature=2.0)
    drawn: dict[str, list[str]] = {"a": [], "b": []}
    for step in range(4 * store.steps_per_epoch(8)):
        batch = Batches(store, batch_size=8, seed=5).batch_at(step)
        for label in batch.example_ids:
            drawn[label.split(": ")[0]].append(label)
        if mix == "one":
            assert len(names_in(batch)) == 1
    for name, size in (("a", 50), ("b", 11)):
        laps = [drawn[name][i : i + size] for i in range(0, len(drawn[name]) - size, size)]
        assert len(laps) >= 2
        assert all(len(set(lap)) == size for lap in laps)
        assert laps[0] != laps[1]


def test_a_batch_from_one_set_counts_right_at_the_end_of_the_set():
    store = TrainStore([plain(20, "a"), plain(9, "b")], mix="one")
    sizes = Counter()
    for step in range(store.steps_per_epoch(8)):
        batch = Batches(store, batch_size=8, seed=0).batch_at(step)
        sizes[next(iter(names_in(batch))), batch.num_examples_global] += 1
    assert sizes == {("a", 8): 2, ("a", 4): 1, ("b", 8): 1, ("b", 1): 1}


@pytest.mark.parametrize("mix", ["mixed", "one"])
@pytest.mark.parametrize("num_sets", [1, 3])
def test_examples_are_counted_without_reading_them(mix, num_sets):
    """The progress bar of a resumed run starts there."""
    sets = [plain(n, s) for s, n in (("a", 40), ("b", 7), ("c", 100))][:num_sets]
    store = TrainStore(sets, mix=mix)
    c = SimpleNamespace(
        seed=0,
        loss=SimpleNamespace(query_negatives=False, learns_scores=False),
        optim=SimpleNamespace(batch_size=16),
        data=SimpleNamespace(max_negatives=None),
    )
    total, counted = 0, [0]
    for step in range(3 * store.steps_per_epoch(16)):
        total += store.batches(c).batch_at(step).num_examples
        counted.append(total)
    until = store.batches(c).num_examples_until
    assert [until(s) for s in range(len(counted))] == counted


def test_kept_examples_alone_are_drawn():
    store = TrainStore([plain(50), plain(20, "b")], kept=[np.arange(0, 50, 5), None])
    labels = Batches(store, batch_size=100, seed=0).batch_at(0).example_ids
    assert store.num_examples == 30
    assert sorted(labels[:]) == sorted(
        [f": {i}" for i in range(0, 50, 5)] + [f"b: b{i}" for i in range(20)]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"batch_size": 0}, r"optim\.batch_size \(0\)"), ({"rank": 2, "world": 2}, "rank")],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Batches(TrainStore([plain(5)]), **{"batch_size": 2, "seed": 0, **changes})


# -- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 64, 500, 10**6])
def test_chunks_are_the_greedy_cut_of_the_sorted_texts(budget):
    """contrastors cut by number of queries and lost most documents: here nothing is lost."""
    lengths = np.random.default_rng(0).integers(1, 90, 157)
    found = chunks(lengths, budget)
    order = sorted(range(157), key=lambda i: (-lengths[i], i))
    assert np.concatenate(found).tolist() == order
    wanted: list[list[int]] = []
    room = 0
    for i in order:
        if not wanted or lengths[i] > room:
            wanted.append([])
            room = budget
        wanted[-1].append(i)
        room -= lengths[i]
    assert [c.tolist() for c in found] == wanted


def test_no_texts_make_no_chunks():
    assert chunks(np.array([], np.int64), 10) == []
    with pytest.raises(ValueError, match="chunk_tokens must be > 0, got 0"):
        chunks(np.array([3]), 0)


# -- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "query_relatives", "limit_ms"),
    [(64, False, 2), (4096, False, 60), (16_384, False, 250), (16_384, True, 300)],
)
def test_a_batch_costs_little_beside_a_step(tmp_path, batch_size, query_relatives, limit_ms):
    """64 pairs train in about 100 ms on two cores. CPU time, fastest of a few: cores are shared."""
    rng = np.random.default_rng(0)
    num, per = 50_000, 4
    lengths = rng.integers(20, 256, num)
    np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    (tmp_path / "tokens.bin").write_bytes(bytes(2 * int(lengths.sum())))
    texts = TokenStore(tmp_path, dtype="<u2", num_prompt_tokens=0)
    hashes = rng.integers(0, 2**62, 2 * num)
    store = TrainStore(
        [
            TrainSet(
                name="",
                queries=texts,
                passages=texts,
                query_E=np.arange(num),
                positives=Ragged(np.arange(num + 1), rng.integers(0, num, num)),
                negatives=Ragged(np.arange(num + 1) * per, rng.integers(0, num, num * per)),
                query_hash=hashes[:num],
                passage_hash=hashes[num:],
                labels=[str(i) for i in range(num)],
            )
        ]
    )
    source = Batches(
        store, batch_size=batch_size, seed=0, max_negatives=1, query_relatives=query_relatives
    )
    spent = []
    for step in range(12):
        began = time.process_time()
        source.batch_at(step % (num // batch_size))  # full batches alone
        spent.append(1e3 * (time.process_time() - began))
    assert min(spent) < limit_ms, spent
