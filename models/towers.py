"""Pooling, projection and normalisation on top of an encoder; one tower for both sides, or one a
side.

Shapes: T tokens, S sequences, C hidden width, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.transformer import Packed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


def pool(hidden_TC: Tensor, packed: Packed, how: str) -> Tensor:
    """One vector a sequence, (S, C), in float32 (float64 for float64 input).

    how  mean | cls (first token) | last (last token) | max; tokens counted in packed.skip_S are
         left out of all but last
    """
    wide_TC = hidden_TC.to(torch.promote_types(hidden_TC.dtype, torch.float32))
    start_S, end_S = packed.cu_lengths_S1[:-1].long(), packed.cu_lengths_S1[1:].long()
    if how == "cls":
        if packed.skip_S is not None:  # as sentence-transformers: the first token that is left
            start_S = start_S + torch.where(packed.skip_S < end_S - start_S, packed.skip_S, 0)
        return wide_TC[start_S]
    if how == "last":
        return wide_TC[end_S - 1]
    S, C = len(packed.lengths), wide_TC.shape[1]
    segment_T = packed.segment_T
    kept_T = None
    if packed.skip_S is not None:
        kept_T = packed.position_T >= packed.skip_S[segment_T]
    if how == "mean":
        count_S = end_S - start_S
        if kept_T is not None:
            wide_TC = wide_TC * kept_T[:, None]
            count_S = (count_S - packed.skip_S).clamp(min=1)
        total_SC = wide_TC.new_zeros(S, C).index_add(0, segment_T, wide_TC)
        return total_SC / count_S[:, None]
    if how == "max":
        if kept_T is not None:
            wide_TC = wide_TC.masked_fill(~kept_T[:, None], -torch.inf)
        return wide_TC.new_full((S, C), -torch.inf).index_reduce(0, segment_T, wide_TC, "amax")
    raise ValueError(f"pooling ({how!r}) must be one of mean, cls, last, max")


class Projection(nn.Module):
    """A Dense layer after pooling: activation(W x + b)."""

    def __init__(
        self, width_in: int, width_out: int, *, bias: bool = True, activation: str = "identity"
    ):
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(width_in, width_out, bias=bias)

    def forward(self, x_SC: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.linear(x_SC))


class Tower(nn.Module):
    """Packed -> one embedding a sequence.

    encoder      anything with `width` and forward(packed) -> hidden_TC
    projections  Dense layers after pooling, in order
    """

    def __init__(
        self, encoder: nn.Module, *, pooling: str, projections: list[Projection], normalize: bool
    ):
        super().__init__()
        self.encoder = encoder
        self.projections = nn.ModuleList(projections)
        self.pooling, self.normalize = pooling, normalize

    @property
    def width(self) -> int:
        """D, the embedding width."""
        return self.projections[-1].linear.out_features if self.projections else self.encoder.width

    def forward(self, packed: Packed) -> Tensor:
        """(S, D) float32 embeddings, unit norm when the tower normalises."""
        x_SD = pool(self.encoder(packed), packed, self.pooling)
        with torch.autocast(
            x_SD.device.type, enabled=False
        ):  # a few rows: full precision costs nothing
            for projection in self.projections:
                x_SD = projection(x_SD)
            return F.normalize(x_SD, dim=-1) if self.normalize else x_SD


@dataclass
class TowerSpec:
    """What a model folder says beside its weights."""

    base: str  # what it was made from, for the model card
    kind: str = "single"  # single | dual
    pooling: str = "mean"
    normalize: bool = True
    query_prompt: str = ""
    passage_prompt: str = ""
    prompt_in_pooling: bool = True
    max_query_length: int = 512  # tokens, prompt and special tokens included
    max_passage_length: int = 512
    dims: list[int] = field(default_factory=list)  # Matryoshka dims it was trained for
    # (query, passage) prompt of each data set it was trained on, where they differ
    set_prompts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def side(self, side: str) -> tuple[str, int]:
        """(prompt, maximum length) of side "query" or "passage"."""
        if side == "query":
            return self.query_prompt, self.max_query_length
        if side == "passage":
            return self.passage_prompt, self.max_passage_length
        raise ValueError(f"side ({side!r}) must be query or passage")


class Towers(nn.Module):
    """A query and a passage tower, the same module when the model is single.

    tokenizers  tokenizers.Tokenizer objects with truncation and padding off
    """

    def __init__(
        self, query: Tower, passage: Tower, spec: TowerSpec, tokenizer_query, tokenizer_passage
    ):
        super().__init__()
        self.query = query
        self.passage = passage
        self.spec = spec
        self.tokenizer_query, self.tokenizer_passage = tokenizer_query, tokenizer_passage

    @property
    def is_dual(self) -> bool:
        return self.query is not self.passage

    @property
    def width(self) -> int:
        """D, the embedding width."""
        return self.passage.width

    def tower(self, side: str) -> Tower:
        return self.query if side == "query" else self.passage

    def tokenizer(self, side: str):
        return self.tokenizer_query if side == "query" else self.tokenizer_passage

    @property
    def sides(self) -> tuple[str, ...]:
        """The kinds of text that the model takes; a reranker has one, "pair"."""
        return ("query", "passage")

    def encode(self, side: str, packed: Packed) -> Tensor:
        return self.tower(side)(packed)

    def encode_query(self, packed: Packed) -> Tensor:
        return self.query(packed)

    def encode_passage(self, packed: Packed) -> Tensor:
        return self.passage(packed)
