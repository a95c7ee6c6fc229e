"""The AutoModel adapter: any transformers architecture behind our encoder's interface."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import TEXTS, save_model, save_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

from conf.schema import ModelConfig
from data.tokens import tokenise
from models.automodel import AutoEncoder
from models.build import build_model
from models.export import export
from models.pretrained import load_encoder, load_towers
from models.transformer import Encoder, pack

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 40, "initializer_range": 0.3, "max_position_embeddings": 64}


def save_decoder(folder: Path, *, padding_side: str = "left") -> Path:
    """A tiny causal language model, as decoder embedders are stored."""
    vocab_size = save_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", f'{{"padding_side": "{padding_side}", ', 1))
    torch.manual_seed(0)
    c = transformers.LlamaConfig(
        **SIZES, vocab_size=vocab_size, num_key_value_heads=2, pad_token_id=0, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(c).save_pretrained(folder)
    return folder


def test_decoder_is_loaded_with_last_token_pooling_and_equals_transformers(tmp_path):
    """The reference sees one text at a time, without padding: nothing to get wrong."""
    folder = save_decoder(tmp_path / "m")
    towers = build_model(ModelConfig(base=str(folder))).eval()
    assert isinstance(towers.passage.encoder, AutoEncoder)
    assert towers.spec.pooling == "last"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenise(towers.tokenizer_passage, TEXTS, "", 48)
    with torch.no_grad():
        got = towers.encode_passage(pack(tokens))
        want = [model(torch.tensor(t[None]).long()).last_hidden_state[0, -1] for t in tokens]
    want = torch.nn.functional.normalize(torch.stack(want), dim=-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # fp32: the mask changes the kernel


def test_left_and_right_padding_give_the_same_states_and_gradients(tmp_path):
    """Padded on the left, positions would start at the padding and the last token would move."""
    grads = []
    for side in ("left", "right"):
        encoder, _ = load_encoder(save_decoder(tmp_path / side, padding_side=side))
        assert encoder.padding_side == side
        tokens = [np.arange(4, 4 + n) % 30 for n in (5, 1, 9, 3)]
        masks = []
        hook = encoder.model.register_forward_pre_hook(
            lambda module, args, kwargs, masks=masks: masks.append(kwargs["attention_mask"]),
            with_kwargs=True,
        )
        hidden_TC = encoder(pack(tokens))
        hook.remove()
        assert masks[0][:, -1 if side == "left" else 0].all()
        assert not masks[0][:, 0 if side == "left" else -1].all()
        assert hidden_TC.shape == (18, 24)
        (hidden_TC * torch.linspace(-1, 1, 24)).sum().backward()
        grads.append([hidden_TC.detach(), *(p.grad for p in encoder.parameters())])
        assert all(g is not None and g.abs().sum() > 0 for g in grads[-1])
    for left, right in zip(*grads, strict=True):
        # fp32 rounding of rotary angles at other absolute positions; gradients are of size 1 to 10
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "mpnet"])
def test_adapter_equals_the_packed_encoder(kind, side, tmp_path):
    """Two computations of one model; learned positions must not count padding on the left."""
    folder = save_model(tmp_path / "m", kind)
    packed, _ = load_encoder(folder)
    adapter, _ = load_encoder(folder, adapter="automodel")
    adapter.padding_side = side
    assert isinstance(packed, Encoder)
    assert isinstance(adapter, AutoEncoder)
    assert adapter.max_positions == packed.config.max_positions
    assert adapter.width == packed.width
    tokens = [np.arange(4, 4 + n) % 30 + 4 for n in (5, 1, 60, 3)]
    with torch.no_grad():
        got, want = adapter.eval()(pack(tokens)), packed.eval()(pack(tokens))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # fp32 summation order
    with pytest.raises(ValueError, match="67 tokens exceeds the model"):
        adapter(pack([np.full(67, 5)]))


def test_export_of_a_decoder_loads_in_sentence_transformers_and_reads_back(tmp_path):
    """Saved by transformers itself; padding side and pooling must travel."""
    from sentence_transformers import SentenceTransformer

    towers = build_model(
        ModelConfig(base=str(save_decoder(tmp_path / "m")), query_prompt="query : ")
    )
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.mul_(1.1)
    export(towers.eval(), tmp_path / "out", {})
    back = load_towers(tmp_path / "out")
    ours, theirs = towers.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert back.passage.encoder.padding_side == "left"
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    tokens = tokenise(towers.tokenizer_query, TEXTS, "query : ", towers.spec.max_query_length)
    with torch.no_grad():
        want = towers.encode_query(pack(tokens)).numpy()
    np.testing.assert_allclose(model.encode_query(TEXTS), want, rtol=0, atol=1e-5)


def test_encoder_of_an_encoder_decoder_is_taken_alone(tmp_path):
    """T5's AutoModel wants decoder inputs and would carry weights that never get a gradient."""
    vocab_size = save_tokenizer(tmp_path / "m")
    config = transformers.T5Config(
        vocab_size=vocab_size,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    encoder, _ = load_encoder(tmp_path / "m")
    encoder.train()(pack([np.arange(4, 9), np.arange(5, 7)])).sum().backward()
    assert type(encoder.model).__name__ == "T5EncoderModel"
    assert all(p.grad is not None for p in encoder.parameters())


def test_export_of_a_t5_encoder_gives_the_same_embeddings_when_read_back(tmp_path):
    """transformers saves the encoder alone with is_encoder_decoder = false, as if it were all."""
    vocab_size = save_tokenizer(tmp_path / "m")
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=vocab_size, pad_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    towers = build_model(ModelConfig(base=str(tmp_path / "m"))).eval()
    export(towers, tmp_path / "out", {})
    back = load_towers(tmp_path / "out").eval()
    tokens = pack(tokenise(towers.tokenizer_passage, TEXTS, "", 48))
    with torch.no_grad():
        assert torch.equal(back.encode_passage(tokens), towers.encode_passage(tokens))


def test_settings_reach_the_adapter(tmp_path):
    """Dropout has another name in every architecture; a setting that does nothing is an error."""
    folder = save_model(tmp_path / "m", "bert")
    c = ModelConfig(base=str(folder), adapter="automodel", dropout=0.25, freeze=["layers:1"])
    encoder = build_model(c).passage.encoder
    assert encoder.model.config.hidden_dropout_prob == 0.25
    assert encoder.model.config.attention_probs_dropout_prob == 0.0
    frozen = [n for n, p in encoder.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(n.startswith("encoder.layer.0.") for n in frozen)
    decoder = save_decoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"model\.dropout \(0\.1\): llama has no hidden dropout"):
        build_model(ModelConfig(base=str(decoder), dropout=0.1))


def test_activation_checkpointing_keeps_gradients(tmp_path):
    """The setting is one attribute for both kinds of encoder."""
    folder = save_model(tmp_path / "m", "bert")
    grads = []
    for on in (False, True):
        encoder, _ = load_encoder(folder, adapter="automodel", dropout=0.0)
        encoder.train().activation_checkpointing = on
        assert encoder.activation_checkpointing is on
        (encoder(pack([np.arange(4, 9)])) * torch.linspace(-1, 1, 24)).sum().backward()
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)  # the same operations again


def test_missing_weights_and_unknown_architectures_are_user_errors(tmp_path):
    """transformers fills missing weights with random numbers and goes on."""
    from safetensors.torch import load_file, save_file

    folder = save_decoder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing weights: .*layers\.1\.mlp\.up_proj\.weight"):
        load_encoder(folder)
    (folder / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_encoder(folder)


def test_a_stored_weight_without_a_place_is_an_error_that_names_it(tmp_path):
    """transformers drops such weights and goes on: fewer layers, no relative positions."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "distilbert"
    sizes = {"vocab_size": save_tokenizer(folder), "dim": 24, "n_heads": 4, "hidden_dim": 40}
    config = transformers.DistilBertConfig(**sizes, n_layers=3, max_position_embeddings=64)
    transformers.DistilBertModel(config).save_pretrained(folder)
    load_encoder(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"n_layers": 2}))
    with pytest.raises(ValueError, match=r"16 unexpected weights: .*layer\.2\..* and 11 more"):
        load_encoder(folder)

    settings = {"position_embedding_type": "relative_key"}
    folder = save_model(tmp_path / "bert", "bert", settings=settings)
    tensors = load_file(folder / "model.safetensors")
    key = "encoder.layer.1.attention.self.distance_embedding.weight"
    tensors[key] = torch.randn(131, 6)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 unexpected weights: {re.escape(key)}: BertModel of"):
        load_encoder(folder)


def test_custom_code_is_neither_run_nor_offered(tmp_path, monkeypatch):
    """transformers asks on a terminal "Do you wish to run the custom code? [y/N]"."""
    folder = save_model(tmp_path / "m", "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('custom code was run')")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(ValueError, match="the model needs custom code, which is not run"):
        load_encoder(folder)
    # code beside a model that transformers knows is left alone
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    load_encoder(folder, adapter="automodel")


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("DistilBert", "MaskedLM SequenceClassification QuestionAnswering"),
        ("Albert", "PreTraining MaskedLM"),
        ("Electra", "PreTraining MaskedLM MultipleChoice"),
        ("DebertaV2", "MaskedLM SequenceClassification"),
        ("Qwen3", "CausalLM SequenceClassification TokenClassification"),
    ],
)
def test_heads_and_buffers_beside_an_encoder_are_left_out(kind, heads, tmp_path):
    """Most models of the hub are stored with the head that they were trained with."""
    from safetensors.torch import load_file, save_file

    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(vocab_size=40, max_position_embeddings=16, pad_token_id=0)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"intermediate_size": 40, "embedding_size": 24, "head_dim": 6}
    small |= {"num_key_value_heads": 2, "pooler_hidden_size": 24}
    for key, value in small.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"]
    for head in heads.split():
        folder = tmp_path / head
        getattr(transformers, f"{kind}For{head}")(config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        names = ("position_ids", "attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
        old = {f"embeddings.{name}": torch.ones(1, 16) for name in names}
        # as DeBERTa's authors store it
        old |= {"mask_predictions.dense.bias": torch.ones(24), "config": torch.ones(1)}
        old |= {"deberta.embeddings.word_embeddings._weight": torch.ones(40, 24)}
        save_file(tensors | old, folder / "model.safetensors", metadata={"format": "pt"})
        load_encoder(folder, adapter="automodel")
