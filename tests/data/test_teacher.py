"""A guide's embeddings of the training texts: the right ones, made once, never stale."""

import gc
import json
import logging
import os
import shutil
import threading
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.schema import DataConfig, ModelConfig, SourceConfig
from data import teacher
from data.batches import Batches
from data.datasets import Data, open_data
from data.teacher import model_digest, open_guide
from evals.encode import encode
from models.build import build_model
from models.export import export
from models.pretrained import load_towers

ROWS = [
    {
        "query": f"ask {i} ?",
        "positive": f"answer {i // 2}",
        "negatives": [f"no {i} {'x' * (i % 9)}"],
    }
    for i in range(40)
]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def guide(tiny_base, tmp_path) -> Path:
    """A folder with prompts, lengths and pooling that the trained model does not have."""
    c = ModelConfig(
        base=str(tiny_base),
        pooling="cls",
        query_prompt="find: ",
        passage_prompt="text> ",
        max_query_length=12,
        max_passage_length=10,
    )
    torch.manual_seed(1)
    towers = build_model(c)
    for p in towers.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    export(towers, tmp_path / "guide", {})
    return tmp_path / "guide"


@pytest.fixture
def open_texts(tiny_base, tmp_path):
    """Opens data with the prompts of a trained model."""
    towers = build_model(ModelConfig(base=str(tiny_base), query_prompt="q: ", passage_prompt="p: "))

    def open_them(rows: list[dict] | None = None, *, seed: int = 0, **settings) -> Data:
        if "sets" not in settings:
            settings["root"] = str(write_rows(tmp_path / "rows.jsonl", rows or ROWS))
        c = DataConfig(
            **settings, dev_fraction=0.0, test_fraction=0.0, cache_dir=str(tmp_path / "cache")
        )
        tokenizers = towers.tokenizer_query, towers.tokenizer_passage
        return open_data(c, towers.spec, *tokenizers, seed=seed)

    return open_them


@pytest.fixture
def open_one(guide, tmp_path):
    def open_it(data: Data, *, model: Path = guide, precision: str = "fp32"):
        return open_guide(
            str(model), data, cache_dir=tmp_path / "cache", device="cpu", precision=precision
        )

    return open_it


@pytest.fixture
def encoded(monkeypatch) -> list[list[str]]:
    """The texts of each call that encodes, in order."""
    calls: list[list[str]] = []

    def counted(towers, texts, side, **options):
        calls.append(list(texts))
        return encode(towers, texts, side, **options)

    monkeypatch.setattr(teacher, "encode", counted)
    return calls


def texts_of(data: Data) -> dict[str, list[str]]:
    """Texts by number in the TrainStore."""
    return {
        "query": [t for s in data.train.sets for t in s.query_texts],
        "passage": [t for s in data.train.sets for t in s.passage_texts],
    }


def assert_equals_encoding_one_by_one(found, data: Data, model: Path, *, steps: int = 3) -> None:
    """Each row against the model folder opened anew and one text at a time."""
    towers = load_towers(model)
    texts = texts_of(data)
    batches = Batches(data.train, batch_size=16, seed=0)
    for step in range(steps):
        batch = batches.batch_at(step)
        pairs = zip(
            found.lookup(batch),
            ("query", "passage"),
            (batch.query_numbers_A, batch.passage_numbers_N),
            strict=True,
        )
        for rows_nE, side, numbers in pairs:
            assert rows_nE.dtype == np.float32 and rows_nE.shape == (len(numbers), found.width)
            wanted = [encode(towers, [texts[side][n]], side, precision="fp32") for n in numbers]
            # unit vectors; sums run in another order in a chunk of several texts
            np.testing.assert_allclose(rows_nE, np.concatenate(wanted), rtol=0, atol=2e-6)


# -- the right embeddings -------------------------------------------------------------------------


def test_rows_are_the_guides_own_encoding_of_each_text(guide, open_texts, open_one, monkeypatch):
    """In blocks of 7, so that a block put in the wrong place or left out shows."""
    monkeypatch.setattr(teacher, "BLOCK_TEXTS", 7)
    data = open_texts()
    found = open_one(data)
    assert found.width == 16
    assert_equals_encoding_one_by_one(found, data, guide)


def test_prompts_lengths_and_pooling_are_the_guides(guide, open_texts, open_one):
    """Through the trained model's settings the same weights give other vectors."""
    data = open_texts()
    batch = Batches(data.train, batch_size=8, seed=0).batch_at(0)
    query_AE, passage_NE = open_one(data).lookup(batch)
    texts = texts_of(data)
    towers = load_towers(guide)
    assert (towers.spec.query_prompt, towers.spec.max_query_length) == ("find: ", 12)
    for side, found, numbers in (
        ("query", query_AE, batch.query_numbers_A),
        ("passage", passage_NE, batch.passage_numbers_N),
    ):
        some = [texts[side][n] for n in numbers]
        own = encode(towers, some, side, precision="fp32")
        students = encode(towers, some, side, precision="fp32", prompt=f"{side[0]}: ")
        assert np.abs(found - own).max() < 2e-6
        assert np.abs(found - students).max() > 1e-2
    assert np.abs(query_AE[0] - passage_NE[0]).max() > 1e-2


def test_several_data_sets_and_their_twins(guide, open_texts, open_one, encoded, tmp_path):
    """A text that is in two sets is encoded once, in the first, where batches look for it; the
    prompts that a set has of its own are the trained model's affair."""
    more = [
        *ROWS[:5],
        {"query": "another", "positive": "answer 3"},
        {"query": ROWS[7]["query"], "positive": "elsewhere"},
    ]
    roots = [
        str(write_rows(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("one", ROWS), ("two", more), ("three", ROWS[:3]))
    ]
    sets = {
        "one": SourceConfig(root=roots[0]),
        "two": SourceConfig(root=roots[1]),
        "three": SourceConfig(root=roots[2], query_prompt="other: "),
    }
    data = open_texts(sets=sets)
    found = open_one(data)
    assert_equals_encoding_one_by_one(found, data, guide, steps=4)
    # set two adds "another" and "elsewhere"; set three has queries under another prompt of the
    # trained model, which are other texts to it, and no passages of its own
    once = [t for some in texts_of(open_texts()).values() for t in some]
    again = [r["query"] for r in ROWS[:3]]
    seen = [t for call in encoded for t in call]
    assert sorted(seen) == sorted([*once, "another", "elsewhere", *again])


def test_examples_that_are_not_kept_are_not_encoded(guide, open_texts, open_one, encoded):
    """data.max_examples of a large set: a guide pays for what is trained on."""
    for seed in (0, 1):  # another choice, another file
        encoded.clear()
        data = open_texts(max_examples=6, seed=seed)
        found = open_one(data)
        assert_equals_encoding_one_by_one(found, data, guide, steps=1)
        assert sum(map(len, encoded)) == sum(map(len, data.train.texts_used())) < 20
    data = open_texts()
    assert_equals_encoding_one_by_one(open_one(data), data, guide)


def test_the_same_texts_on_both_sides_have_embeddings_of_both(guide, open_texts, open_one):
    """Sentence pairs: the lists are equal, the guide's prompts are not."""
    data = open_texts([{"query": f"line {i}", "positive": f"line {i}"} for i in range(20)])
    assert data.train.sets[0].query_digest == data.train.sets[0].passage_digest
    assert_equals_encoding_one_by_one(open_one(data), data, guide, steps=1)


def test_float16_above_a_size_keeps_unit_vectors(open_texts, open_one, monkeypatch, tmp_path):
    """Thresholds of a guide are differences of cosines: rounding may not shorten a vector."""
    data = open_texts()
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    exact = open_one(data).lookup(batch)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(teacher, "FLOAT32_BYTES", 100)
    rounded = open_one(open_texts()).lookup(batch)
    for x, y in zip(exact, rounded, strict=True):
        assert y.dtype == np.float32 and not np.array_equal(x, y)
        np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(y, x, rtol=0, atol=2**-11)  # half a step of float16 below 1


def test_a_guide_that_does_not_normalise_gives_unit_vectors(tiny_base, open_texts, open_one):
    """Dot-product models: thresholds and teachers compare cosines."""
    folder = tiny_base.parent / "dot"
    towers = build_model(ModelConfig(base=str(tiny_base), normalize=False))
    export(towers, folder, {})
    assert not load_towers(folder).spec.normalize
    data = open_texts()
    found = open_one(data, model=folder)
    for rows in found.lookup(Batches(data.train, batch_size=9, seed=0).batch_at(0)):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


# -- once, and never stale ------------------------------------------------------------------------


def test_a_second_open_reads_without_a_model(open_texts, open_one, encoded, monkeypatch):
    data = open_texts()
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    first = open_one(data).lookup(batch)
    assert encoded
    encoded.clear()
    monkeypatch.setattr(teacher, "load_towers", lambda *_: pytest.fail("loaded the guide"))
    again = open_one(open_texts())
    assert again.width == 16 and not encoded
    for x, y in zip(first, again.lookup(batch), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_model_trained_anew_in_the_same_folder_is_not_answered_with_the_old(
    guide, open_texts, open_one
):
    """Same path, same size, same times: sentence-transformers' mining cache reused the old ones."""
    data = open_texts()
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    before = open_one(data).lookup(batch)
    path = guide / "model.safetensors"
    times = path.stat()
    weights = load_file(path)
    key = next(k for k in weights if k.endswith("layer.1.output.dense.weight"))
    weights[key] = weights[key] * 1.5
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    found = open_one(data)
    assert_equals_encoding_one_by_one(found, data, guide)
    assert np.abs(found.lookup(batch)[0] - before[0]).max() > 1e-3


def swap_two_letters(settings: dict) -> None:
    vocab = settings["model"]["vocab"]
    vocab["a"], vocab["o"] = vocab["o"], vocab["a"]


CHANGES = {
    "config_sentence_transformers.json": lambda c: c["prompts"].update(query="seek: "),
    "1_Pooling/config.json": lambda c: c.update(
        pooling_mode_cls_token=False, pooling_mode_mean_tokens=True
    ),
    "sentence_bert_config.json": lambda c: c.update(query_length=9),
    "config.json": lambda c: c.update(layer_norm_eps=0.1),
    "tokenizer.json": swap_two_letters,
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_are_in_the_key_too(guide, open_texts, open_one, name):
    """Prompts, pooling, lengths, tokenizer: another guide, though not a weight has changed."""
    data = open_texts()
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    before = open_one(data).lookup(batch)
    settings = json.loads((guide / name).read_text())
    CHANGES[name](settings)
    (guide / name).write_text(json.dumps(settings))
    found = open_one(data)
    assert_equals_encoding_one_by_one(found, data, guide, steps=1)
    assert np.abs(found.lookup(batch)[0] - before[0]).max() > 1e-3


def test_the_key_is_the_content_not_the_place(guide, tmp_path):
    """A copied folder and a model card written anew are the same model."""
    before = model_digest(guide)
    shutil.copytree(guide, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("Trained on Tuesday.")
    (tmp_path / "elsewhere" / ".note").write_text("x")
    (tmp_path / "elsewhere" / "checkpoint-5").mkdir()
    (tmp_path / "elsewhere" / "checkpoint-5" / "model.safetensors").write_bytes(b"other")
    assert model_digest(tmp_path / "elsewhere") == before


def test_a_module_without_files_may_lack_its_folder(guide, open_texts, open_one):
    """Normalize has no files, and git keeps no empty folders."""
    shutil.rmtree(guide / "2_Normalize")
    data = open_texts()
    assert_equals_encoding_one_by_one(open_one(data), data, guide, steps=1)


def test_both_towers_are_in_the_key(tiny_base, tmp_path):
    """A Router keeps its weights in folders of their own."""
    towers = build_model(ModelConfig(base=str(tiny_base), towers="dual"))
    export(towers, tmp_path / "dual", {})
    digests = {model_digest(tmp_path / "dual")}
    for route in ("query", "document"):
        path = tmp_path / "dual" / f"{route}_0_Transformer" / "model.safetensors"
        weights = load_file(path)
        key = next(k for k in weights if k.endswith("output.dense.weight"))
        save_file(weights | {key: weights[key] + 1}, path, metadata={"format": "pt"})
        digests.add(model_digest(tmp_path / "dual"))
    assert len(digests) == 3


def test_a_folder_that_changes_while_it_is_read_is_refused(
    guide, open_texts, open_one, monkeypatch
):
    """Else the new weights would be kept under the name of the old."""

    def load_while_training(folder):
        towers = load_towers(folder)
        (guide / "config_sentence_transformers.json").write_text("{}")
        return towers

    data = open_texts()
    monkeypatch.setattr(teacher, "load_towers", load_while_training)
    with pytest.raises(ValueError, match="changed while it was read"):
        open_one(data)


def test_other_texts_and_another_precision_are_encoded_anew(open_texts, open_one, encoded):
    """A text more on one side leaves the other side's file in use."""
    open_one(open_texts())
    encoded.clear()
    open_one(open_texts([*ROWS, {"query": ROWS[0]["query"], "positive": "more"}]))
    assert [len(call) for call in encoded] == [61], "20 answers, 40 negatives, and one"
    encoded.clear()
    open_one(open_texts(), precision="bf16")
    assert len(encoded) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda f: flip(f / "embeddings.npy"),
    "a cut file": lambda f: os.truncate(f / "embeddings.npy", 500),
    "a missing file": lambda f: (f / "embeddings.npy").unlink(),
    "a cut meta.json": lambda f: os.truncate(f / "meta.json", 40),
    "a missing meta.json": lambda f: (f / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(open_texts, open_one, encoded, damage, tmp_path, caplog):
    """Half-written embeddings would mask true negatives without a word."""
    data = open_texts()
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    first = [x.copy() for x in open_one(data).lookup(batch)]
    encoded.clear()
    folder = next(
        p for p in (tmp_path / "cache").glob("guide-*") if p.is_dir() and is_of_queries(p)
    )
    DAMAGE[damage](folder)
    again = open_one(data).lookup(batch)
    assert "is damaged" in caplog.text and len(encoded) == 1
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert {p.suffix or p.name[:5] for p in (tmp_path / "cache").glob("guide-*")} == {
        "guide",
        ".lock",
    }


def is_of_queries(folder: Path) -> bool:
    return json.loads((folder / "meta.json").read_text())["info"]["side"] == "query"


def test_two_that_start_together_encode_once(open_texts, open_one, encoded):
    """Ranks of one run: flock is between open files, so threads stand for processes."""
    data = open_texts()
    found: list = [None, None]
    started = threading.Barrier(2)

    def work(i: int) -> None:
        started.wait()
        found[i] = open_one(data)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(encoded) == 2, "queries once, passages once"
    batch = Batches(data.train, batch_size=16, seed=0).batch_at(0)
    for x, y in zip(found[0].lookup(batch), found[1].lookup(batch), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_guide_is_freed(open_texts, open_one, monkeypatch):
    """It may be larger than what is trained, on the same card."""
    alive = []

    def load(folder):
        towers = load_towers(folder)
        alive.append(weakref.ref(towers))
        return towers

    monkeypatch.setattr(teacher, "load_towers", load)
    gc.disable()  # no cycle may keep it until a collection
    try:
        found = open_one(open_texts())
    finally:
        gc.enable()
    assert [r() for r in alive] == [None]
    assert found.width == 16


# -- what a user is told --------------------------------------------------------------------------


def test_a_guide_that_is_not_there_is_named(open_texts, open_one, tmp_path):
    with pytest.raises(ValueError, match=r"guide model .*nothing.*loss\.guide.*no such folder"):
        open_one(open_texts(), model=tmp_path / "nothing")


def test_a_disk_too_small_is_said_before_encoding(open_texts, open_one, encoded, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(ValueError, match=r"data\.cache_dir, where 0\.0 GB are free"):
        open_one(open_texts())
    assert not encoded


def test_an_embedding_that_is_not_finite_names_the_text(guide, open_texts, open_one, caplog):
    """nan compares as False: no threshold would mask anything, and the KL would be nan."""
    path = guide / "model.safetensors"
    weights = load_file(path)
    key = next(k for k in weights if k.endswith("embeddings.LayerNorm.bias"))
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, path, metadata={"format": "pt"})
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match=r"'ask 0 \?' is not finite"),
    ):
        open_one(open_texts())
    assert "building the guide's embeddings of 40 queries" in caplog.text
