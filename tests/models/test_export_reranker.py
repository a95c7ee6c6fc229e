"""An exported cross-encoder scores the same: in sentence-transformers, in transformers, and read
back by us."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, TEXTS, save_model, save_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

from conf.schema import ModelConfig
from data.pairs import PairTemplate, pack_pairs, tokenise_plain
from models.build import build_model, build_reranker
from models.export import export
from models.export_reranker import export_reranker, reranker_card
from models.reranker import Reranker, is_reranker, load_reranker

ATOL = 1e-5  # of the issue; fp32 sums in another order, measured below 5e-6 on logits of size 1
LONG = TEXTS[3]  # 45 tokens: as a query it is cut, in sentence-transformers further than here
PAIRS = [(q, p) for q in TEXTS for p in TEXTS if q != LONG]
HEAD = "ForSequenceClassification"


def logits_of(reranker: Reranker, pairs=PAIRS) -> np.ndarray:
    """Raw logits (S, L), prompts put before the texts."""
    spec, template = reranker.spec, PairTemplate.of(reranker.tokenizer)
    queries = tokenise_plain(reranker.tokenizer, [q for q, _ in pairs], spec.query_prompt)
    passages = tokenise_plain(reranker.tokenizer, [p for _, p in pairs], spec.passage_prompt)
    joined = [template.join(q, p, spec.max_length) for q, p in zip(queries, passages, strict=True)]
    with torch.no_grad():
        return reranker.eval()(pack_pairs(joined)).numpy()


def shake(reranker: Reranker) -> Reranker:
    """Move every parameter, as training would: an export of the base's own weights must show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in reranker.named_parameters():
            size = 0.2 if name.startswith("head.") else 0.05
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return reranker


def assert_same_everywhere(reranker: Reranker, folder: Path) -> None:
    """In CrossEncoder, in transformers where it has the head, and in load_reranker."""
    from sentence_transformers import CrossEncoder

    spec = reranker.spec
    want_SL = logits_of(reranker) / spec.temperature + spec.bias
    assert want_SL.std() > 0.05  # pairs differ, so equality means something
    model = CrossEncoder(str(folder), device="cpu")
    assert isinstance(model.activation_fn, torch.nn.Identity)
    pairs = [(q, spec.passage_prompt + p) for q, p in PAIRS]  # CrossEncoder has no prompt for them
    got = model.predict(pairs).reshape(want_SL.shape)
    np.testing.assert_allclose(got, want_SL, rtol=0, atol=ATOL)
    if spec.head != "linear":
        pairs = [(spec.query_prompt + q, p) for q, p in pairs]
        np.testing.assert_allclose(in_transformers(folder, pairs), want_SL, rtol=0, atol=ATOL)
    back = load_reranker(folder)
    assert is_reranker(folder)
    nothing = {"temperature": 1.0, "bias": 0.0}
    base = f"{spec.base}, tuned as {folder.name}"
    assert vars(back.spec) == vars(spec) | {"base": base} | nothing
    np.testing.assert_allclose(logits_of(back), want_SL, rtol=0, atol=ATOL)
    if (spec.temperature, spec.bias) == (1, 0):
        ours, theirs = reranker.state_dict(), back.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def in_transformers(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (
        type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    inputs = tokenizer(
        [q for q, _ in pairs], [p for _, p in pairs], padding=True, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


VARIANTS = {
    "cls": {"pooling": "cls"},
    "mean": {"pooling": "mean"},
    "cls, 3 labels": {"pooling": "cls", "num_labels": 3},
    "mean, 3 labels": {"pooling": "mean", "num_labels": 3},
    "cls, prompts": {"query_prompt": "query : ", "passage_prompt": "passage : "},
    "mean, prompts": {"pooling": "mean", "query_prompt": "query : "},
    "the first layers": {"num_layers": 2},
    "short pairs": {"max_pair_length": 32},
    "mean, short pairs": {"pooling": "mean", "max_pair_length": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_the_same_scores_and_reads_back(variant, tmp_path):
    """Every setting travels in another file of the folder; one lost changes scores."""
    base = save_model(tmp_path / "base", "bert")
    reranker = shake(build_reranker(ModelConfig(base=str(base), **VARIANTS[variant])))
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_exports_from_a_base_without_a_head(kind, pooling, tmp_path):
    """Key names, prefixes and the class are other ones in each; its tokenizer may have been for
    single texts."""
    base = save_model(tmp_path / "base", kind, head="ForMaskedLM")
    reranker = shake(build_reranker(ModelConfig(base=str(base), pooling=pooling)))
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


def test_a_fresh_modernbert_head_on_cls_says_so_over_the_bases_own_setting(tmp_path):
    """ModernBERT-base's config.json says classifier_pooling mean, though it has no classifier."""
    settings = {"classifier_pooling": "mean"}
    base = save_model(tmp_path / "base", "modernbert", settings=settings)
    reranker = shake(build_reranker(ModelConfig(base=str(base), pooling="cls")))
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_cross_encoder_of_transformers_exports_into_its_own_class(kind, tmp_path):
    """Labels, biases and pooling of the head are settings of the source's config.json."""
    settings = {"num_labels": 3, "id2label": {0: "no", 1: "part", 2: "yes"}}
    if kind == "modernbert":
        settings |= {"classifier_pooling": "mean", "classifier_bias": True}
    base = save_model(tmp_path / "base", kind, head=HEAD, settings=settings)
    reranker = shake(build_reranker(ModelConfig(base=str(base), num_labels=3)))
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "part", "2": "yes"}
    assert config["label2id"] == {"no": 0, "part": 1, "yes": 2}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_calibration_is_in_the_last_layer_so_that_a_sigmoid_is_a_probability(pooling, tmp_path):
    """Left in a setting that no other library reads, probabilities would be off everywhere."""
    from sentence_transformers import CrossEncoder

    base = save_model(tmp_path / "base", "xlm-roberta")
    reranker = shake(build_reranker(ModelConfig(base=str(base), pooling=pooling)))
    before = {k: t.clone() for k, t in reranker.state_dict().items()}
    reranker.spec.temperature, reranker.spec.bias = 2.5, -0.75
    export_reranker(reranker, tmp_path / "out", {})
    assert all(torch.equal(t, before[k]) for k, t in reranker.state_dict().items())
    assert_same_everywhere(reranker, tmp_path / "out")
    model = CrossEncoder(str(tmp_path / "out"), device="cpu")
    got = model.predict(PAIRS, activation_fn=torch.nn.Sigmoid())
    want = reranker.probability(torch.from_numpy(logits_of(reranker)))[:, 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        reranker.spec.probability(logits_of(reranker)[:, 0]), want, atol=ATOL
    )


def test_a_last_layer_without_a_bias_gets_one_from_the_calibration(tmp_path):
    base = save_model(tmp_path / "base", "xlm-roberta")
    reranker = shake(build_reranker(ModelConfig(base=str(base), pooling="mean")))
    reranker.head.out.register_parameter("bias", None)
    reranker.spec.temperature, reranker.spec.bias = 2.5, -0.75
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


def test_any_architecture_exports_as_transformer_pooling_dense(tmp_path):
    """DistilBERT has no token types and is not of our layouts."""
    import transformers

    base = tmp_path / "base"
    vocab_size = save_tokenizer(base)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=vocab_size, dim=24, n_layers=2, n_heads=4, hidden_dim=40, pad_token_id=0,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.DistilBertModel(config).save_pretrained(base)
    reranker = shake(build_reranker(ModelConfig(base=str(base), pooling="mean", num_labels=2)))
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


# ---- folders that sentence-transformers wrote ----------------------------------------------------


def pooled_cross_encoder(base: Path, folder: Path, **dense):
    """CrossEncoder of Transformer + Pooling + Dense, built and saved by sentence-transformers."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(3)
    options = {"activation_function": torch.nn.Identity(), "module_output_name": "scores"} | dense
    modules = [Transformer(str(base)), Pooling(24, "mean"), Dense(24, 2, **options)]
    model = CrossEncoder(modules=modules, device="cpu", prompts={"q": "query : "})
    model.default_prompt_name = "q"
    model.save_pretrained(str(folder))
    return model


def test_cross_encoders_that_sentence_transformers_saved_score_the_same_here(tmp_path):
    """Its own files have other keys than ours: modality_config, pooling_mode, full class paths."""
    from sentence_transformers import CrossEncoder

    base = save_model(tmp_path / "base", "bert")
    pooled = pooled_cross_encoder(base, tmp_path / "pooled")
    classifier = save_model(tmp_path / "c", "mpnet", head=HEAD, settings={"num_labels": 1})
    model = CrossEncoder(str(classifier), device="cpu")
    model.save_pretrained(str(tmp_path / "classifier"))
    identity = torch.nn.Identity()
    for theirs, folder in ((pooled, "pooled"), (model, "classifier")):
        reranker = load_reranker(tmp_path / folder)
        want_SL = theirs.predict(PAIRS, activation_fn=identity).reshape(-1, reranker.width)
        np.testing.assert_allclose(logits_of(reranker), want_SL, rtol=0, atol=ATOL)
    assert load_reranker(tmp_path / "pooled").spec.query_prompt == "query : "


def test_a_pooled_head_that_cannot_be_read_right_is_refused(tmp_path):
    """An activation would be lost; a Dense of other weights would be half filled."""
    base = save_model(tmp_path / "base", "bert")
    pooled_cross_encoder(base, tmp_path / "tanh", activation_function=torch.nn.Tanh())
    with pytest.raises(ValueError, match="Dense with activation tanh; want Identity"):
        load_reranker(tmp_path / "tanh")
    reranker = build_reranker(ModelConfig(base=str(base), pooling="mean"))
    export_reranker(reranker, tmp_path / "out", {})
    path = tmp_path / "out" / "2_Dense" / "model.safetensors"
    stored = load_file(path)
    for tensors in (
        {"linear.weight": stored["linear.weight"]},
        stored | {"extra": torch.zeros(1)},
        stored | {"linear.weight": torch.zeros(2, 24)},
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match="Dense weights are"):
            load_reranker(tmp_path / "out")


# ---- into and out of other folders ---------------------------------------------------------------


def test_a_run_directory_is_a_base_and_training_goes_on_from_its_export(tmp_path):
    """task=rerank on a finished run; dropout and freezing must not need the first base."""
    base = save_model(tmp_path / "base", "mpnet")
    reranker = shake(build_reranker(ModelConfig(base=str(base))))
    export_reranker(reranker, tmp_path / "run" / "export", {})
    (tmp_path / "run" / "config.yaml").write_text("")
    assert is_reranker(tmp_path / "run")
    again = build_reranker(ModelConfig(base=str(tmp_path / "run"), freeze=["layers:1"]))
    np.testing.assert_array_equal(logits_of(again), logits_of(reranker))


def test_an_export_of_a_retrievers_export_has_types_again(tmp_path):
    """A retriever's folder tells transformers to leave types out; pairs of a BERT need them."""
    base = save_model(tmp_path / "base", "bert")
    export(build_model(ModelConfig(base=str(base))), tmp_path / "retriever", {})
    reranker = shake(build_reranker(ModelConfig(base=str(tmp_path / "retriever"))))
    assert any(PairTemplate.of(reranker.tokenizer).types)
    export_reranker(reranker, tmp_path / "out", {})
    assert_same_everywhere(reranker, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_real_minilm_exports_with_the_scores_of_the_trained_model(pooling, tmp_path):
    """A tokenizer of 30,522 pieces, accents and markup, whatever BertTokenizer would make of it."""
    from sentence_transformers import CrossEncoder

    try:
        reranker = build_reranker(ModelConfig(base="all-MiniLM-L6-v2", pooling=pooling))
    except ValueError as error:
        pytest.skip(f"its package is not installed: {error}")
    torch.nn.init.normal_(reranker.head.out.weight, std=0.5)
    export_reranker(reranker, tmp_path / "out", {})
    texts = ["Hello, World! ", "naive cafe\u0301 \u4e2d\u6587 [SEP] x", "read a file " * 200]
    pairs = [(q, p) for q in texts[:2] for p in texts]
    got = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs)
    np.testing.assert_allclose(got, logits_of(reranker, pairs)[:, 0], rtol=0, atol=ATOL)


# ---- model card ----------------------------------------------------------------------------------


def test_model_card_header_is_yaml_and_the_table_holds_the_results(tmp_path):
    """The hub rejects a bad header; numbers without intervals are not results."""
    import yaml

    base = save_model(tmp_path / "base", "bert")
    c = ModelConfig(base=str(base), pooling="mean", passage_prompt="passage : ")
    reranker = build_reranker(c)
    reranker.spec.temperature, reranker.spec.bias = 1.5, -2.25
    result = {
        "metrics": {
            "random": {"mrr": 0.285, "map": 0.28, "ndcg@10": 0.45},
            "bm25": {"mrr": 0.734},
            "base": {"mrr": 0.3, "map": 0.29, "ndcg@10": 0.5},
            "tuned": {"mrr": 0.9, "map": 0.89, "ndcg@10": 0.95},
        },
        "delta_of": {"bm25": {"mrr": {"diff": 0.166, "ci95": [0.1, 0.2], "p": 1e-4, "n": 702}}},
        "calibration": {
            "ece_before": 0.25,
            "ece_after": 0.0125,
            "pairs": 900,
            "temperature": 1.5,
            "bias": -2.25,
        },
    }
    card = {
        "name": "rerank: one", "data": "6,000 groups | of questions", "result": result,
        "settings": {"learning rate": 1e-4}, "limits": ["Arabic alone."], "language": ["ar"],
    }  # fmt: skip
    text = reranker_card(reranker, card, name="export")
    _, header, body = text.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["pipeline_tag"] == "text-ranking"
    assert values["metrics"] == ["mrr", "map", "ndcg@10"]
    assert values["language"] == ["ar"]
    for part in (
        "# rerank: one",
        "| learning rate | 0.0001 |",
        "| calibration | logit / 1.5 -2.25, in the last layer; expected calibration error of the"
        " sigmoid on 900 dev pairs 0.250 before, 0.013 after |",
        "| system | mrr | map | ndcg@10 |\n|---|---|---|---|\n",
        "| bm25 | 0.7340 |  |  |",
        "| tuned | 0.9000 | 0.8900 | 0.9500 |",
        "| bm25 | mrr | +0.1660 [+0.1000, +0.2000] | 0.0001 | 702 |",
        'CrossEncoder("export")',
        '"passage : Open it',
        "no class of transformers has that head",
        "- Arabic alone.",
    ):
        assert part in body, part
    assert "AutoModelForSequenceClassification" not in body
    plain = reranker_card(build_reranker(ModelConfig(base=str(base), pooling="cls")), {})
    assert "AutoModelForSequenceClassification" in plain
    assert "| calibration | none: the sigmoid of a score is no probability |" in plain


def test_a_query_that_cross_encoder_cuts_further_is_the_only_difference_and_the_card_says_so(
    tmp_path, caplog
):
    """Its truncation takes from the longer text; only_second would end in an exception there."""
    from sentence_transformers import CrossEncoder

    base = save_model(tmp_path / "base", "bert")
    reranker = shake(build_reranker(ModelConfig(base=str(base))))
    export_reranker(reranker, tmp_path / "out", {})
    pairs = [(LONG, LONG), (LONG, TEXTS[0]), (TEXTS[0], LONG)]
    with caplog.at_level(logging.WARNING):
        want = logits_of(reranker, pairs)[:, 0]
    assert "is cut to" in caplog.text
    got = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs)
    assert abs(got[0] - want[0]) > ATOL
    np.testing.assert_allclose(got[1:], want[1:], rtol=0, atol=ATOL)
    assert "cuts a query that fills more than half" in (tmp_path / "out/README.md").read_text()
