"""ModelConfig -> Towers. The only place where a kind of model is named."""

import copy
import logging
from collections.abc import Iterable, Sequence

from torch import nn

from conf.schema import ModelConfig
from data.tokens import tokenise
from models.pretrained import load_towers, max_positions
from models.towers import Projection, Tower, Towers

log = logging.getLogger(__name__)


def build_model(c: ModelConfig, *, dims: Sequence[int] = ()) -> Towers:
    """Towers of `c.base` with the overrides of `c`, float32, in training mode, parts frozen.

    dims  Matryoshka dimensions to be trained; recorded in the spec; () for the full one alone
    A fresh projection, equal on both sides, is all that is drawn from torch's global generator.
    Raises ValueError when a setting does not fit the base, naming the setting.
    """
    towers = load_towers(c.base, c)
    towers = _with_kind(towers, c)
    for tower in _distinct(towers):
        tower.pooling = c.pooling or tower.pooling
        tower.normalize = c.normalize
    if c.projection.dim:
        _add_projection(towers, c)
    _set_spec(towers, c, dims)
    _freeze(towers, c.freeze)
    frozen = sum(p.numel() for p in towers.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in towers.parameters())
    log.info("model: %s, %s, %d parameters, %d frozen", c.base, towers.spec.kind, total, frozen)
    return towers.train()


def _distinct(towers: Towers) -> list[Tower]:
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
    p = c.projection
    fresh = Projection(towers.width, p.dim, bias=p.bias, activation=p.activation)
    if towers.is_dual:  # the same start: two random maps would not point into one space
        towers.query.projections.append(copy.deepcopy(fresh))
    towers.passage.projections.append(fresh)


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


def _freeze(towers: Towers, parts: Iterable[str]) -> None:
    """Switch gradients off. MPNet's relative bias, of all layers, freezes with a tower alone."""
    for part in parts:
        name, _, count = part.partition(":")
        frozen: list[nn.Module] = []
        if name in ("query_tower", "passage_tower"):
            if not towers.is_dual:
                raise ValueError(
                    f"model.freeze={part} needs model.towers=dual; both sides share one tower"
                )
            frozen.append(towers.tower(name.removesuffix("_tower")))
        for tower in _distinct(towers):
            if name == "embeddings":
                frozen.append(tower.encoder.embeddings)
            elif name == "layers":
                layers = tower.encoder.layers
                if int(count) > len(layers):
                    raise ValueError(
                        f"model.freeze={part}: {towers.spec.base} has {len(layers)} layers"
                    )
                frozen += layers[: int(count)]
        for module in frozen:
            module.requires_grad_(False)
    if not any(p.requires_grad for p in towers.parameters()):
        raise ValueError(f"model.freeze ({', '.join(parts)}) leaves nothing to train")
