"""Negatives mined anew during training: by the weights of that step, and again the same after a
stop."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.schema import DataConfig, MineConfig, ModelConfig, OptimConfig, SourceConfig, TrainConfig
from data import refresh
from data.batches import TrainStore
from data.datasets import open_data
from data.refresh import Refreshed, mine_store, pool_of, with_negatives
from evals.encode import encode
from models.build import build_model
from runtime.distributed import SINGLE

MINE = MineConfig(fraction=None, near_duplicate=None, num_negatives=4)


@pytest.fixture
def opened(tiny_base, tmp_path):
    """(towers, data of two sets with own negatives and a query with two answers, settings)."""
    sets = {}
    for name, letters in (("one", "abcdefghijkl"), ("two", "stuvwx")):
        rows = [
            {"query": f"ask {c} {name}", "pos": f"{c}{c} answer {name}", "neg": [f"no {c}", "no"]}
            for c in letters
        ]
        rows.append({"query": f"ask {letters[0]} {name}", "pos": f"{letters[1]}! {name}"})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets[name] = {"root": str(path)}
    torch.manual_seed(0)
    towers = build_model(ModelConfig(base=str(tiny_base), query_prompt="q: ", dropout=0.0))
    for p in towers.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    data = DataConfig(
        sets={k: SourceConfig(**v) for k, v in sets.items()}, dev_fraction=0.0, test_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    c = TrainConfig(
        model=ModelConfig(base=str(tiny_base)), data=data, optim=OptimConfig(batch_size=5)
    )
    tokenizers = towers.tokenizer_query, towers.tokenizer_passage
    return towers, open_data(data, towers.spec, *tokenizers).train, c


def by_text(store, negatives) -> list[list[str]]:
    """Texts of the negatives of every example of every set."""
    return [
        [one.passage_texts[int(n)] for n in some.take(np.array([e]))[0]]
        for one, some in zip(store.sets, negatives, strict=True)
        for e in range(len(one.query_E))
    ]


def test_mined_by_the_towers_among_the_sets_own_passages(opened):
    """Against plain loops over cosines; a passage of the other set, or an answer that stands in
    another row of the query, is no negative."""
    towers, store, _ = opened
    c = MineConfig(fraction=None, near_duplicate=None, num_negatives=4, keep_own=False)
    found = by_text(store, mine_store(store, towers, c, seed=0, precision="fp32"))
    expected = []
    for one in store.sets:
        pool, query_E = pool_of(one)
        q_QD = encode(towers, pool.queries.texts, "query", precision="fp32").astype(np.float64)
        p_ND = encode(towers, pool.docs.texts, "passage", precision="fp32").astype(np.float64)
        for q in query_E.tolist():
            order = np.argsort(-(p_ND @ q_QD[q]))
            texts = [pool.docs.texts[d] for d in order if d not in pool.positives[q] + pool.own[q]]
            expected.append(texts[:4])
    assert found == expected and len(found) == 13 + 7
    assert found[0] == found[12]  # one query, two rows
    kept = by_text(store, mine_store(store, towers, MINE, seed=0, precision="fp32"))
    own = by_text(store, [one.negatives for one in store.sets])
    assert kept[1] == own[1] + found[1]


def test_batches_hold_the_new_negatives_from_the_step_on(opened, tmp_path):
    """Mined once every so many steps, with the weights of that moment."""
    towers, store, c = opened
    first = store.batches(c, 12)
    batches = Refreshed(
        first, every=4, towers=towers, c=c, mine=MINE, folder=tmp_path / "mined", ranks=SINGLE
    )
    assert batches.num_examples_until(7) == first.num_examples_until(7)
    seen = []
    for step in range(12):
        batch = batches.batch_at(step)
        plain = first.batch_at(step)
        assert batch.example_ids[:] == plain.example_ids[:]
        seen.append(batch.num_passages_global - plain.num_passages_global)
        with torch.no_grad():
            for p in towers.parameters():
                p.add_(0.05 * torch.randn_like(p))
    assert seen[:4] == [0] * 4 and min(seen[4:]) >= 0 and sum(seen[4:]) > 20
    files = sorted((tmp_path / "mined").iterdir())
    assert [f.name for f in files] == ["step_00000004.npy", "step_00000008.npy"]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_resumed_run_reads_what_was_mined(opened, tmp_path, monkeypatch):
    """Its weights are those of a later step: mining again would give other negatives."""
    towers, store, c = opened
    options = {"every": 4, "c": c, "mine": MINE, "folder": tmp_path / "mined", "ranks": SINGLE}
    whole = Refreshed(store.batches(c, 12), towers=towers, **options)
    before = [whole.batch_at(step) for step in range(7)]
    monkeypatch.setattr(refresh, "mine_store", None)  # must not be called
    resumed = Refreshed(store.batches(c, 12), towers=towers, **options)
    for step in (6, 4, 5):
        one, other = before[step], resumed.batch_at(step)
        for a, b in zip(one.passage_tokens, other.passage_tokens, strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(one.relatives_BK, other.relatives_BK)
    (tmp_path / "mined/step_00000004.npy").unlink()
    with pytest.raises(ValueError, match="negatives of step 4 are gone"):
        Refreshed(store.batches(c, 12), towers=towers, **options).batch_at(6)


@pytest.mark.parametrize("damage", ["cut", "empty", "value", "header"])
def test_a_damaged_file_of_negatives_is_never_read(opened, tmp_path, damage):
    """16 bytes cut from the end were read in silence: examples lost negatives. The step that mines
    still has the weights for it; a later one has not."""
    towers, store, c = opened
    options = {"every": 4, "towers": towers, "c": c, "mine": MINE, "folder": tmp_path / "mined"}
    batches = Refreshed(store.batches(c, 12), **options, ranks=SINGLE)
    batches.batch_at(4)
    path = tmp_path / "mined/step_00000004.npy"
    content = path.read_bytes()
    assert np.load(path).dtype == np.int64  # what its name says
    changed = bytearray(content)
    changed[{"value": -40, "header": 30}.get(damage, 0)] ^= 1
    path.write_bytes({"cut": content[:-16], "empty": b""}.get(damage, bytes(changed)))
    with pytest.raises(ValueError, match=r"step_00000004\.npy: the negatives are damaged.*anew"):
        Refreshed(store.batches(c, 12), **options, ranks=SINGLE).batch_at(5)
    Refreshed(store.batches(c, 12), **options, ranks=SINGLE).batch_at(4)
    assert path.read_bytes() == content


def test_a_file_of_negatives_of_other_data_is_never_read(opened, tmp_path):
    """Numbers of passages that the data do not have, or of other ones."""
    towers, store, c = opened
    options = {"every": 4, "towers": towers, "c": c, "mine": MINE, "folder": tmp_path / "mined"}
    Refreshed(store.batches(c, 12), **options, ranks=SINGLE).batch_at(4)
    whole = list(store.sets)
    few = replace(whole[1], passages=whole[1].queries)  # 6 of them
    for sets in (whole[::-1], whole[:1], [whole[0], few], [*whole, whole[0]]):
        store = TrainStore(sets)
        with pytest.raises(ValueError, match=r"npy: the negatives are of other data"):
            Refreshed(store.batches(c, 12), **options, ranks=SINGLE).batch_at(5)


def test_a_store_with_other_negatives_draws_the_same_examples(opened):
    """The plan of a run follows the number of examples alone."""
    towers, store, c = opened
    mined = mine_store(store, towers, MINE, seed=0)
    fresh = with_negatives(store, mined)
    assert fresh.num_steps(c.optim) == store.num_steps(c.optim)
    texts = by_text(fresh, [one.negatives for one in fresh.sets])
    assert texts == by_text(store, mined) != by_text(store, [s.negatives for s in store.sets])


@pytest.mark.parametrize("setting", [{"reranker": "x"}, {"sources": ["bm25"]}, {"corpus": "x"}])
def test_settings_that_only_prepare_reads_are_refused(setting):
    """Even the name of the run said that a reranker vetoed, and none did."""
    with pytest.raises(ValueError, match=rf"mine\.{next(iter(setting))} is not read by train\.py"):
        TrainConfig(mine=MineConfig(**setting), mine_every=5)


@pytest.mark.parametrize("setting", [{"margin": 0.1}, {"num_negatives": 9}, {"fraction": None}])
def test_settings_of_mining_without_mining_are_refused(setting):
    """With mine_every=0, the default, they changed the run's folder and nothing else."""
    message = rf"mine\.{next(iter(setting))} is not read without mine_every=<steps>"
    with pytest.raises(ValueError, match=message):
        TrainConfig(mine=MineConfig(**setting))
    assert TrainConfig(mine=MineConfig(**setting), mine_every=5).mine_every == 5


@pytest.mark.parametrize("every, is_said", [(12, True), (11, False)])
def test_a_run_that_ends_before_it_mines_says_so(opened, tmp_path, caplog, every, is_said):
    """mine_every counts steps, of which a small set has few."""
    towers, store, c = opened
    Refreshed(
        store.batches(c, 12), every=every, towers=towers, c=c, mine=MINE, folder=tmp_path,
        ranks=SINGLE,
    )  # fmt: skip
    said = "mine_every (12) is not below the number of steps (12): no negatives are mined"
    assert (said in caplog.text) == is_said
