"""A tiny stand-in for an experiment: a random model of the same structure, and batches with every
difficulty. What losses/check.py works on.

Shapes: A queries and N candidate passages of all ranks, E embedding of a guide.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from conf.schema import TrainConfig
from data.batches import Batch, ScoredPairs
from models.build import build_model, build_reranker
from models.pretrained import (
    LAYOUTS,
    encoder_config,
    name_map,
    read_json,
    read_modules,
    resolve_base,
    why_not_packed,
)
from models.reranker import Reranker
from models.towers import Towers
from models.transformer import Encoder

log = logging.getLogger(__name__)

NUM_LAYERS, NUM_HEADS, VOCAB, POSITIONS = 2, 4, 64, 40
GUIDE_WIDTH = 9
BERT = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 768, "num_hidden_layers": 12}
# files of a model folder that say how its parts hang together
STRUCTURE = ("modules.json", "router_config.json", "config_sentence_transformers.json")


# ---- the model -----------------------------------------------------------------------------------


def shrink(c: TrainConfig, folder: Path) -> tuple[TrainConfig, str]:
    """The experiment with a tiny random base, written to `folder`, and what that base is.

    Kept are layout, towers, pooling, projections, what is frozen, and every setting of the loss;
    sizes and Matryoshka dims are scaled. A base that cannot be read without a network is taken for
    a BERT. Raises ValueError where training would: no such folder, a dim wider than the model.
    """
    base = _base_folder(c)
    encoders = {"": BERT} if base is None else _encoders(base)
    if c.task == "rerank":  # one encoder below a fresh head, whatever the folder has on top
        encoders = {"": next(iter(encoders.values()))}
    big = next(iter(encoders.values()))
    big = {"hidden_size": big.get("d_model"), "num_hidden_layers": big.get("num_layers")} | big
    adapter = c.model.adapter
    if why_not_packed(big) is not None:  # transformers' work: its adapter, around a BERT
        adapter, encoders = "automodel", dict.fromkeys(encoders, BERT)
    hidden = 24 * -(-max(1, len(c.loss.dims)) // 12)

    def scaled(size: int) -> int:
        return max(8, round(size * hidden / big["hidden_size"]))

    width = big["hidden_size"]
    folder.mkdir(parents=True, exist_ok=True)
    if c.task != "rerank" and base is not None and (base / "modules.json").is_file():
        width = _copy_structure(base, folder, scaled, width)
    for number, (place, config) in enumerate(encoders.items()):
        _write_encoder(folder / place, config, hidden, seed=number)
    projection = c.model.projection
    if projection.dim:
        width = projection.dim
        projection = dataclasses.replace(projection, dim=scaled(width))
    if base is None:
        width = max([width, *c.loss.dims])
    too_wide = [d for d in c.loss.dims if d > width]
    if too_wide:
        raise ValueError(
            f"loss.dims {too_wide} must be <= {width}, the embedding dimension of {c.model.base}"
        )
    num_layers = c.model.num_layers or big["num_hidden_layers"]
    model = dataclasses.replace(
        c.model,
        base=str(folder),
        revision=None,
        adapter=adapter,
        projection=projection,
        query_prompt="",
        passage_prompt="",
        max_query_length=None,
        max_passage_length=None,
        max_pair_length=None,
        num_layers=None,
        freeze=[_scaled_freeze(part, num_layers) for part in c.model.freeze],
    )
    loss = dataclasses.replace(c.loss, dims=_scaled_dims(c.loss.dims, width, scaled(width)))
    layout = LAYOUTS[next(iter(encoders.values()))["model_type"]][0]
    of = "no base at hand" if base is None else c.model.base
    what = f"{layout} of {NUM_LAYERS} layers x {hidden} ({of})"
    return dataclasses.replace(c, model=model, loss=loss), what


def build(tiny: TrainConfig, *, dropout: float) -> Towers:
    """The shrunken experiment's towers in float64; always the same for one seed."""
    torch.manual_seed(tiny.seed)
    off = {} if dropout else {"attention_dropout": 0.0}
    model = dataclasses.replace(tiny.model, dropout=dropout, **off)
    towers = build_model(model, dims=tiny.loss.dims).double()
    for tower in (towers.query, towers.passage):
        tower.encoder.activation_checkpointing = tiny.runtime.activation_checkpointing
    return towers


def build_rerank(tiny: TrainConfig, *, dropout: float) -> Reranker:
    """The shrunken experiment's reranker in float64; always the same for one seed."""
    torch.manual_seed(tiny.seed)
    off = {} if dropout else {"attention_dropout": 0.0}
    reranker = build_reranker(dataclasses.replace(tiny.model, dropout=dropout, **off)).double()
    reranker.encoder.activation_checkpointing = tiny.runtime.activation_checkpointing
    return reranker


def dropout_of(tiny: TrainConfig) -> float:
    """The experiment's own rate; .1 where it has none, for a replay must be seen to matter."""
    if tiny.model.dropout is not None:
        return tiny.model.dropout or 0.1
    config = next(iter(_encoders(Path(tiny.model.base)).values()))
    return config.get("hidden_dropout_prob", config.get("mlp_dropout", 0.0)) or 0.1


def _base_folder(c: TrainConfig) -> Path | None:
    try:
        return resolve_base(c.model.base, c.model.revision)
    except ValueError as error:
        if "hub id" not in str(error):
            raise
        log.info("%s", error)
        return None


def _encoders(folder: Path) -> dict[str, dict[str, Any]]:
    """config.json of each encoder in a model folder, by its place there; one, or one a side."""
    modules = [m for side in read_modules(folder).values() for m in side]
    places = dict.fromkeys(m.folder for m in modules if m.kind == "Transformer")
    return {
        "" if p == folder else str(p.relative_to(folder)): read_json(p / "config.json")
        for p in places
    }


def _copy_structure(base: Path, folder: Path, scaled: Callable[[int], int], width: int) -> int:
    """Modules, poolings and Dense layers of a sentence-transformers folder; returns the embedding
    width of the base.
    """
    for path in base.rglob("*.json"):
        if path.name in STRUCTURE or (path.name == "config.json" and path.parent != base):
            copy = folder / path.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    hidden = width
    for side in read_modules(base).values():
        width = hidden
        for module in side:
            if module.kind == "Dense":
                out = read_json(module.folder / "config.json")["out_features"]
                _write_dense(folder / module.folder.relative_to(base), scaled(width), scaled(out))
                width = out
    return width


def _write_encoder(folder: Path, config: dict[str, Any], hidden: int, *, seed: int) -> None:
    drop = {"layer_types", "torch_dtype", "dtype", "architectures", "auto_map"}
    config = {k: v for k, v in config.items() if k not in drop and not k.endswith("_token_id")}
    layout, _, _ = LAYOUTS[config["model_type"]]
    pad_id = 1 if layout in ("roberta", "mpnet") else 0
    config |= {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 40,
        "max_position_embeddings": POSITIONS + (2 if pad_id else 0),
        "pad_token_id": pad_id,
        "local_attention": 8,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(
        str(folder / "tokenizer.json")
    )
    rng = torch.Generator().manual_seed(seed)
    names = name_map(layout, NUM_LAYERS)
    state = {}
    for ours, parameter in Encoder(encoder_config(config)).named_parameters():
        theirs = names[ours]
        for key, part in zip(theirs, parameter.chunk(len(theirs)), strict=True):
            noise = torch.randn(part.shape, generator=rng)
            is_norm = ours.endswith("norm.weight")
            # far from 0 and 1: a matrix in the wrong place must show
            state[key] = 1 + 0.1 * noise if is_norm else 0.3 * noise
    save_file(state, folder / "model.safetensors")


def _write_dense(folder: Path, width_in: int, width_out: int) -> None:
    path = folder / "config.json"
    config = read_json(path) | {"in_features": width_in, "out_features": width_out}
    path.write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(width_out)
    state = {"linear.weight": 0.3 * torch.randn(width_out, width_in, generator=rng)}
    if config.get("bias", True):
        state["linear.bias"] = 0.1 * torch.randn(width_out, generator=rng)
    save_file(state, folder / "model.safetensors")


def _scaled_freeze(part: str, num_layers: int) -> str:
    """layers:<n> of the base as layers of the stand-in: none, all, or some of both kinds."""
    name, _, count = part.partition(":")
    if name != "layers" or int(count) == 0:
        return part
    return f"layers:{NUM_LAYERS if int(count) >= num_layers else 1}"


def _scaled_dims(dims: Sequence[int], width: int, tiny_width: int) -> list[int]:
    """Distinct dims in the same order and about the same proportions."""
    tiny: dict[int, int] = {}
    for place, d in enumerate(sorted(dims)):
        most = tiny_width - (len(dims) - 1 - place)
        least = max(tiny.values(), default=0) + 1
        tiny[d] = min(most, max(least, round(d * tiny_width / width)))
    return [tiny[d] for d in dims]


# ---- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """Unit embeddings of nothing in particular, in place of a guide's or a teacher's."""

    query_AE: np.ndarray
    passage_NE: np.ndarray

    def lookup(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        return self.query_AE, self.passage_NE


@dataclass(frozen=True)
class Sample:
    """A batch of all ranks.

    keep_AN  True where a passage may be a negative of a query; not made from batch.relatives_BK
    """

    batch: Batch
    guide: Guide
    keep_AN: Tensor


def sample(
    num_queries: int, num_negatives: int, *, seed: int, is_prompt_pooled: bool = True
) -> Sample:
    """Ragged texts; a query with two positives, one that two examples ask, two that share an
    answer, a known relative that answers nothing here, hard negatives.

    num_queries  at least 2; each has a positive of its own but the last, which shares one
    """
    A, rng = num_queries, np.random.default_rng(seed)
    answers = [[i] for i in range(A)]
    answers[-1] = [A - 2]
    answers[0].append(A)
    N = A + 1 + num_negatives
    examples = [*range(A), min(1, A - 1)]
    known = [set(columns) for columns in answers]
    if num_negatives:
        known[1].add(N - 1)
    pairs = [(q, p, 1 / len(answers[q])) for q in examples for p in answers[q]]
    related = [{a for a in range(A) if a == b or known[a] & known[b]} for b in range(A)]
    keep_AN = torch.tensor([[n not in known[a] for n in range(N)] for a in range(A)])

    def texts(count: int, longest: int) -> list[np.ndarray]:
        lengths = rng.integers(2, longest, count)
        return [rng.integers(2, VOCAB, length).astype(np.int32) for length in lengths]

    def unit(count: int) -> np.ndarray:
        x_nE = rng.standard_normal((count, GUIDE_WIDTH))
        return x_nE / np.linalg.norm(x_nE, axis=1, keepdims=True)

    query_tokens, passage_tokens = texts(A, 9), texts(N, 22)

    def skipped(tokens: list[np.ndarray]) -> np.ndarray:
        most = 0 if is_prompt_pooled else 3
        return np.array([min(len(t) - 1, int(rng.integers(0, most + 1))) for t in tokens], np.int32)

    batch = Batch(
        query_tokens=query_tokens,
        passage_tokens=passage_tokens,
        pair_query_P=np.array([q for q, _, _ in pairs]),
        pair_passage_P=np.array([p for _, p, _ in pairs]),
        pair_weight_P=np.array([w for _, _, w in pairs], np.float32),
        relatives_BK=_listed(known),
        num_examples=len(examples),
        num_examples_global=len(examples),
        passage_offset=0,
        num_passages_global=N,
        query_prompt_tokens_B=skipped(query_tokens),
        passage_prompt_tokens_N=skipped(passage_tokens),
        example_ids=[f"e{i}" for i in range(len(examples))],
        query_relatives_BK=_listed(related),
        scored=_scored(answers, N, num_negatives, rng),
    )
    return Sample(batch, Guide(unit(A), unit(N)), keep_AN)


def _scored(
    answers: list[list[int]], N: int, num_negatives: int, rng: np.random.Generator
) -> ScoredPairs:
    """Each query with its answers and the last hard negatives, one score missing."""
    negatives = range(N - min(3, num_negatives), N)
    pairs = [
        (q, p, float(p in own)) for q, own in enumerate(answers) for p in sorted({*own, *negatives})
    ]
    query, passage, label = (np.array(x) for x in zip(*pairs, strict=True))
    score = rng.standard_normal(len(pairs)).astype(np.float32)
    score[-1] = np.nan
    return ScoredPairs(query, passage, label.astype(np.float32), score)


def share_of(
    batch: Batch, rank: int, query_cuts: Sequence[int], passage_cuts: Sequence[int]
) -> Batch:
    """A rank's part: queries query_cuts[rank] up to the next cut, and so for passages."""
    (q_lo, q_hi), (p_lo, p_hi) = query_cuts[rank : rank + 2], passage_cuts[rank : rank + 2]
    is_mine_P = (batch.pair_query_P >= q_lo) & (batch.pair_query_P < q_hi)
    own = batch.scored
    is_mine_S = (own.query_P >= q_lo) & (own.query_P < q_hi)
    return dataclasses.replace(
        batch,
        query_tokens=batch.query_tokens[q_lo:q_hi],
        passage_tokens=batch.passage_tokens[p_lo:p_hi],
        pair_query_P=batch.pair_query_P[is_mine_P] - q_lo,
        pair_passage_P=batch.pair_passage_P[is_mine_P],
        pair_weight_P=batch.pair_weight_P[is_mine_P],
        relatives_BK=batch.relatives_BK[q_lo:q_hi],
        num_examples=round(float(batch.pair_weight_P[is_mine_P].sum())),
        passage_offset=p_lo,
        query_prompt_tokens_B=batch.query_prompt_tokens_B[q_lo:q_hi],
        passage_prompt_tokens_N=batch.passage_prompt_tokens_N[p_lo:p_hi],
        query_offset=q_lo,
        query_relatives_BK=batch.query_relatives_BK[q_lo:q_hi],
        scored=ScoredPairs(
            own.query_P[is_mine_S] - q_lo,
            *(x[is_mine_S] for x in (own.passage_P, own.label_P, own.score_P)),
        ),
    )


def _listed(sets: list[set[int]]) -> np.ndarray:
    """(n, K) int64: the members of each set, then -1."""
    out_nK = np.full((len(sets), max(map(len, sets))), -1, np.int64)
    for row, members in zip(out_nK, sets, strict=True):
        row[: len(members)] = sorted(members)
    return out_nK
