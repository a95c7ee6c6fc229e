"""Attention over packed sequences: one place chooses how it is computed, and says so once.

Shapes: T tokens of all sequences, S sequences, n sequences of one length L, H heads, K head width,
C = H * K.
"""

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.transformer import Packed

log = logging.getLogger(__name__)

# Cells (n L L) that one block of a group's score matrices may have in one head: two texts of 256
# tokens. Twelve heads of them in bf16 are 3 MB, which a core or two hold in their own caches.
BLOCK_AREA = 2 * 256 * 256

# Texts of one length from which a group of their own is faster than a padded one of all lengths up
# to the same multiple: with 5 to 8 they are even, with 12 to 57 it takes 0.35 to 0.84 of the time.
ENOUGH = 10

# Neighbouring elements of a dropout mask that share one cut: see Drawn.
DRAWN_TOGETHER = 256

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The score of padding. Finite, so that the row of a padded query inside a window is not empty:
# its softmax would be nan.
_OUTSIDE = torch.finfo(torch.bfloat16).min / 2


@dataclass
class Group:
    """Neighbouring sequences of a pack that attention takes together, as a rectangle (n, L).

    first    their first token in the pack
    length   L, no less than the longest of them
    lengths  of each
    """

    first: int
    length: int
    lengths: list[int]

    @property
    def count(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokens(self) -> slice:
        return slice(self.first, self.first + sum(self.lengths))

    @cached_property
    def cell_t(self) -> Tensor | None:
        """Cell of the rectangle, row by row, of each of the group's tokens; None: they fill it."""
        if min(self.lengths) == self.length:
            return None
        starts = range(0, self.count * self.length, self.length)
        rows = [torch.arange(s, s + n) for s, n in zip(starts, self.lengths, strict=True)]
        return torch.cat(rows)

    @cached_property
    def row_c(self) -> Tensor:
        """For each cell the row of the group that it is read from; padding repeats its text's
        last."""
        ends = np.cumsum(self.lengths)
        at = np.minimum(np.arange(self.length)[None], np.array(self.lengths)[:, None] - 1)
        return torch.from_numpy(((ends - self.lengths)[:, None] + at).ravel())

    @cached_property
    def empty_cell_e(self) -> Tensor:
        """Cells of the rectangle without a token."""
        is_empty = torch.ones(self.count * self.length, dtype=torch.bool)
        return is_empty.index_fill_(0, self.cell_t, False).nonzero()[:, 0]

    @cached_property
    def penalty_n11L(self) -> Tensor | None:
        """Added to the scores of a key: 0 on tokens, _OUTSIDE on padding."""
        if self.cell_t is None:
            return None
        flat = torch.full((self.count * self.length,), _OUTSIDE)
        return flat.index_fill_(0, self.cell_t, 0.0).view(self.count, 1, 1, self.length)

    def rectangle(self, x_T: Tensor, *, copies: bool = False) -> Tensor:
        """The group's rows of x (T, ...) as (n, L, ...); padding repeats some token of its text.
        Without padding a view, unless it copies."""
        part_t = x_T[self.tokens]
        if self.cell_t is not None:
            part_t = part_t.index_select(0, self.row_c)
        elif copies:
            part_t = part_t.clone()
        return part_t.view(self.count, self.length, *x_T.shape[1:])

    def rectangle_of_zeros(self, x_T: Tensor) -> Tensor:
        """The same with zeros where padding."""
        cells = self.rectangle(x_T)
        if self.cell_t is not None:
            cells.flatten(0, 1).index_fill_(0, self.empty_cell_e, 0)
        return cells

    def put(self, x_T: Tensor, parts: Sequence[Tensor]) -> None:
        """Write those rows of parts (n, H, L, K) that are tokens into x (T, parts, H, K)."""
        shape = (self.count, self.length, *x_T.shape[1:])
        part_t = x_T[self.tokens]
        cells = part_t.view(shape) if self.cell_t is None else part_t.new_empty(shape)
        for i, part in enumerate(parts):
            cells[:, :, i].copy_(part.transpose(1, 2))
        if self.cell_t is not None:
            torch.index_select(cells.flatten(0, 1), 0, self.cell_t, out=part_t)


def length_groups(lengths: list[int], multiple: int = 1) -> list[Group]:
    """Runs of neighbouring sequences whose lengths have the same next multiple; few when the pack
    is sorted. Where ENOUGH texts share each length of a multiple, a group has one length and no
    padding. A group has at most BLOCK_AREA cells of scores, or one sequence."""
    groups: list[Group] = []
    start = 0
    counts = Counter(lengths)
    lengths_of = Counter(-(-length // multiple) for length in counts)
    texts_of = Counter()
    for length, count in counts.items():
        texts_of[-(-length // multiple)] += count
    for length in lengths:
        step = -(-length // multiple)
        is_alone = texts_of[step] >= ENOUGH * lengths_of[step]
        padded = length if is_alone else step * multiple
        last = groups[-1] if groups else None
        if last and last.length == padded and (last.count + 1) * padded**2 <= BLOCK_AREA:
            last.lengths.append(length)
        else:
            groups.append(Group(start, padded, [length]))
        start += length
    return groups


def length_multiple(dtype: torch.dtype) -> int:
    """What lengths are padded to within a group.

    In bf16 torch's softmax takes rows of a multiple of 32 twice to four times as fast as others,
    and products of several texts are faster than those of one. The fused kernel of wider types
    gains nothing by either.
    """
    return 32 if dtype == torch.bfloat16 else 1


def choose_attention(device_type: str, dtype: torch.dtype, *, bias: bool, dropout: float) -> str:
    """Name of the way to compute attention: varlen | grouped | padded.

    varlen   torch.nn.attention.varlen: CUDA, bf16/fp16, no bias, no dropout
    grouped  our autograd function over groups of near-equal length: the CPU's fastest
    padded   scaled_dot_product_attention over one padded rectangle: everything else
    """
    if device_type == "cpu":
        return "grouped"
    has_kernel = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if has_kernel and not bias and not dropout and _has_varlen() else "padded"


def _has_varlen() -> bool:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:  # torch < 2.10
        return False
    return True


def _varlen_has_window() -> bool:
    """Whether varlen_attn can restrict attention to a window (younger than the function)."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


_NAMES = {
    "varlen": "torch.nn.attention.varlen",
    "grouped": "groups of near-equal length",
    "padded": "scaled_dot_product_attention on padded rectangles",
}
_logged: set[str] = set()


def leave_out_of_compilation() -> None:
    """Call before a layer is compiled: attention then runs as it is written.

    Lengths differ every step: traced, each would be a new program. Not a decorator, because that
    alone loads the compiler and doubles the time in which every program starts.
    """
    global _untraced
    _untraced = torch.compiler.disable(_attend)


def attend(
    qkv_T3HK: Tensor,
    packed: "Packed",
    bias_HLL: Tensor | None,
    *,
    half_window: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v of every sequence by itself, (T, H, K).

    bias_HLL     added to the scores (MPNet); L >= the longest sequence
    half_window  a token sees this many to each side; 0: all
    dropout      of the probabilities
    """
    run = _untraced if torch.compiler.is_compiling() else _attend
    return run(qkv_T3HK, packed, bias_HLL, half_window, dropout)


_untraced: Callable[..., Tensor] | None = None


def _attend(
    qkv_T3HK: Tensor,
    packed: "Packed",
    bias_HLL: Tensor | None,
    half_window: int,
    dropout: float,
) -> Tensor:
    kind, dtype = qkv_T3HK.device.type, qkv_T3HK.dtype
    way = choose_attention(kind, dtype, bias=bias_HLL is not None, dropout=dropout)
    if way == "varlen" and half_window and not _varlen_has_window():
        way = "padded"
    if way not in _logged:
        _logged.add(way)
        why = [w for w, on in (("bias", bias_HLL is not None), ("dropout", dropout > 0)) if on]
        log.info("attention: %s (%s)", _NAMES[way], ", ".join([kind, str(dtype), *why]))
    if way == "varlen":
        return _varlen_attention(qkv_T3HK, packed.cu_lengths_S1, max(packed.lengths), half_window)
    if way == "grouped":
        groups = packed.groups(length_multiple(dtype))
        return GroupedAttention.apply(qkv_T3HK, bias_HLL, groups, half_window, dropout)
    return _padded_attention(qkv_T3HK, bias_HLL, *packed.rectangle, half_window, dropout)


def _window_mask(length: int, half_window: int, device: torch.device) -> Tensor | None:
    """(L, L) bool, True where |i - j| <= half_window; None when the window covers everything."""
    if half_window <= 0 or length <= half_window + 1:
        return None
    at = torch.arange(length, device=device)
    return (at[:, None] - at[None, :]).abs() <= half_window


class Drawn:
    """The masks of one dropout on the CPU, from 7 random bits an element: seeded from torch's
    generator, so that they follow torch.manual_seed; asked for a mask again, it gives the same.

    An element is dropped where its bits are below a cut. Of two neighbouring cuts each run of
    DRAWN_TOGETHER elements takes one at random, so that every element is dropped with probability
    p, whatever p is.
    """

    def __init__(self, p: float):
        self.p, self.scale = p, 1 / (1 - p)
        self.seed = int(torch.empty((), dtype=torch.int64).random_())

    def mask(self, shape: torch.Size, number: int = 0) -> Tensor:
        """int8: every bit set where kept, 0 where dropped. Masks of different numbers are
        independent."""
        count = shape.numel()
        runs = -(-count // DRAWN_TOGETHER)
        draws = np.random.SFC64([self.seed, number]).random_raw(runs * (1 + DRAWN_TOGETHER // 8))
        cut_R = np.floor(self.p * 128 + draws[:runs] * 2.0**-64)
        below_cut_R1 = torch.from_numpy((cut_R - 1).astype(np.int8))[:, None]
        bits = torch.from_numpy(draws[runs:].view(np.int8)).view(runs, DRAWN_TOGETHER)
        # below 0, so kept, from the cut on; half the time of a comparison
        torch.sub(below_cut_R1, bits.bitwise_and_(0x7F), out=bits).bitwise_right_shift_(7)
        return bits.view(-1)[:count].view(shape)


def drop_(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 where Drawn.mask has it, in place: an operation on the bits of any type of x."""
    bits = x.view(_BITS[x.dtype.itemsize])
    bits.bitwise_and_(mask.to(bits.dtype))
    return x


class GroupedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K) + bias) v over groups of near-equal length, as one autograd node.

    One node instead of a slice per group: autograd's backward of a slice adds a full zero tensor
    per group.
    Nothing of size L x L is kept: the backward recomputes it, or runs the fused kernel's own; masks
    of dropout are drawn again from their seed.
    """

    @staticmethod
    def forward(
        ctx,
        qkv_T3HK: Tensor,
        bias_HLL: Tensor | None,
        groups: list[Group],
        half_window: int,
        dropout: float = 0.0,
    ) -> Tensor:
        T, _, H, K = qkv_T3HK.shape
        out_THK = qkv_T3HK.new_empty(T, H, K)
        fused = _fused(qkv_T3HK, bias_HLL, dropout)
        log_sums = []
        drawn = Drawn(dropout) if dropout else None
        for i, group in enumerate(groups):
            if "forward" in fused:
                q, k, v = _heads_first(group.rectangle(qkv_T3HK))
                o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k, v, attn_mask=_fused_mask(group, half_window, q.dtype)
                )
                log_sums.append(log_sum)
            else:
                q, k, v = _heads_first_copy(group, qkv_T3HK)
                p = _probabilities(q, k, group, bias_HLL, half_window)
                if drawn:
                    drop_(p, drawn.mask(p.shape, i))
                o = _scaled_product(p, v, drawn.scale if drawn else 1)
            group.put(out_THK.unsqueeze(1), (o,))
        if "backward" in fused:
            ctx.save_for_backward(qkv_T3HK, bias_HLL, out_THK, *log_sums)
        else:
            ctx.save_for_backward(qkv_T3HK, bias_HLL)
        ctx.groups, ctx.half_window, ctx.drawn = groups, half_window, drawn
        return out_THK

    @staticmethod
    def backward(ctx, grad_THK: Tensor):
        qkv_T3HK, bias_HLL, *fused = ctx.saved_tensors
        drawn = ctx.drawn
        scale = 1 / math.sqrt(qkv_T3HK.shape[-1])
        kept_scale = drawn.scale if drawn else 1
        grad_qkv_T3HK = torch.empty_like(qkv_T3HK)
        wants_bias = bias_HLL is not None and ctx.needs_input_grad[1]
        grad_bias_HLL = None
        if wants_bias:
            wide = torch.promote_types(bias_HLL.dtype, torch.float32)
            grad_bias_HLL = torch.zeros_like(bias_HLL, dtype=wide)
        for i, group in enumerate(ctx.groups):
            # g is 0 on padding, whose rows so add nothing
            g = group.rectangle_of_zeros(grad_THK).transpose(1, 2)
            if fused:
                out_THK, *log_sums = fused
                q, k, v = _heads_first(group.rectangle(qkv_T3HK))
                o = group.rectangle(out_THK).transpose(1, 2)
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    g, q, k, v, o, log_sums[i], 0.0, False,
                    attn_mask=_fused_mask(group, ctx.half_window, q.dtype),
                )  # fmt: skip
            else:
                q, k, v = _heads_first_copy(group, qkv_T3HK)
                g = g.contiguous()
                p = kept_p = _probabilities(q, k, group, bias_HLL, ctx.half_window)
                if drawn:
                    mask = drawn.mask(p.shape, i).to(_BITS[p.dtype.itemsize])  # used twice
                    kept_p = drop_(p.clone(), mask)
                dp = _scaled_product(g, v.mT, kept_scale)
                if drawn:
                    drop_(dp, mask)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                if wants_bias:
                    c = min(group.length, bias_HLL.shape[1])
                    grad_bias_HLL[:, :c, :c] += ds[..., :c, :c].sum(0, dtype=wide)
                dv = _scaled_product(kept_p.mT, g, kept_scale)
                dq = _scaled_product(ds, k, scale)
                dk = _scaled_product(ds.mT, q, scale)
            group.put(grad_qkv_T3HK, (dq, dk, dv))
        if wants_bias:
            grad_bias_HLL = grad_bias_HLL.to(bias_HLL.dtype)
        return grad_qkv_T3HK, grad_bias_HLL, None, None, None


def _heads_first(qkv_nL3HK: Tensor) -> Tensor:
    """(n, L, 3, H, K) -> (3, n, H, L, K), a view."""
    return qkv_nL3HK.permute(2, 0, 3, 1, 4)


def _heads_first_copy(group: Group, qkv_T3HK: Tensor) -> Tensor:
    """The group's part so, contiguous, or each product would copy its factors. bf16 is read from
    memory in order first: of a row's 3 x H short pieces, each by itself, nothing is fetched ahead.
    """
    qkv_nL3HK = group.rectangle(qkv_T3HK, copies=qkv_T3HK.dtype == torch.bfloat16)
    return _heads_first(qkv_nL3HK).contiguous()


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b over (n, H, ..., ...), the factor within the product."""
    if scale == 1:
        return torch.matmul(a, b)
    heads = a.shape[:2]
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out).unflatten(0, heads)


def _fused(qkv_T3HK: Tensor, bias_HLL: Tensor | None, dropout: float) -> tuple[str, ...]:
    """Which directions the fused CPU kernel computes: it has no dropout, and its backward loses to
    plain products in bf16, its forward too but on processors with matrix tiles (AMX)."""
    if bias_HLL is not None or dropout or qkv_T3HK.device.type != "cpu":
        return ()
    if qkv_T3HK.dtype != torch.bfloat16:
        return ("forward", "backward")
    return ("forward",) if torch.cpu._is_amx_tile_supported() else ()


def _additive(mask_LL: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask_LL.shape, dtype=dtype, device=mask_LL.device).masked_fill_(
        ~mask_LL, -math.inf
    )


def _fused_mask(group: Group, half_window: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to a group's scores, (n or 1, 1, L or 1, L); None: nothing."""
    window_LL = _window_mask(group.length, half_window, torch.device("cpu"))
    window = None if window_LL is None else _additive(window_LL, dtype)[None, None]
    if group.penalty_n11L is None:
        return window
    penalty = group.penalty_n11L.to(dtype)
    return penalty if window is None else penalty + window


def _probabilities(
    q: Tensor, k: Tensor, group: Group, bias_HLL: Tensor | None, half_window: int
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) inside the window, (n, H, L, L) in q's dtype."""
    length = group.length
    scores = _scaled_product(q, k.mT, 1 / math.sqrt(q.shape[-1]))
    if bias_HLL is not None:
        covered = min(length, bias_HLL.shape[1])  # a padded group may be longer than every text
        scores[..., :covered, :covered] += bias_HLL[:, :covered, :covered].to(scores.dtype)
    if group.cell_t is not None and length > 64:  # a fill a text costs less than a sum of all
        for i, n in enumerate(group.lengths):
            scores[i, :, :, n:].fill_(_OUTSIDE)
    elif group.cell_t is not None:
        scores += group.penalty_n11L.to(scores.dtype)
    mask = _window_mask(length, half_window, q.device)
    if mask is not None:
        scores.masked_fill_(~mask, -math.inf)
    return torch.softmax(scores, -1)


def _padded_attention(
    qkv_T3HK: Tensor,
    bias_HLL: Tensor | None,
    index_SL: Tensor,
    mask_SL: Tensor,
    half_window: int,
    dropout: float,
) -> Tensor:
    """The same through scaled_dot_product_attention on one padded rectangle.

    index_SL  token number of each cell (0 where padding); mask_SL  True on real tokens
    """
    L = index_SL.shape[1]
    q, k, v = qkv_T3HK[index_SL].permute(2, 0, 3, 1, 4).unbind(0)
    mask = mask_SL[:, None, None, :]
    window = _window_mask(L, half_window, q.device)
    if window is not None:
        mask = mask & (
            window | ~mask_SL[:, None, :, None]
        )  # a padded row must not be empty: softmax(-inf..) is nan
    if bias_HLL is not None:
        mask = bias_HLL[None, :, :L, :L].to(q.dtype).masked_fill(~mask, -math.inf)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return o.transpose(1, 2)[mask_SL]


def _varlen_attention(
    qkv_T3HK: Tensor, cu_lengths_S1: Tensor, max_length: int, half_window: int
) -> Tensor:
    """The same through torch.nn.attention.varlen (CUDA, 16-bit)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv_T3HK.unbind(1)
    window = (
        {}
        if half_window <= 0 or max_length <= half_window + 1
        else {"window_size": (half_window, half_window)}
    )
    return varlen_attn(q, k, v, cu_lengths_S1, cu_lengths_S1, max_length, max_length, **window)
