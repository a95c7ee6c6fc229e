"""Cross-encoders: scores of transformers' classes, strict reading, fresh heads, settings."""

import json
import logging
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, TEXTS, save_model

os.environ["HF_HUB_OFFLINE"] = "1"

from conf.schema import ModelConfig, ProjectionConfig
from data.pairs import PairTemplate, pack_pairs, tokenise_plain
from models.build import build_model, build_reranker
from models.export import export
from models.pretrained import load_towers
from models.reranker import Reranker, is_reranker, load_reranker
from models.transformer import Packed

BOUND = 2e-5  # of the issue; fp32 sums in another order
FOLDERS = Path(os.environ.get("WEIGHTS_DIR", "artifacts/models"))
HEAD = "ForSequenceClassification"
LONG = TEXTS[3]  # 45 tokens: as a query it is cut, in transformers further than here
PAIRS = [(q, p) for q in TEXTS for p in TEXTS if q != LONG]


def packed_pairs(reranker: Reranker, pairs=PAIRS, max_length: int | None = None) -> Packed:
    template = PairTemplate.of(reranker.tokenizer)
    queries, passages = (
        tokenise_plain(reranker.tokenizer, texts) for texts in zip(*pairs, strict=True)
    )
    length = max_length or reranker.spec.max_length
    return pack_pairs([template.join(q, p, length) for q, p in zip(queries, passages, strict=True)])


def transformers_logits(folder: Path, pairs=PAIRS, max_length: int = 48):
    """Logits of the class that the folder names, from text, and the model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    queries, passages = map(list, zip(*pairs, strict=True))
    inputs = tokenizer(
        queries, passages, padding=True, truncation=True, max_length=max_length,
        return_tensors="pt",
    )  # fmt: skip
    if model.config.model_type in ("mpnet", "modernbert"):
        inputs.pop("token_type_ids", None)
    return model(**inputs).logits, model


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


# ---- scores of transformers' classes -------------------------------------------------------------

CLASSES = {
    "bert": ("bert", {"num_labels": 1}),
    "bert, 3 labels": ("bert", {"num_labels": 3}),
    "bert, 2 labels": ("bert", {}),  # transformers' default, which config.json does not name
    "xlm-roberta": ("xlm-roberta", {"num_labels": 1}),
    "mpnet": ("mpnet", {"num_labels": 1}),
    "mpnet, 4 labels": ("mpnet", {"num_labels": 4}),
    "modernbert": ("modernbert", {"num_labels": 1}),
    "modernbert, mean": (
        "modernbert",
        {"num_labels": 2, "classifier_pooling": "mean", "classifier_bias": True},
    ),
    "modernbert, relu and biases": (
        "modernbert",
        {"num_labels": 1, "classifier_activation": "relu", "norm_bias": True},
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_gradients_equal_those_of_transformers(name, tmp_path):
    """A swapped layer, a norm left out or types forgotten still give plausible scores."""
    kind, settings = CLASSES[name]
    folder = save_model(tmp_path / "m", kind, head=HEAD, settings=settings)
    reranker = load_reranker(folder).eval()
    want_SL, theirs = transformers_logits(folder)
    got_SL = reranker(packed_pairs(reranker))
    assert got_SL.shape == want_SL.shape == (len(PAIRS), settings.get("num_labels", 2))
    assert want_SL.std(0).min() > 0.05  # pairs differ, so equality means something
    torch.testing.assert_close(got_SL, want_SL, rtol=0, atol=BOUND)

    weight_SL = torch.randn(want_SL.shape, generator=torch.Generator().manual_seed(0))
    (got_SL * weight_SL).sum().backward()
    (want_SL * weight_SL).sum().backward()
    ours = reranker.encoder.embeddings.word.weight.grad
    word = theirs.get_input_embeddings().weight.grad
    scale = word.abs().max().item()
    torch.testing.assert_close(ours, word, rtol=0, atol=BOUND * max(1.0, scale))


def test_prompts_and_cut_pairs_score_as_in_transformers(tmp_path):
    """A passage beyond the maximum is cut before its closing [SEP], not after."""
    folder = save_model(tmp_path / "m", "bert", head=HEAD, settings={"num_labels": 1})
    reranker = load_reranker(folder).eval()
    pairs = [("stone", "how to open a file " * 9), ("what is dark ?", "one two three " * 8)]
    want_SL, _ = transformers_logits(folder, pairs, max_length=30)
    got_SL = reranker(packed_pairs(reranker, pairs, max_length=30))
    torch.testing.assert_close(got_SL, want_SL, rtol=0, atol=BOUND)


@pytest.mark.slow
def test_real_e5_under_a_random_head_scores_as_in_transformers(tmp_path):
    """Trained weights have large norms and outliers that random ones hide; its tokenizer is
    XLM-R's on a BERT, so types are 0 and pairs have two separators."""
    import transformers

    base = FOLDERS / "multilingual-e5-small-q4"
    if not (base / "model.safetensors").is_file():
        pytest.skip(f"no folder {base}; set WEIGHTS_DIR")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    for parameter in (*model.bert.pooler.parameters(), *model.classifier.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    for path in base.glob("*token*.json"):
        shutil.copy(path, tmp_path)
    texts = [
        "Where is the nearest library?",
        "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629 \u0645\u0635\u0631\u061f",
        "The library on Main Street is open. " * 20,
        "\u0627\u0644\u0642\u0627\u0647\u0631\u0629",
    ]
    pairs = [(q, p) for q in texts for p in texts]
    reranker = load_reranker(tmp_path).eval()
    with torch.no_grad():
        want_SL, _ = transformers_logits(tmp_path, pairs, max_length=512)
        got_SL = reranker(packed_pairs(reranker, pairs))
    assert want_SL.std() > 0.05
    torch.testing.assert_close(got_SL, want_SL, rtol=0, atol=BOUND)


# ---- strict reading ------------------------------------------------------------------------------


def test_sharded_weights_are_read_whole_and_a_lost_shard_is_named(tmp_path):
    """Head and encoder lie in different shards."""
    settings = {"num_labels": 1}
    one = save_model(tmp_path / "one", "modernbert", head=HEAD, settings=settings)
    shards = save_model(
        tmp_path / "shards", "modernbert", head=HEAD, settings=settings, max_shard_size="10KB"
    )
    assert len(list(shards.glob("*.safetensors"))) > 2
    want, got = load_reranker(one).state_dict(), load_reranker(shards).state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    next(shards.glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002.*not there"):
        load_reranker(shards)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_unexpected_and_misshapen_weights_are_named(kind, tmp_path):
    """A head left at random numbers would score, and be worth nothing."""
    folder = save_model(tmp_path / "m", kind, head=HEAD, settings={"num_labels": 1})
    path = folder / "model.safetensors"
    stored = load_file(path)
    heads = [k for k in stored if "classifier" in k or "head." in k or "pooler" in k]
    assert len(heads) >= 4

    def check(tensors, pattern):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=pattern):
            load_reranker(folder)

    for key in heads:
        plain = key.split(".", 1)[1] if key.startswith("bert.") else key
        check({k: t for k, t in stored.items() if k != key}, rf"1 missing: {plain}")
    check(stored | {"classifier.extra.weight": torch.zeros(2)}, r"unexpected: classifier\.extra")
    last = next(k for k in heads if k.endswith(("out_proj.weight", "classifier.weight")))
    check(stored | {last: torch.zeros(5, 24)}, rf"wrong shape: {last} is \(5, 24\), want \(1, 24\)")


def test_folders_that_are_no_cross_encoder_of_ours_are_refused_with_the_reason(tmp_path):
    """Each would else be read without its head, or with half of its settings."""
    folder = save_model(tmp_path / "m", "bert", head=HEAD, settings={"num_labels": 3})

    def check(pattern, **settings):
        with pytest.raises(ValueError, match=pattern):
            build_reranker(ModelConfig(base=str(folder), **settings))

    check(r"model\.num_labels \(1\) does not fit .* set model\.num_labels=3")
    check(r"model\.pooling \(mean\) does not fit .* has cls", num_labels=3, pooling="mean")
    check(r"model\.pooling \(max\) must be cls or mean", num_labels=3, pooling="max")
    check("model.adapter=automodel reads encoders alone", num_labels=3, adapter="automodel")
    edit_json(folder / "config.json", model_type="electra")
    check("a cross-encoder that cannot be read: model_type is 'electra'", num_labels=3)
    with pytest.raises(ValueError, match="holds a cross-encoder, which scores pairs"):
        load_towers(folder)
    towers = build_model(ModelConfig(base=str(save_model(tmp_path / "b", "bert")), towers="dual"))
    export(towers, tmp_path / "dual", {})
    with pytest.raises(ValueError, match="holds two towers"):
        load_reranker(tmp_path / "dual")


def test_cross_encoders_are_told_from_retrievers_and_encoders(tmp_path):
    """evaluate.py scores with one and encodes with the other."""
    base = save_model(tmp_path / "base", "bert")
    export(build_model(ModelConfig(base=str(base))), tmp_path / "retriever", {})
    assert is_reranker(save_model(tmp_path / "c", "mpnet", head=HEAD))
    assert not is_reranker(base)
    assert not is_reranker(tmp_path / "retriever")
    assert not is_reranker(save_model(tmp_path / "mlm", "bert", head="ForMaskedLM"))
    with pytest.raises(ValueError, match="no such folder"):
        is_reranker(tmp_path / "nowhere")


# ---- pairs as the model takes them ---------------------------------------------------------------


def test_types_follow_what_the_model_was_trained_with(tmp_path):
    """tokenizer.json marks passages with type 1 even where transformers feeds zeros."""
    folder = save_model(tmp_path / "m", "bert", head=HEAD, settings={"num_labels": 1})
    with_types, _ = transformers_logits(folder)
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    without, _ = transformers_logits(folder)
    assert (with_types - without).abs().max() > 0.01
    reranker = load_reranker(folder).eval()
    packed = packed_pairs(reranker)
    assert packed.types_T is None
    torch.testing.assert_close(reranker(packed), without, rtol=0, atol=BOUND)


def test_a_tokenizer_for_single_texts_gets_special_tokens_around_pairs(tmp_path, caplog):
    """A fresh head on cls would read the query's first word."""
    folder = save_model(tmp_path / "m", "bert")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["post_processor"]["pair"] = [
        {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
    ]  # fmt: skip
    path.write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        reranker = load_reranker(folder)
    assert "no special tokens around pairs" in caplog.text
    encoding = reranker.tokenizer.encode("stone", "river tree")
    assert encoding.tokens == ["[CLS]", "stone", "[SEP]", "river", "tree", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 1, 1, 1]
    assert reranker.tokenizer.encode("stone").tokens == ["[CLS]", "stone", "[SEP]"]


# ---- fresh heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_is_of_the_layouts_own_form_on_cls_and_linear_on_mean(kind, tmp_path):
    """Any other form could not be exported to transformers' class."""
    base = save_model(tmp_path / "base", kind)
    form = "roberta" if kind == "xlm-roberta" else kind
    reranker = load_reranker(base)  # a plain folder: cls
    assert (reranker.spec.pooling, reranker.spec.head) == ("cls", form)
    reranker = load_reranker(base, ModelConfig(base=str(base), pooling="mean", num_labels=3))
    assert (reranker.spec.pooling, reranker.spec.head, reranker.width) == ("mean", "linear", 3)
    export(build_model(ModelConfig(base=str(base))), tmp_path / "retriever", {})
    reranker = load_reranker(tmp_path / "retriever").eval()  # a folder that says mean
    assert (reranker.spec.pooling, reranker.spec.head, reranker.width) == ("mean", "linear", 1)
    with torch.no_grad():
        packed = packed_pairs(reranker)
        hidden_TC, starts = reranker.encoder(packed), packed.cu_lengths_S1.tolist()
        linear = reranker.head.out
        means = [hidden_TC[a:b].double().mean(0) for a, b in pairwise(starts)]
        want_SL = torch.stack(means) @ linear.weight.double().T + linear.bias
        torch.testing.assert_close(reranker(packed), want_SL.float(), rtol=0, atol=1e-5)


def test_fresh_parameters_start_with_head_and_follow_the_seed_and_the_initializer_range(tmp_path):
    """optim.head_lr goes by that name; a run must be the same twice."""
    base = save_model(tmp_path / "base", "xlm-roberta", settings={"initializer_range": 0.125})
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(load_reranker(base).state_dict())
    fresh = {k for k in states[0] if not torch.equal(states[0][k], states[2][k])}
    assert fresh == {"head.dense.weight", "head.out.weight"}
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    weight = states[0]["head.dense.weight"]
    assert abs(weight.std() - 0.125) < 0.02  # 576 draws: standard error .004
    assert not states[0]["head.dense.bias"].any() and not states[0]["head.out.bias"].any()
    assert all(k.startswith(("encoder.", "head.")) for k in states[0])


def test_a_stored_bert_pooler_is_where_the_head_starts(tmp_path):
    """transformers' class starts there too: it was trained with the encoder."""
    base = save_model(tmp_path / "base", "bert")
    stored = load_file(base / "model.safetensors")
    head = load_reranker(base).head
    assert torch.equal(head.dense.weight, stored["pooler.dense.weight"])
    assert torch.equal(head.dense.bias, stored["pooler.dense.bias"])


def test_a_projection_of_the_retriever_is_left_out(tmp_path):
    """It maps into the space of embeddings, where a pair has no place."""
    base = save_model(tmp_path / "base", "bert")
    c = ModelConfig(base=str(base), projection=ProjectionConfig(dim=7))
    export(build_model(c), tmp_path / "retriever", {})
    reranker = load_reranker(tmp_path / "retriever")
    assert reranker.head.out.in_features == 24


def test_any_architecture_serves_below_a_linear_head(tmp_path):
    """The AutoModel way has no form of its own; types must reach it all the same."""
    base = save_model(tmp_path / "base", "bert")
    c = ModelConfig(base=str(base), adapter="automodel")
    automodel, packed = load_reranker(base, c).eval(), load_reranker(base).eval()
    assert (automodel.spec.head, automodel.spec.pooling) == ("linear", "cls")
    packed.head = automodel.head
    with torch.no_grad():
        got, want = (m(packed_pairs(m)) for m in (automodel, packed))
    assert packed_pairs(automodel).types_T is not None
    torch.testing.assert_close(got, want, rtol=0, atol=BOUND)


# ---- scores --------------------------------------------------------------------------------------


def test_score_is_the_logit_or_the_expected_label(tmp_path):
    """Several labels are grades in order; ranking by one logit alone would ignore the others."""
    one = save_model(tmp_path / "one", "bert", head=HEAD, settings={"num_labels": 1})
    three = save_model(tmp_path / "three", "bert", head=HEAD, settings={"num_labels": 3})
    with torch.no_grad():
        reranker = load_reranker(one).eval()
        packed = packed_pairs(reranker)
        logits_SL = reranker(packed)
        assert torch.equal(reranker.score(reranker(packed)), logits_SL[:, 0])
        reranker.spec.temperature = 2.0
        want = 1 / (1 + np.exp(-logits_SL.double().numpy() / 2))
        np.testing.assert_allclose(reranker.probability(logits_SL), want, rtol=1e-5)

        reranker = load_reranker(three).eval()
        logits = reranker(packed).double().numpy()
        odds = np.exp(logits)
        want = (odds * [0, 1, 2]).sum(1) / odds.sum(1)
        np.testing.assert_allclose(reranker.score(reranker(packed)), want, rtol=1e-5)


def test_logits_are_float32_under_autocast_and_float64_for_float64_weights(tmp_path):
    """Rounded to bfloat16, scores of a long list would tie."""
    reranker = load_reranker(save_model(tmp_path / "m", "bert")).eval()
    packed = packed_pairs(reranker)
    with torch.no_grad():
        want_SL = reranker(packed)
        with torch.autocast("cpu", torch.bfloat16):
            got_SL = reranker(packed)
        assert got_SL.dtype == torch.float32
        assert not torch.equal(got_SL, got_SL.bfloat16().float())
        torch.testing.assert_close(got_SL, want_SL, rtol=0, atol=0.2)  # bf16 encoder
        wide_SL = reranker.double()(packed)
        assert wide_SL.dtype == torch.float64
        torch.testing.assert_close(wide_SL.float(), want_SL, rtol=0, atol=BOUND)


# ---- build_reranker ------------------------------------------------------------------------------


def test_settings_reach_the_model_and_unfit_ones_are_errors_that_name_them(tmp_path):
    """Each would otherwise fail deep inside the first step, or not at all."""
    base = str(save_model(tmp_path / "base", "bert"))
    c = ModelConfig(base=base, max_pair_length=40, query_prompt="query : ", dropout=0.25)
    reranker = build_reranker(c)
    assert reranker.training
    assert (reranker.spec.max_length, reranker.spec.query_prompt) == (40, "query : ")
    assert reranker.head.dropout.p == reranker.encoder.embeddings.dropout.p == 0.25

    def check(pattern, **settings):
        with pytest.raises(ValueError, match=pattern):
            build_reranker(ModelConfig(base=base, **settings))

    check(r"model\.max_pair_length \(67\) must be <= 66", max_pair_length=67)
    check("model.towers=dual has no meaning", towers="dual")
    check("model.projection.dim=4 has no meaning", projection=ProjectionConfig(dim=4))
    check("model.prompt_in_pooling=false has no meaning", prompt_in_pooling=False)
    check("model.normalize=false has no meaning", normalize=False)
    check(r"max_passage_length \(9\) is a retriever's.*max_pair_length", max_passage_length=9)
    check("model.freeze=query_tower needs", freeze=["query_tower"])
    check(r"model\.freeze=layers:4: .* has 3 layers", freeze=["layers:4"])
    check(r"model\.num_layers \(4\) must be <= 3", num_layers=4)
    check(
        r"\(48\) must be > 49: prompts and special tokens take 33 tokens",
        query_prompt="a the of " * 10,
    )


def test_a_retrievers_prompts_are_not_taken_over(tmp_path):
    """They tell two sides apart; in a pair the place does."""
    base = save_model(tmp_path / "base", "bert")
    c = ModelConfig(base=str(base), query_prompt="query : ", passage_prompt="passage : ")
    export(build_model(c), tmp_path / "retriever", {})
    spec = build_reranker(ModelConfig(base=str(tmp_path / "retriever"))).spec
    assert (spec.query_prompt, spec.passage_prompt) == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parts_get_no_gradient_and_all_others_do(kind, tmp_path):
    """A frozen part in the optimiser would still decay; a head outside the graph never learns."""
    base = str(save_model(tmp_path / "base", kind))
    reranker = build_reranker(ModelConfig(base=base, freeze=["embeddings", "layers:2"]))
    reranker(packed_pairs(reranker)).square().sum().backward()
    for name, parameter in reranker.named_parameters():
        is_frozen = name.startswith(
            ("encoder.embeddings.", "encoder.layers.0.", "encoder.layers.1.")
        )
        assert parameter.requires_grad != is_frozen, name
        assert (parameter.grad is None) == is_frozen, name
