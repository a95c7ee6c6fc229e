"""losses.check on every experiment, layout, kind of loss and of tower."""

import json

import pytest
import torch

from conf.cli import list_experiments, task_of
from conf.schema import ModelConfig, ProjectionConfig
from losses import check, comparisons, tiny
from losses.comparisons import Subject
from models.build import build_model
from models.export import export
from models.transformer import Encoder


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few thousand weights compute faster than a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CONFIGS = {
    "modernbert": {
        "model_type": "modernbert", "hidden_size": 768, "num_hidden_layers": 22,
        "num_attention_heads": 12, "intermediate_size": 1152, "vocab_size": 50368,
        "global_attn_every_n_layers": 3, "local_attention": 128, "pad_token_id": 50283,
    },
    "xlm-roberta": {
        "model_type": "xlm-roberta", "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 250002,
        "max_position_embeddings": 514, "type_vocab_size": 1, "hidden_dropout_prob": 0.1,
    },
    "mpnet": {
        "model_type": "mpnet", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30527,
        "max_position_embeddings": 514, "hidden_dropout_prob": 0.1,
    },
    "t5": {"model_type": "t5", "d_model": 512, "num_layers": 6},
}  # fmt: skip


ON_MODELS = (
    comparisons.compare_cached,
    comparisons.compare_chunks,
    comparisons.compare_budgets,
    comparisons.compare_autocast,
    comparisons.compare_reported,
)
ON_LOSSES = tuple(f for f in comparisons.COMPARISONS if f not in ON_MODELS[:4])


def failures(folder, chosen, *args: str) -> tuple[Subject, dict[str, float]]:
    """What is out of bounds, of some comparisons on a command line's words."""
    c, _ = check.compose([*args])
    small, _ = tiny.shrink(c, folder / "tiny")
    subject = Subject(small)
    rows = [row for compare in chosen for row in compare(subject)]
    assert len(rows) >= len(chosen)
    return subject, {row.name: row.difference for row in rows if not row.ok}


CHECKED = [n for n in list_experiments() if n != "quickstart" and task_of(n) == "retrieval"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_experiment_of_this_repository(name, tmp_path):
    """The quickstart goes through the whole command in test_check.py. The folder that a local
    experiment starts from need not be here."""
    chosen = (comparisons.compare_cached, comparisons.compare_formula, comparisons.compare_dims)
    base = ["model.base=intfloat/multilingual-e5-small"] if name.endswith("_local") else []
    assert failures(tmp_path, chosen, f"+experiment={name}", *base)[1] == {}


LOSSES = [
    ("loss=qwen3", "loss.symmetric=0.3"),
    ("loss=gist", "loss.learn_temperature=true", "loss.dims=[384,100]", "loss.dims_per_step=1"),
    ("loss=in_batch_kl",),
    ("loss=in_batch_kl", "loss.teacher_weight=0.4", "loss.label_smoothing=0.1"),
    ("loss=gte", "loss.debias=0.1", "loss.hardness=3", "loss.symmetric=0.5"),
    ("loss=sigmoid", "loss.dims=[384,32]"),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", LOSSES, ids=lambda words: words[0])
def test_losses(words, tmp_path):
    """Each kind of negatives, limits, teacher, corrections, learned numbers."""
    chosen = [f for f in ON_LOSSES if "sigmoid" not in words[0] or "margins" not in f.__name__]
    assert failures(tmp_path, chosen, "+experiment=toy", *words)[1] == {}


def base_of(tmp_path, config: dict) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.base={folder}"


def on_model(tmp_path, *args: str) -> tuple[Subject, dict[str, float]]:
    return failures(tmp_path, ON_MODELS, "model=custom", "data=toy", *args)


@pytest.mark.parametrize("name", ["modernbert", "xlm-roberta", "mpnet"])
def test_layouts(name, tmp_path):
    """The stand-in has the base's layout: its windows, offsets and biases are chunked too."""
    base = base_of(tmp_path, CONFIGS[name])
    subject, bad = on_model(tmp_path, base, "model.towers=dual", "model.pooling=cls")
    assert subject.towers.query.encoder.config.layout == name.removeprefix("xlm-")
    assert bad == {}


def test_frozen_layers_are_counted_among_those_that_are_kept(tmp_path):
    """All of a base that is cut to two; the stand-in has its own number and is not cut."""
    base = base_of(tmp_path, CONFIGS["mpnet"])
    subject, bad = on_model(tmp_path, base, "model.num_layers=2", "model.freeze=[layers:2]")
    layers = subject.towers.query.encoder.layers
    assert not any(p.requires_grad for p in layers.parameters()) and len(layers) == tiny.NUM_LAYERS
    assert bad == {}


def test_what_our_encoder_cannot_compute_goes_through_the_adapter(tmp_path):
    """T5 cannot be shrunk by us; the path that it would take, padded rectangles, can."""
    subject, bad = on_model(tmp_path, base_of(tmp_path, CONFIGS["t5"]), "loss.dims=[512]")
    assert not isinstance(subject.towers.passage.encoder, Encoder) and subject.loss.dims == [24]
    assert bad == {}


def test_a_dual_folder_with_projections_keeps_its_structure(tiny_base, tmp_path):
    """Router, Dense, prompts left out, a frozen tower, checkpointing, dropout in attention."""
    c = ModelConfig(
        base=str(tiny_base), towers="dual", pooling="max", prompt_in_pooling=False,
        projection=ProjectionConfig(dim=32, activation="tanh"), query_prompt="q: ",
    )  # fmt: skip
    export(build_model(c, dims=[]), tmp_path / "base", {})
    subject, bad = on_model(
        tmp_path, f"model.base={tmp_path / 'base'}", "model.freeze=[query_tower,layers:1]",
        "model.attention_dropout=0.2", "runtime.activation_checkpointing=true", "loss.dims=[32,5]",
        "loss.learn_temperature=true",
    )  # fmt: skip
    towers = subject.noisy
    assert towers.is_dual and towers.passage.pooling == "max"
    assert towers.passage.projections[0].activation == "tanh"
    assert towers.width == 48 and subject.loss.dims == [48, 8]
    assert subject.sample.batch.query_prompt_tokens_B.any()
    assert towers.passage.encoder.activation_checkpointing
    assert not any(p.requires_grad for p in towers.query.parameters())
    assert not any(p.requires_grad for p in towers.passage.encoder.layers[0].parameters())
    assert max(subject.budgets_mib.values()) < 1, "a frozen tower is never replayed"
    assert bad == {}


def test_shares_of_a_batch_are_the_batch():
    """Ranks without texts included; pairs, weights and relatives must not be lost or doubled."""
    s = tiny.sample(7, 9, seed=1, is_prompt_pooled=False)
    b, cuts = s.batch, ((0, 0, 4, 7), (0, 9, 9, 17))
    parts = [tiny.share_of(b, rank, *cuts) for rank in range(3)]
    assert [t for p in parts for t in p.query_tokens] == b.query_tokens
    assert [t for p in parts for t in p.passage_tokens] == b.passage_tokens
    assert sum(p.num_examples for p in parts) == b.num_examples == b.num_examples_global
    pairs = [
        (q + p.query_offset, n, w)
        for p in parts
        for q, n, w in zip(p.pair_query_P, p.pair_passage_P, p.pair_weight_P, strict=True)
    ]
    whole = zip(b.pair_query_P, b.pair_passage_P, b.pair_weight_P, strict=True)
    assert sorted(pairs) == sorted(whole)
    assert b.pair_weight_P.sum() == b.num_examples
    for a, columns in enumerate(b.relatives_BK):
        assert {n for n in columns if n >= 0} == set((~s.keep_AN[a]).nonzero().flatten().tolist())


def test_dims_keep_their_order_and_stay_distinct():
    """Weights belong to dims by place."""
    assert tiny._scaled_dims([768, 512, 256, 128, 64], 768, 24) == [24, 16, 8, 4, 2]
    assert tiny._scaled_dims([32, 384, 64, 33], 384, 24) == [2, 24, 4, 3]
    assert tiny._scaled_dims([760, 761, 768], 768, 24) == [22, 23, 24]
