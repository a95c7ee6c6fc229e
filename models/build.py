"""ModelConfig -> Towers or Reranker. The only place where a kind of model is named."""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from conf.schema import ModelConfig
from data.pairs import PairTemplate, tokenise_plain
from data.tokens import tokenise
from models.pretrained import load_towers, max_positions
from models.reranker import Reranker, load_reranker
from models.towers import Projection, Tower, Towers
from models.transformer import Encoder

log = logging.getLogger(__name__)


def build_model(c: ModelConfig, *, dims: Sequence[int] = ()) -> Towers:
    """Towers of `c.base` with the overrides of `c`, float32, in training mode, parts frozen.

    dims  Matryoshka dimensions to be trained; recorded in the spec; () for the full one alone
    A fresh projection, equal on both sides, is all that is drawn from torch's global generator.
    Raises ValueError when a setting does not fit the base, naming the setting.
    """
    towers = load_towers(c.base, c)
    towers = _with_kind(towers, c)
    if c.num_layers is not None:
        _keep_layers(distinct(towers), c)
    for tower in distinct(towers):
        tower.pooling = c.pooling or tower.pooling
        tower.normalize = c.normalize
    if c.projection.is_wanted:
        _add_projection(towers, c)
    _set_spec(towers, c, dims)
    _freeze(towers, c.freeze)
    _log_size(towers, c.base, towers.spec.kind)
    return towers.train()


def build_reranker(c: ModelConfig) -> Reranker:
    """Cross-encoder of `c.base` with the overrides of `c`, float32, in training mode, parts frozen.

    A fresh head is all that is drawn from torch's global generator. A retriever's prompts and
    lengths of queries and passages say nothing about pairs: prompts are those of `c`, or of a base
    that is a cross-encoder already.
    Raises ValueError when a setting does not fit the base, naming the setting.
    """
    unfit = {
        "model.towers=dual": c.towers == "dual",
        f"model.projection.dim={c.projection.dim}": c.projection.dim > 0,
        f"model.projection.init={c.projection.init}": c.projection.init != "random",
        "model.prompt_in_pooling=false": c.prompt_in_pooling is False,
        "model.normalize=false": not c.normalize,
    }
    for setting, is_set in unfit.items():
        if is_set:
            raise ValueError(f"{setting} has no meaning for a cross-encoder (task=rerank)")
    for key in ("max_query_length", "max_passage_length"):
        if c.max_pair_length is None and getattr(c, key) is not None:
            raise ValueError(
                f"model.{key} ({getattr(c, key)}) is a retriever's; a cross-encoder (task=rerank)"
                " has one length, model.max_pair_length: set that"
            )
    reranker = load_reranker(c.base, c)
    if c.num_layers is not None:
        _keep_layers([reranker], c)
    spec, limit = reranker.spec, max_positions(reranker.encoder)
    for key in ("query_prompt", "passage_prompt"):
        value = getattr(c, key)
        if value is not None:
            setattr(spec, key, value)
    if c.max_pair_length is not None:
        if limit is not None and c.max_pair_length > limit:
            raise ValueError(
                f"model.max_pair_length ({c.max_pair_length}) must be <= {limit}, the positions of"
                f" {c.base}"
            )
        spec.max_length = c.max_pair_length
    prompts = tokenise_plain(reranker.tokenizer, [spec.query_prompt, spec.passage_prompt])
    lengths = {"model.max_pair_length": spec.max_length}
    PairTemplate.of(reranker.tokenizer).check_room(prompts, lengths)
    _freeze(reranker, c.freeze)
    _log_size(reranker, c.base, f"cross-encoder, {spec.head} head on {spec.pooling}")
    return reranker.train()


def _log_size(model: Towers | Reranker, base: str, kind: str) -> None:
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.info("model: %s, %s, %d parameters, %d frozen", base, kind, total, frozen)


def _keep_layers(parts: Iterable[Tower | Reranker], c: ModelConfig) -> None:
    """Cut encoders off above their first c.num_layers layers (Sajjad et al. 2023, top dropping), in
    place; an export says so in its config.json."""
    for part in parts:
        encoder, count = part.encoder, c.num_layers
        if not isinstance(encoder, Encoder):
            raise ValueError(
                f"model.num_layers ({count}) needs our encoder, but {c.base} is read by"
                " model.adapter=automodel"
            )
        if count > len(encoder.layers):
            raise ValueError(
                f"model.num_layers ({count}) must be <= {len(encoder.layers)}, the layers of"
                f" {c.base}"
            )
        config, source = encoder.config, part.source
        encoder.layers = encoder.layers[:count]
        encoder.config = replace(
            config, num_layers=count, layer_is_local=config.layer_is_local[:count]
        )
        kinds = source.config.get("layer_types")
        stated = {} if kinds is None else {"layer_types": kinds[:count]}
        part.source = replace(source, config=source.config | {"num_hidden_layers": count} | stated)


def distinct(towers: Towers) -> list[Tower]:
    """Its towers, one where both sides share it."""
    return [towers.query, towers.passage] if towers.is_dual else [towers.passage]


def _with_kind(towers: Towers, c: ModelConfig) -> Towers:
    """Copies of one tower for dual; a dual base stays dual."""
    if c.towers == "single" and towers.is_dual:
        raise ValueError(
            f"model.towers=single, but {c.base} holds two towers; use model.towers=dual"
        )
    if c.towers == "dual" and not towers.is_dual:
        query = copy.deepcopy(towers.passage)
        towers.spec.kind = "dual"
        return Towers(
            query, towers.passage, towers.spec, towers.tokenizer_query, towers.tokenizer_passage
        )
    return towers


def _add_projection(towers: Towers, c: ModelConfig) -> None:
    p, width = c.projection, towers.width
    fresh = Projection(width, p.dim or width, bias=p.bias, activation=p.activation)
    if p.init == "shared":  # the base's own embeddings, until models.shared turns them
        if p.dim not in (0, width):
            raise ValueError(
                f"model.projection.dim ({p.dim}) must be {width}, the width of {c.base}, or 0 for"
                " it: model.projection.init=shared turns embeddings, it does not cut them"
            )
        set_linear(fresh.linear, torch.eye(width))
    if towers.is_dual:  # the same start: two random maps would not point into one space
        towers.query.projections.append(copy.deepcopy(fresh))
    towers.passage.projections.append(fresh)


def set_linear(linear: nn.Linear, weight_OI: torch.Tensor) -> None:
    """Give a layer this weight and no bias, in place."""
    with torch.no_grad():
        linear.weight.copy_(weight_OI)
        if linear.bias is not None:
            linear.bias.zero_()


def _set_spec(towers: Towers, c: ModelConfig, dims: Sequence[int]) -> None:
    spec = towers.spec
    spec.pooling, spec.normalize = towers.passage.pooling, towers.passage.normalize
    for key in ("query_prompt", "passage_prompt", "prompt_in_pooling"):
        value = getattr(c, key)
        if value is not None:
            setattr(spec, key, value)
    for side in ("query", "passage"):
        key, limit = f"max_{side}_length", max_positions(towers.tower(side).encoder)
        length = getattr(c, key)
        if length is None:
            continue
        if limit is not None and length > limit:
            raise ValueError(
                f"model.{key} ({length}) must be <= {limit}, the positions of {c.base}"
            )
        setattr(spec, key, length)
    for side in ("query", "passage"):
        prompt, length = spec.side(side)
        if prompt and len(tokenise(towers.tokenizer(side), [prompt], "", 10**6)[0]) >= length:
            raise ValueError(
                f"model.{side}_prompt fills all {length} tokens of model.max_{side}_length;"
                " shorten the prompt or raise the length"
            )
    too_wide = [d for d in dims if d > towers.width]
    if too_wide:
        raise ValueError(
            f"dims {too_wide} must be <= {towers.width}, the embedding dimension of {c.base}"
        )
    spec.dims = list(dims)


def _freeze(model: Towers | Reranker, parts: Iterable[str]) -> None:
    """Switch gradients off. MPNet's relative bias, of all layers, freezes with a tower alone."""
    is_reranker = isinstance(model, Reranker)
    encoders = [model.encoder] if is_reranker else [t.encoder for t in distinct(model)]
    for part in parts:
        name, _, count = part.partition(":")
        frozen: list[nn.Module] = []
        if name in ("query_tower", "passage_tower"):
            if is_reranker or not model.is_dual:
                raise ValueError(
                    f"model.freeze={part} needs model.towers=dual; both sides share one tower"
                )
            frozen.append(model.tower(name.removesuffix("_tower")))
        for encoder in encoders:
            if name == "embeddings":
                frozen.append(encoder.embeddings)
            elif name == "layers":
                layers = encoder.layers
                if int(count) > len(layers):
                    raise ValueError(
                        f"model.freeze={part}: {model.spec.base} has {len(layers)} layers"
                    )
                frozen += layers[: int(count)]
        for module in frozen:
            module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model.freeze ({', '.join(parts)}) leaves nothing to train")
