"""Cross-encoder: a pair of texts as one sequence -> one logit, or several.

Shapes: T tokens of all pairs, S pairs, C hidden width, L labels.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn

from conf.schema import ModelConfig
from data.pairs import PairTemplate
from data.tokens import special_ends
from models.pretrained import (
    LAYOUTS,
    Module,
    Plan,
    Source,
    base_name,
    encoder_options,
    holds_reranker,
    load_dense,
    load_transformer,
    longest_input,
    plan_of,
    read_json,
    read_modules,
    read_settings,
    read_transformer_config,
    resolve_base,
    why_not_packed,
)
from models.towers import pool
from models.transformer import Dropout, Encoder, Norm, Packed, activate

log = logging.getLogger(__name__)

# Form of a head -> our module -> its name in transformers' class for sequence classification,
# without the prefix of the encoder's own keys. A linear head is in no such class.
HEADS = {
    "linear": {},
    "bert": {"dense": "pooler.dense", "out": "classifier"},
    "roberta": {"dense": "classifier.dense", "out": "classifier.out_proj"},
    "mpnet": {"dense": "classifier.dense", "out": "classifier.out_proj"},
    "modernbert": {"dense": "head.dense", "norm": "head.norm", "out": "classifier"},
}


class Head(nn.Module):
    """Pooled (S, C) -> logits (S, L): `out` alone, or dense, activation and perhaps norm before it.

    form     key of HEADS
    config   config.json of the encoder: initializer_range, and ModernBERT's classifier settings
    dropout  where transformers' class has it; None: as config says
    Weights are drawn from torch's global generator, normal; biases start at 0.
    """

    def __init__(
        self, form: str, width: int, num_labels: int, config: dict[str, Any], dropout: float | None
    ):
        super().__init__()
        is_modern = form == "modernbert"
        self.activation = config.get("classifier_activation", "gelu") if is_modern else "tanh"
        if dropout is None:
            dropout = config.get("classifier_dropout")
        if dropout is None:
            dropout = 0.0 if is_modern else config.get("hidden_dropout_prob", 0.1)
        self.dropout = Dropout(dropout)
        self.drops_input = form in ("roberta", "mpnet")
        bias = not is_modern or config.get("classifier_bias", False)
        self.dense = None if form == "linear" else nn.Linear(width, width, bias=bias)
        eps, norm_bias = config.get("norm_eps", 1e-5), config.get("norm_bias", False)
        self.norm = Norm(width, eps=eps, bias=norm_bias) if is_modern else None
        self.out = nn.Linear(width, num_labels)
        for linear in (self.dense, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=config.get("initializer_range", 0.02))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x_SC: Tensor) -> Tensor:
        if self.dense is not None:
            x_SC = self.dense(self.dropout(x_SC) if self.drops_input else x_SC)
            is_tanh = self.activation == "tanh"
            x_SC = torch.tanh(x_SC) if is_tanh else activate(x_SC, self.activation)
        if self.norm is not None:
            x_SC = self.norm(x_SC)
        return self.out(self.dropout(x_SC))


@dataclass
class RerankerSpec:
    """What a cross-encoder's folder says beside its weights."""

    base: str  # what it was made from, for the model card
    pooling: str  # cls | mean
    max_length: int  # tokens of a pair, prompts and special tokens included
    head: str = "linear"  # key of HEADS
    num_labels: int = 1
    temperature: float = 1.0  # calibration: probability = sigmoid(logit / temperature + bias)
    bias: float = 0.0  # of one label; several have a temperature alone
    query_prompt: str = ""
    passage_prompt: str = ""
    # (query, passage) prompt of each data set it was trained on, where they differ
    set_prompts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def probability(self, score_P: np.ndarray) -> np.ndarray:
        """(P,) float64, calibrated, that a passage answers its query, from ranking scores; of
        several labels the expected one as a share of the highest."""
        score_P = score_P.astype(np.float64)
        if self.num_labels > 1:
            return score_P / (self.num_labels - 1)
        logit_P = score_P / self.temperature + self.bias
        return 1 / (1 + np.exp(-np.clip(logit_P, -500, 500)))


class Reranker(nn.Module):
    """Packed pairs -> logits; data.pairs makes the pairs.

    encoder    anything with `width` and forward(packed) -> hidden_TC
    head       (S, C) -> (S, L)
    tokenizer  with truncation and padding off; its post-processor joins pairs
    source     what the base's folder held beside these weights, for export
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        spec: RerankerSpec,
        tokenizer: Tokenizer,
        source: Source,
    ):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.spec, self.tokenizer, self.source = spec, tokenizer, source

    @property
    def pooling(self) -> str:
        return self.spec.pooling

    @property
    def width(self) -> int:
        """L, the number of labels."""
        return self.spec.num_labels

    @property
    def sides(self) -> tuple[str, ...]:
        """The kinds of text that the model takes."""
        return ("pair",)

    def tower(self, side: str) -> "Reranker":
        return self

    def encode(self, side: str, packed: Packed) -> Tensor:
        return self(packed)

    def forward(self, packed: Packed) -> Tensor:
        """(S, L) logits in float32 (float64 for float64 weights)."""
        x_SC = pool(self.encoder(packed), packed, self.spec.pooling)
        with torch.autocast(x_SC.device.type, enabled=False):  # a few rows: precision costs nothing
            return self.head(x_SC)

    def score(self, logits_SL: Tensor) -> Tensor:
        """(S,) what pairs are ranked by: the logit, or the expected label of several."""
        if self.width == 1:
            return logits_SL[:, 0]
        label_L = torch.arange(self.width, dtype=logits_SL.dtype, device=logits_SL.device)
        return self.probability(logits_SL) @ label_L

    def probability(self, logits_SL: Tensor) -> Tensor:
        """(S, L) calibrated: sigmoid(logit / temperature + bias); of several labels softmax."""
        scaled_SL = logits_SL / self.spec.temperature
        if self.width == 1:
            return (scaled_SL + self.spec.bias).sigmoid()
        return scaled_SL.softmax(-1)


def is_reranker(base: str | Path, revision: str | None = None) -> bool:
    """Whether a model folder, run directory or hub id (at a revision) holds a cross-encoder.

    Raises ValueError as resolve_base does when nothing is found.
    """
    folder = resolve_base(base, revision)
    return holds_reranker(folder, read_settings(folder))


def check_judges(base: str | Path, setting: str, instead: str) -> None:
    """Raise ValueError where `setting` names a model without a head: it would judge at random."""
    if not is_reranker(base):
        raise ValueError(
            f"{setting} ({base}) is no cross-encoder: it has no trained head and would judge at"
            f" random; name one (a run with task=rerank){instead}"
        )


def load_reranker(base: str | Path, c: ModelConfig | None = None) -> Reranker:
    """Cross-encoder of a model folder, run directory or hub id, float32.

    A folder that holds one (transformers' class for sequence classification of a built-in layout,
    or Transformer + Pooling + Dense of sentence-transformers) is read strictly; any other encoder
    gets a fresh head: the one of its own transformers class where the first token is pooled, else
    one Linear.
    c  gives revision, adapter, dropout and, for a fresh head, pooling and num_labels
    Raises ValueError naming the file or setting when something is missing, damaged or not
    supported.
    """
    folder = resolve_base(base, None if c is None else c.revision)
    sides = read_modules(folder)
    if sides["query"] != sides["passage"]:
        raise ValueError(f"{folder} holds two towers; a cross-encoder needs one: name another base")
    if c is not None and c.pooling not in (None, "cls", "mean"):
        raise ValueError(f"model.pooling ({c.pooling}) must be cls or mean for task=rerank")
    settings, modules, name = read_settings(folder), sides["passage"], base_name(base)
    if not holds_reranker(folder, settings):
        return _with_fresh_head(modules, name, c)
    if len(modules) == 1:
        reranker = _classifier(modules[0].folder, name, c)
    else:
        reranker = _pooled(modules, name, c)
    spec, path = reranker.spec, modules[0].folder
    for key, has in (("num_labels", spec.num_labels), ("pooling", spec.pooling)):
        wanted = None if c is None else getattr(c, key)
        if wanted is not None and wanted != has:
            raise ValueError(
                f"model.{key} ({wanted}) does not fit the head of {path}, which has {has};"
                f" set model.{key}={has} or start from an encoder without a head"
            )
    prompts = settings.get("prompts") or {}
    spec.query_prompt = prompts.get(settings.get("default_prompt_name")) or ""
    # sentence-transformers puts a prompt before the first text alone
    spec.passage_prompt = settings.get("rook", {}).get("passage_prompt", "")
    log.info("%s: cross-encoder, %s head on %s", path, spec.head, spec.pooling)
    return reranker


def _classifier(folder: Path, name: str, c: ModelConfig | None) -> Reranker:
    """A folder of transformers' class for sequence classification."""
    config = read_json(folder / "config.json")
    reason = why_not_packed(config)
    if reason is None and c is not None and c.adapter == "automodel":
        reason = "model.adapter=automodel reads encoders alone"
    if reason is not None:
        raise ValueError(
            f"{folder}: a cross-encoder that cannot be read: {reason}; name one of a built-in"
            " layout, or an encoder without a head"
        )
    form = LAYOUTS[config["model_type"]][0]
    pooling = config.get("classifier_pooling", "cls") if form == "modernbert" else "cls"
    if pooling not in ("cls", "mean"):
        raise ValueError(f"{folder}: classifier_pooling is {pooling!r}; want cls or mean")
    labels = config.get("id2label")  # config.json says nothing about transformers' default, 2
    num_labels = config.get("num_labels", 2) if labels is None else len(labels)
    head = Head(form, config["hidden_size"], num_labels, config, None if c is None else c.dropout)
    plan = Plan(folder)
    read_transformer_config(plan, "sequence-classification", "logits")
    loaded = load_transformer(plan, name, encoder_options(c), head_parameters(head, form))
    return _assemble(plan, loaded, head, form, pooling, name, is_fresh=False)


def head_parameters(head: Head, form: str) -> dict[str, nn.Parameter]:
    """A head's parameters by the names of transformers' class."""
    return {
        f"{theirs}.{kind}": parameter
        for ours, theirs in HEADS[form].items()
        for kind, parameter in getattr(head, ours).named_parameters()
    }


def _pooled(modules: list[Module], name: str, c: ModelConfig | None) -> Reranker:
    """Transformer + Pooling + Dense of sentence-transformers."""
    plan, where = plan_of(modules), modules[0].folder
    if len(plan.dense) != 1 or plan.normalize or plan.pooling not in ("cls", "mean"):
        raise ValueError(
            f"{where}: a cross-encoder of {', '.join(m.kind for m in modules)} with"
            f" {plan.pooling} pooling; supported: Transformer, Pooling (cls or mean), one Dense"
        )
    dense = load_dense(plan.dense[0], output="scores")
    if dense.activation != "identity":
        raise ValueError(
            f"{plan.dense[0]}: Dense with activation {dense.activation}; want Identity"
        )
    loaded = load_transformer(plan, name, encoder_options(c))
    encoder, source, _ = loaded
    if dense.linear.in_features != encoder.width:
        raise ValueError(
            f"{plan.dense[0]}: Dense takes {dense.linear.in_features} values, gets {encoder.width}"
        )
    dropout = None if c is None else c.dropout
    head = Head("linear", encoder.width, dense.linear.out_features, source.config, dropout)
    head.out = dense.linear
    return _assemble(plan, loaded, head, "linear", plan.pooling, name, is_fresh=False)


def _with_fresh_head(modules: list[Module], name: str, c: ModelConfig | None) -> Reranker:
    """A bare encoder, or a retriever without its Dense layers, below a head to be trained."""
    plan = plan_of(modules)
    loaded = load_transformer(plan, name, encoder_options(c))
    encoder, source, _ = loaded
    pooling = (c and c.pooling) or ("mean" if plan.pooling == "mean" else "cls")
    form = "linear"
    if pooling == "cls" and isinstance(encoder, Encoder):
        form = encoder.config.layout
    num_labels, dropout = (1, None) if c is None else (c.num_labels, c.dropout)
    head = Head(form, encoder.width, num_labels, source.config, dropout)
    if form == "bert" and source.pooler:  # transformers takes it over as well
        head.dense.load_state_dict(
            {k.removeprefix("pooler.dense."): t for k, t in source.pooler.items()}
        )
        log.info("%s: the head's dense layer starts from the stored pooler", plan.transformer)
    if plan.dense:
        log.info("%s: the retriever's Dense layers are left out", plan.transformer)
    log.info("%s: fresh %s head on %s", plan.transformer, form, pooling)
    return _assemble(plan, loaded, head, form, pooling, name, is_fresh=True)


def _assemble(
    plan: Plan,
    loaded: tuple[nn.Module, Source, Tokenizer],
    head: Head,
    form: str,
    pooling: str,
    name: str,
    *,
    is_fresh: bool,
) -> Reranker:
    encoder, source, tokenizer = loaded
    _mend_pairs(tokenizer, encoder, source, is_fresh=is_fresh)
    spec = RerankerSpec(
        base=name,
        pooling=pooling,
        max_length=longest_input(plan.max_length, encoder, source),
        head=form,
        num_labels=head.out.out_features,
    )
    return Reranker(encoder, head, spec, tokenizer, source)


def _mend_pairs(
    tokenizer: Tokenizer, encoder: nn.Module, source: Source, *, is_fresh: bool
) -> None:
    """Let the tokenizer's own post-processor make the pairs that the model takes.

    Token types become 0 where the model has none, or was trained without them; and a tokenizer that
    was only meant for single texts gets special tokens around pairs, below a fresh head.
    """
    template = PairTemplate.of(tokenizer)
    is_packed = isinstance(encoder, Encoder)
    rows = encoder.config.type_vocab if is_packed else source.config.get("type_vocab_size", 0)
    inputs = source.tokenizer_config.get("model_input_names")
    has_types = rows > 1 and (is_fresh or inputs is None or "token_type_ids" in inputs)
    front, back = special_ends(tokenizer)
    is_bare = is_fresh and not template.num_special and bool(front or back)
    if not is_bare and (has_types or not any(template.types)):
        return
    if is_bare:
        log.warning(
            "the tokenizer puts no special tokens around pairs; taken: those of single texts"
        )
        second = int(has_types)
        template = PairTemplate(front, back, back, types=[0, 0, 0, second, second])
    types = template.types if has_types else [0] * 5

    def pieces(ids, token_type: int = 0) -> list[str]:
        return [f"{tokenizer.id_to_token(int(i))}:{token_type}" for i in ids]

    special = {int(i) for part in (front, back) for i in part}
    special |= {int(i) for i in (*template.front, *template.middle, *template.back)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*pieces(front), "$A:0", *pieces(back)],
        pair=[
            *pieces(template.front, types[0]), f"$A:{types[1]}",
            *pieces(template.middle, types[2]), f"$B:{types[3]}",
            *pieces(template.back, types[4]),
        ],
        special_tokens=[(tokenizer.id_to_token(i), i) for i in sorted(special)],
    )  # fmt: skip
