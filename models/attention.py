"""Attention over packed sequences: one place chooses how it is computed, and says so once.

Shapes: T tokens of all sequences, S sequences, n sequences of one length L, H heads, K head width,
C = H * K.
"""

import inspect
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.transformer import Packed

log = logging.getLogger(__name__)

# A group is (first token, number of sequences, their common length).
Group = tuple[int, int, int]


def length_groups(lengths: list[int]) -> list[Group]:
    """Runs of neighbouring sequences of equal length; few when the pack is sorted by length."""
    groups: list[Group] = []
    start = 0
    for length in lengths:
        if groups and groups[-1][2] == length:
            first, count, _ = groups[-1]
            groups[-1] = (first, count + 1, length)
        else:
            groups.append((start, 1, length))
        start += length
    return groups


def choose_attention(device_type: str, dtype: torch.dtype, *, bias: bool, dropout: float) -> str:
    """Name of the way to compute attention: varlen | grouped | padded.

    varlen   torch.nn.attention.varlen: CUDA, bf16/fp16, no bias, no dropout
    grouped  our autograd function over groups of equal length: the CPU's fastest; no dropout
    padded   scaled_dot_product_attention over one padded rectangle: everything else
    """
    if dropout > 0:
        return "padded"
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not bias:
        return "varlen" if _has_varlen() else "padded"
    return "grouped" if device_type == "cpu" else "padded"


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
    "grouped": "groups of equal length",
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
        return GroupedAttention.apply(qkv_T3HK, bias_HLL, packed.groups, half_window)
    return _padded_attention(qkv_T3HK, bias_HLL, *packed.rectangle, half_window, dropout)


def _window_mask(length: int, half_window: int, device: torch.device) -> Tensor | None:
    """(L, L) bool, True where |i - j| <= half_window; None when the window covers everything."""
    if half_window <= 0 or length <= half_window + 1:
        return None
    at = torch.arange(length, device=device)
    return (at[:, None] - at[None, :]).abs() <= half_window


class GroupedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K) + bias) v over groups of equal length, as one autograd node.

    One node instead of a slice per group: autograd's backward of a slice adds a full zero tensor
    per group.
    Nothing of size L x L is kept: the backward recomputes it, or runs the fused kernel's own.
    """

    @staticmethod
    def forward(
        ctx, qkv_T3HK: Tensor, bias_HLL: Tensor | None, groups: list[Group], half_window: int
    ) -> Tensor:
        T, _, H, K = qkv_T3HK.shape
        out_THK = qkv_T3HK.new_empty(T, H, K)
        log_sums = []
        for first, count, length in groups:
            tokens = slice(first, first + count * length)
            q, k, v = _heads_first(qkv_T3HK[tokens], count, length)
            if _fused(qkv_T3HK, bias_HLL):
                mask = _window_mask(length, half_window, qkv_T3HK.device)
                mask = None if mask is None else _additive(mask, q.dtype)
                o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k, v, attn_mask=mask
                )
                log_sums.append(log_sum)
            else:
                o = torch.matmul(_probabilities(q, k, bias_HLL, half_window), v)
            out_THK[tokens].view(count, length, H, K).copy_(o.transpose(1, 2))
        ctx.save_for_backward(qkv_T3HK, bias_HLL, out_THK, *log_sums)
        ctx.groups, ctx.half_window = groups, half_window
        return out_THK

    @staticmethod
    def backward(ctx, grad_THK: Tensor):
        qkv_T3HK, bias_HLL, out_THK, *log_sums = ctx.saved_tensors
        _, _, H, K = qkv_T3HK.shape
        grad_qkv_T3HK = torch.empty_like(qkv_T3HK)
        wants_bias = bias_HLL is not None and ctx.needs_input_grad[1]
        grad_bias_HLL = None
        if wants_bias:
            wide = torch.promote_types(bias_HLL.dtype, torch.float32)
            grad_bias_HLL = torch.zeros_like(bias_HLL, dtype=wide)
        for i, (first, count, length) in enumerate(ctx.groups):
            tokens = slice(first, first + count * length)
            q, k, v = _heads_first(qkv_T3HK[tokens], count, length)
            g = grad_THK[tokens].view(count, length, H, K).transpose(1, 2)
            if log_sums:
                o = out_THK[tokens].view(count, length, H, K).transpose(1, 2)
                mask = _window_mask(length, ctx.half_window, q.device)
                mask = None if mask is None else _additive(mask, q.dtype)
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    g, q, k, v, o, log_sums[i], 0.0, False, attn_mask=mask
                )
            else:
                p = _probabilities(q, k, bias_HLL, ctx.half_window)
                dp = torch.matmul(g, v.transpose(-1, -2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                if wants_bias:
                    grad_bias_HLL[:, :length, :length] += ds.sum(0, dtype=wide)
                dv = torch.matmul(p.transpose(-1, -2), g)
                ds = ds.mul_(1 / math.sqrt(K))
                dq, dk = torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q)
            into = grad_qkv_T3HK[tokens].view(count, length, 3, H, K)
            for slot, part in enumerate((dq, dk, dv)):
                into[:, :, slot].copy_(part.transpose(1, 2))
        if wants_bias:
            grad_bias_HLL = grad_bias_HLL.to(bias_HLL.dtype)
        return grad_qkv_T3HK, grad_bias_HLL, None, None


def _heads_first(qkv: Tensor, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n L, 3, H, K) -> three views (n, H, L, K)."""
    _, _, H, K = qkv.shape
    return qkv.view(count, length, 3, H, K).permute(2, 0, 3, 1, 4).unbind(0)


def _fused(qkv_T3HK: Tensor, bias_HLL: Tensor | None) -> bool:
    # Measured on AVX-512 BF16 hardware: the fused CPU kernel's backward loses to plain bmm in bf16,
    # wins in fp32.
    return bias_HLL is None and qkv_T3HK.dtype != torch.bfloat16 and qkv_T3HK.device.type == "cpu"


def _additive(mask_LL: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask_LL.shape, dtype=dtype, device=mask_LL.device).masked_fill_(
        ~mask_LL, -math.inf
    )


def _probabilities(q: Tensor, k: Tensor, bias_HLL: Tensor | None, half_window: int) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) inside the window, (n, H, L, L) in q's dtype."""
    length = q.shape[-2]
    scores = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    if bias_HLL is not None:
        scores += bias_HLL[:, :length, :length].to(scores.dtype)
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
