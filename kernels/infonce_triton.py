"""Log-sum-exps, or sums of softplus, over a similarity matrix that is never whole in memory.

In Triton: rows, columns and all Matryoshka prefixes in one sweep; any upstream gradient; bounded
workspace; no atomics, so that two runs give the same bits. Needs torch and triton, nothing else.

Shapes: B queries, N candidates, D embedding, M Matryoshka dims, K relatives of a query at most,
c rows of a chunk, T tiles along an axis, S features after padding every segment.

z[m, i, j] = row_factor[m, i] * column_factor[m, j] * (dot product over the first dims[m] features).
Inside the kernels z is in base 2. What the paths do, what they cost and what of it was measured:
README.md beside this file.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

log = logging.getLogger(__name__)

PATHS = ("auto", "fused", "chunk", "eform", "dense")

_LOG2E = 1.4426950408889634
LOG2E = tl.constexpr(_LOG2E)
_DENSE_CELLS = 2**22  # B * N * M below which one matrix in torch is as good as anything
_TABLE_BYTES = 2**28  # partial sums of one forward chunk at most
# Rows of a chunk at least, for one dim and for several, with the default workspace (less in
# proportion): a chunk reads and writes the float32 gradient of all candidates once, as long as 217
# rows' products take (4.3 TB/s, 700 TFLOP/s). 896: five dims of 65,536 x 768 still fit into 1 GiB
_LEAST_ROWS = 2048, 896


# ----------------------------------------------------------------------------------------------
# tiles: what each kernel runs with


@dataclass(frozen=True)
class Tile:
    """rows x columns of z per program, features per step, and the launch options of Triton."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    tma: bool = False  # operands by the tensor memory accelerator instead of pointers (sm_90)
    held: int = 2  # planes kernel, several dims: planes kept in registers for suffix sums


# (kernel, dims, bytes of an element) -> tile; dims is "one", "many", or where a tile of its own is
# needed "both" and "many both", with limits of rows and columns, or, for several dims, "softplus",
# with a bias, and "ragged", with columns or a bias where 16 does not divide B or N: addresses then
# take more registers. README.md lists what they compile to.
TILES_90 = {
    ("sums", "one", 2): Tile(128, 128, 64, 8, 3, tma=True),
    ("sums", "many", 2): Tile(128, 128, 64, 8, 3, tma=True),
    ("sums", "many both", 2): Tile(128, 64, 64, 8, 3, tma=True),
    ("sums", "softplus", 2): Tile(128, 64, 64, 8, 3, tma=True),
    ("sums", "ragged", 2): Tile(128, 64, 64, 8, 3, tma=True),
    ("planes", "one", 2): Tile(128, 128, 64, 8, 3, tma=True),
    ("planes", "both", 2): Tile(128, 64, 64, 8, 3, tma=True),
    ("planes", "many", 2): Tile(128, 64, 64, 8, 3, tma=True),
    ("planes", "many both", 2): Tile(128, 64, 64, 8, 3, tma=True, held=1),
    ("planes", "ragged", 2): Tile(128, 32, 64, 8, 3, tma=True),
    ("exps", "one", 2): Tile(128, 128, 64, 8, 3, tma=True),
    ("sums", "one", 4): Tile(64, 64, 32, 8, 3, tma=True),
    ("sums", "many", 4): Tile(64, 64, 32, 8, 3, tma=True),
    ("planes", "one", 4): Tile(64, 64, 32, 8, 3, tma=True),
    ("planes", "many", 4): Tile(64, 64, 32, 8, 3, tma=True, held=1),
    ("exps", "one", 4): Tile(64, 64, 32, 8, 3, tma=True),
}
TILES_80 = {key: replace(tile, tma=False) for key, tile in TILES_90.items()} | {
    ("sums", "one", 4): Tile(64, 64, 32, 4, 3),
    ("planes", "one", 4): Tile(64, 64, 32, 4, 3),
    ("exps", "one", 4): Tile(64, 64, 32, 4, 3),
    ("sums", "many", 2): Tile(128, 64, 64, 8, 3),
    ("sums", "many both", 2): Tile(64, 64, 64, 8, 3),
    ("sums", "ragged", 2): Tile(64, 64, 64, 8, 3),
    ("planes", "both", 2): Tile(128, 128, 64, 8, 3),
    ("planes", "many", 2): Tile(128, 32, 64, 8, 3),
    ("planes", "many both", 2): Tile(128, 32, 64, 8, 3),
}
TILE_INTERPRETED = Tile(16, 32, 16, 4, 1)
_GROUP = 8  # row tiles that walk over the columns together, sharing them in the L2 cache


# ----------------------------------------------------------------------------------------------
# kernels


@triton.jit
def _place(c, N, BR: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr):
    """Tile of this program: GROUP row tiles go down before the next column tile is taken."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(c, BR)
    column_tiles = tl.cdiv(N, BC)
    group_size = GROUP * column_tiles
    first = (program // group_size) * GROUP
    rows_here = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + (program % group_size) % rows_here
    column_tile = (program % group_size) // rows_here
    return row_tile, column_tile


@triton.jit
def _pointers(q, p, rows, columns, c, N, S: tl.constexpr, BF: tl.constexpr):
    """To the first features of a tile's rows and columns. Beyond the end the last one is read
    again: cheaper than a mask on every load."""
    features = tl.arange(0, BF)
    q = q + tl.minimum(rows, c - 1).to(tl.int64)[:, None] * S + features[None, :]
    p = p + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * S + features[None, :]
    return q, p


@triton.jit
def _add_segment(
    acc, q, p, first_row, first_column, lo: tl.constexpr, hi: tl.constexpr, BF: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + the dot products over features lo..hi, a multiple of BF: no mask in the hot loop. q and
    p are blocks of pointers or, with TMA, descriptors."""
    for f in range(lo, hi, BF):
        if TMA:
            q_tile = q.load([first_row, f])
            p_tile = p.load([first_column, f])
        else:
            q_tile = tl.load(q + f)
            p_tile = tl.load(p + f)
        if UPCAST:  # the interpreter multiplies bf16 wrongly without a word
            q_tile = q_tile.to(tl.float32)
            p_tile = p_tile.to(tl.float32)
        acc = tl.dot(q_tile, tl.trans(p_tile), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _has_holes(rows, columns, first_column, c, N, relatives, K, BC: tl.constexpr):
    """Whether the tile sticks out of the matrix or holds a relative: most tiles do neither."""
    hits = ((rows >= c) | (first_column + BC > N)).to(tl.int32)
    for k in range(K):
        relative = tl.load(relatives + rows.to(tl.int64) * K + k, mask=rows < c, other=-1)
        inside = (relative >= first_column) & (relative < first_column + BC)
        hits = hits | inside.to(tl.int32)
    return tl.max(hits, 0) > 0


@triton.jit
def _fill_holes(x, value, has_holes, rows, columns, c, N, relatives, K):
    """x with `value` where a cell is no cell or a relative."""
    if has_holes:
        x = tl.where((rows < c)[:, None] & (columns < N)[None, :], x, value)
        for k in range(K):  # x and no mask goes round: a tile's worth of registers less
            relative = tl.load(relatives + rows.to(tl.int64) * K + k, mask=rows < c, other=-1)
            x = tl.where(relative[:, None] == columns[None, :], value, x)
    return x


@triton.jit
def _softplus(x):
    """log(1 + 2^x), natural, by the series of atanh: 1 + 2^x itself would lose a small 2^x."""
    e = tl.exp2(-tl.abs(x))
    s = e / (2.0 + e)
    t = s * s
    series = 1 / 7 + t * (1 / 9 + t * (1 / 11 + t / 13))
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * series))
    return tl.maximum(x, 0.0) / LOG2E + 2.0 * s * series


@triton.jit
def _sums_kernel(
    q, p, row_factor, column_factor, relatives, row_limit, column_limit, bias,
    row_part, column_part,
    c, N, K, row_stride, column_stride, row_limit_stride, column_limit_stride,
    S: tl.constexpr, ENDS: tl.constexpr, M: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, GROUP: tl.constexpr,
    ROW_LIMIT: tl.constexpr, COLUMN_LIMIT: tl.constexpr, COLUMNS: tl.constexpr,
    SOFTPLUS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """row_part (M, T, c) and column_part (M, T, N): base-2 log-sum-exps of each tile. With SOFTPLUS
    row_part alone: sums of softplus(z + bias)."""
    row_tile, column_tile = _place(c, N, BR, BC, GROUP)
    row_tiles, column_tiles = tl.cdiv(c, BR), tl.cdiv(N, BC)
    rows = row_tile * BR + tl.arange(0, BR)
    columns = column_tile * BC + tl.arange(0, BC)
    is_row, is_column = rows < c, columns < N
    if not TMA:
        q, p = _pointers(q, p, rows, columns, c, N, S, BF)
    has_holes = _has_holes(rows, columns, column_tile * BC, c, N, relatives, K, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    for m in tl.static_range(M):
        acc = _add_segment(acc, q, p, row_tile * BR, column_tile * BC,
                           0 if m == 0 else ENDS[m - 1], ENDS[m], BF, TMA, PRECISION,
                           UPCAST)  # fmt: skip
        a = tl.load(row_factor + m * row_stride + rows, mask=is_row, other=0.0) * LOG2E
        b = tl.load(column_factor + m * column_stride + columns, mask=is_column, other=0.0)
        z = acc * a[:, None] * b[None, :]
        z = _fill_holes(z, float("-inf"), has_holes, rows, columns, c, N, relatives, K)
        x = z
        if ROW_LIMIT:
            limit = tl.load(row_limit + m * row_limit_stride + rows, mask=is_row, other=0.0)
            x = tl.where(z <= (limit * LOG2E)[:, None], z, float("-inf"))
        if SOFTPLUS:
            part = tl.sum(_softplus(x + tl.load(bias) * LOG2E), 1)
        else:
            top = tl.max(x, 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            part = top + tl.log2(tl.sum(tl.exp2(x - top[:, None]), 1))
        tl.store(row_part + (m * column_tiles + column_tile).to(tl.int64) * c + rows, part,
                 mask=is_row)  # fmt: skip
        if COLUMNS:
            x = z
            if COLUMN_LIMIT:
                limit = tl.load(column_limit + m * column_limit_stride + columns, mask=is_column,
                                other=0.0)  # fmt: skip
                x = tl.where(z <= (limit * LOG2E)[None, :], z, float("-inf"))
            top = tl.max(x, 0)
            top = tl.where(top == float("-inf"), 0.0, top)
            part = top + tl.log2(tl.sum(tl.exp2(x - top[None, :]), 0))
            tl.store(column_part + (m * row_tiles + row_tile).to(tl.int64) * N + columns, part,
                     mask=is_column)  # fmt: skip


@triton.jit
def _combine_kernel(
    part, out, n, tiles, out_stride,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out (M, n) = log2-sum-exp2 over the T tiles of part (M, T, n), and over out with KEEP."""
    m = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < n
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    if KEEP:
        top = tl.load(out + m * out_stride + at, mask=is_in, other=float("-inf"))
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in range(0, tiles, STEP):
        tile = first + tl.arange(0, STEP)
        pointers = part + (m * tiles + tile).to(tl.int64)[:, None] * n + at[None, :]
        x = tl.load(pointers, mask=(tile < tiles)[:, None] & is_in[None, :], other=float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[None, :]), 0)
        top = new
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out + m * out_stride + at, base + tl.log2(total), mask=is_in)


@triton.jit
def _planes_kernel(
    q, p, row_factor, column_factor, relatives, row_limit, column_limit, bias,
    row_log, column_log, row_grad, column_grad, planes, row_part, column_part, bias_part,
    c, N, K, row_stride, column_stride, row_limit_stride, column_limit_stride,
    row_log_stride, row_grad_stride, plane_rows, plane_columns,
    S: tl.constexpr, ENDS: tl.constexpr, M: tl.constexpr, HELD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, GROUP: tl.constexpr,
    ROW_LIMIT: tl.constexpr, COLUMN_LIMIT: tl.constexpr, COLUMNS: tl.constexpr,
    SOFTPLUS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W = row_factor * column_factor * dL/dz of every dim, formed in float32, stored narrow.

    The last HELD + 1 planes are stored as suffix sums over the dims, those before as they are. For
    several dims row_part (M, T, c) and column_part (M, T, N) get each tile's sums of dL/dz * z.
    With SOFTPLUS bias_part (M, T, c) gets those of dL/dz.
    """
    row_tile, column_tile = _place(c, N, BR, BC, GROUP)
    row_tiles, column_tiles = tl.cdiv(c, BR), tl.cdiv(N, BC)
    rows = row_tile * BR + tl.arange(0, BR)
    columns = column_tile * BC + tl.arange(0, BC)
    is_row, is_column = rows < c, columns < N
    if not TMA:
        q, p = _pointers(q, p, rows, columns, c, N, S, BF)
    has_holes = _has_holes(rows, columns, column_tile * BC, c, N, relatives, K, BC)
    # planes are padded to whole tiles: nothing to mask, and every store stays wide
    cells = planes + rows.to(tl.int64)[:, None] * plane_columns + columns[None, :]
    plane_size = plane_rows.to(tl.int64) * plane_columns
    acc = tl.zeros([BR, BC], tl.float32)
    held = ()
    for m in tl.static_range(M):
        acc = _add_segment(acc, q, p, row_tile * BR, column_tile * BC,
                           0 if m == 0 else ENDS[m - 1], ENDS[m], BF, TMA, PRECISION,
                           UPCAST)  # fmt: skip
        a = tl.load(row_factor + m * row_stride + rows, mask=is_row, other=0.0)
        b = tl.load(column_factor + m * column_stride + columns, mask=is_column, other=0.0)
        z = acc * (a * LOG2E)[:, None] * b[None, :]
        grad = tl.load(row_grad + m * row_grad_stride + rows, mask=is_row, other=0.0)
        if SOFTPLUS:
            g = grad[:, None] / (1.0 + tl.exp2(-z - tl.load(bias) * LOG2E))
        else:
            base = tl.load(row_log + m * row_log_stride + rows, mask=is_row, other=0.0)
            g = tl.exp2(z - base[:, None]) * grad[:, None]
        if ROW_LIMIT:
            limit = tl.load(row_limit + m * row_limit_stride + rows, mask=is_row, other=0.0)
            g = tl.where(z <= (limit * LOG2E)[:, None], g, 0.0)
        if COLUMNS:
            base = tl.load(column_log + m * N + columns, mask=is_column, other=0.0)
            grad = tl.load(column_grad + m * N + columns, mask=is_column, other=0.0)
            g_column = tl.exp2(z - base[None, :]) * grad[None, :]
            if COLUMN_LIMIT:
                limit = tl.load(column_limit + m * column_limit_stride + columns, mask=is_column,
                                other=0.0)  # fmt: skip
                g_column = tl.where(z <= (limit * LOG2E)[None, :], g_column, 0.0)
            g += g_column
        g = _fill_holes(g, 0.0, has_holes, rows, columns, c, N, relatives, K)
        if SOFTPLUS:
            tl.store(bias_part + (m * column_tiles + column_tile).to(tl.int64) * c + rows,
                     tl.sum(g, 1), mask=is_row)  # fmt: skip
        if M > 1:
            gz = g * z
            tl.store(row_part + (m * column_tiles + column_tile).to(tl.int64) * c + rows,
                     tl.sum(gz, 1) / LOG2E, mask=is_row)  # fmt: skip
            tl.store(column_part + (m * row_tiles + row_tile).to(tl.int64) * N + columns,
                     tl.sum(gz, 0) / LOG2E, mask=is_column)  # fmt: skip
        w = g * a[:, None] * b[None, :]
        if m >= M - 1 - HELD and m < M - 1:
            held = held + (w.to(planes.dtype.element_ty),)  # noqa: RUF005 (Triton has no *)
        else:
            tl.store(cells + m * plane_size, w.to(planes.dtype.element_ty))
            if m == M - 1:
                for back in tl.static_range(HELD):
                    w += held[HELD - 1 - back].to(tl.float32)
                    tl.store(cells + (M - 2 - back) * plane_size, w.to(planes.dtype.element_ty))


@triton.jit
def _exps_kernel(
    q, p, row_factor, column_factor, relatives, row_limit, reference, exps, row_part,
    c, N, K, exp_columns,
    S: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr, GROUP: tl.constexpr,
    ROW_LIMIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """exps (c, N) = column_factor * exp2(z - reference); row_part (T, c): sums without the factor.

    The reference is fixed, so nothing waits for a maximum and what is stored needs no second pass.
    """
    row_tile, column_tile = _place(c, N, BR, BC, GROUP)
    rows = row_tile * BR + tl.arange(0, BR)
    columns = column_tile * BC + tl.arange(0, BC)
    is_row, is_column = rows < c, columns < N
    if not TMA:
        q, p = _pointers(q, p, rows, columns, c, N, S, BF)
    has_holes = _has_holes(rows, columns, column_tile * BC, c, N, relatives, K, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    acc = _add_segment(acc, q, p, row_tile * BR, column_tile * BC, 0, S, BF, TMA, PRECISION,
                       UPCAST)  # fmt: skip
    a = tl.load(row_factor + rows, mask=is_row, other=0.0) * LOG2E
    b = tl.load(column_factor + columns, mask=is_column, other=0.0)
    z = acc * a[:, None] * b[None, :]
    e = tl.exp2(z - tl.load(reference + rows, mask=is_row, other=0.0)[:, None])
    if ROW_LIMIT:
        limit = tl.load(row_limit + rows, mask=is_row, other=0.0)
        e = tl.where(z <= (limit * LOG2E)[:, None], e, 0.0)
    e = _fill_holes(e, 0.0, has_holes, rows, columns, c, N, relatives, K)
    tl.store(row_part + column_tile.to(tl.int64) * c + rows, tl.sum(e, 1), mask=is_row)
    cells = exps + rows.to(tl.int64)[:, None] * exp_columns + columns[None, :]
    tl.store(cells, (e * b[None, :]).to(exps.dtype.element_ty))


@triton.jit
def _row_scores(
    dots, row, first, N, a, limit, column_factor, relatives, K,
    BLOCK: tl.constexpr, ROW_LIMIT: tl.constexpr,
):  # fmt: skip
    """z of one row from column `first` on; -inf where a cell does not count."""
    columns = first + tl.arange(0, BLOCK)
    is_column = columns < N
    b = tl.load(column_factor + columns, mask=is_column, other=0.0)
    z = tl.load(dots + row.to(tl.int64) * N + columns, mask=is_column, other=0.0) * a * b
    z = tl.where(is_column, z, float("-inf"))
    if ROW_LIMIT:
        z = tl.where(z <= limit, z, float("-inf"))
    for k in range(K):
        relative = tl.load(relatives + row.to(tl.int64) * K + k)
        if (relative >= first) & (relative < first + BLOCK):
            z = tl.where(columns != relative, z, float("-inf"))
    return z, b, columns


@triton.jit
def _row_log_kernel(
    dots, row_factor, column_factor, relatives, row_limit, out, N, K,
    BLOCK: tl.constexpr, ROW_LIMIT: tl.constexpr,
):  # fmt: skip
    """out (c,): base-2 log-sum-exp of each row of a product (c, N) that a library has made."""
    row = tl.program_id(0)
    a = tl.load(row_factor + row) * LOG2E
    limit = 0.0
    if ROW_LIMIT:
        limit = tl.load(row_limit + row) * LOG2E
    # a maximum and a sum per lane: one reduction a row instead of one a block
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        z, _, _ = _row_scores(dots, row, first, N, a, limit, column_factor, relatives, K, BLOCK,
                              ROW_LIMIT)  # fmt: skip
        new = tl.maximum(top, z)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.exp2(z - base)
        top = new
    best = tl.max(top, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(out + row, base + tl.log2(tl.sum(total * tl.exp2(top - base), 0)))


@triton.jit
def _row_grad_kernel(
    dots, row_factor, column_factor, relatives, row_limit, row_log, row_grad, plane, N, K,
    plane_columns, BLOCK: tl.constexpr, ROW_LIMIT: tl.constexpr,
):  # fmt: skip
    """plane (c, N) = W of the planes kernel, from a product that a library has made."""
    row = tl.program_id(0)
    a = tl.load(row_factor + row)
    base = tl.load(row_log + row)
    grad = tl.load(row_grad + row) * a
    limit = 0.0
    if ROW_LIMIT:
        limit = tl.load(row_limit + row) * LOG2E
    for first in range(0, N, BLOCK):
        z, b, columns = _row_scores(dots, row, first, N, a * LOG2E, limit, column_factor, relatives,
                                    K, BLOCK, ROW_LIMIT)  # fmt: skip
        w = tl.exp2(z - base) * grad * b
        tl.store(plane + row.to(tl.int64) * plane_columns + columns,
                 w.to(plane.dtype.element_ty), mask=columns < N)  # fmt: skip


INTERPRETING = not isinstance(_sums_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 at import


# ----------------------------------------------------------------------------------------------
# the call


RowGradient = Callable[[int, int, int, Tensor], Tensor]


@torch.compiler.disable  # under torch.compile: a graph break, not a trace of the launches
def sweep(
    q_BD: Tensor,
    p_ND: Tensor,
    row_factor_MB: Tensor,
    column_factor_MN: Tensor,
    *,
    dims: Sequence[int],
    relatives_BK: Tensor | None = None,
    row_limit_MB: Tensor | None = None,
    column_limit_MN: Tensor | None = None,
    want_columns: bool = False,
    path: str = "auto",
    workspace_mib: float = 1024,
    row_gradient: RowGradient | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log sum exp(z) over rows (M, B) and, where wanted, over columns (M, N); natural logarithms.

    q_BD, p_ND       fp32, bf16 or fp16 (another type on one side: both are promoted)
    row_factor_MB, column_factor_MN   float32; for cosines over temperature: scale / norm of the
                     query's prefix, and 1 / norm of the candidate's
    dims             ascending; any size
    relatives_BK     columns that count in no sum, integers, padded with -1: a query's positives
    row_limit_MB, column_limit_MN  a cell counts in a row's (column's) sum only while z <= limit;
                     M may be 1 for the same limit at every dim. No gradient reaches them
    path             one of PATHS; "auto" picks by the table in `choose`. "chunk" and "eform" know
                     rows only and walk over several dims one by one
    workspace_mib    memory beyond inputs, outputs and gradients (that of "dense" is not bounded).
                     It gives way where float32 gradients leave too little for chunks of 2048 rows,
                     896 with several dims on "fused" (under 1024 MiB in proportion)
    row_gradient     (m, lo, hi, row_c) -> the gradient the loss will have by the sums of rows
                     lo..hi at dim m, where the caller can foretell it. "chunk" and "eform" then
                     compute gradients in the forward: 6 instead of 8 B N D operations. The backward
                     compares it with the truth (one device sync) and computes again where they
                     differ by more than a common factor
    A sum over nothing is -inf and has no gradient. Gradients reach the first four arguments; the
    order of all sums is fixed. Raises ValueError when shapes, dims, types or the path do not fit.
    """
    dims = tuple(int(d) for d in dims)
    _check(q_BD, p_ND, row_factor_MB, column_factor_MN, dims, relatives_BK)
    limits = _limits(row_limit_MB, column_limit_MN, want_columns, len(dims), q_BD, p_ND)
    dtype = torch.promote_types(q_BD.dtype, p_ND.dtype)
    _check_path(path, dtype, q_BD.device.type, "sums of columns" if want_columns else "rows")
    path = choose(
        path, len(q_BD), len(p_ND), len(dims), want_columns, dtype, q_BD.device.type,
        row_gradient is not None,
    )  # fmt: skip
    # Triton launches on the current device, whatever the tensors' is
    with torch.autocast(q_BD.device.type, enabled=False), torch.cuda.device_of(q_BD):
        q_BD, p_ND = q_BD.to(dtype), p_ND.to(dtype)
        if path == "dense":
            return _dense(
                q_BD, p_ND, row_factor_MB, column_factor_MN, dims, relatives_BK, limits,
                want_columns,
            )  # fmt: skip
        if relatives_BK is not None:
            relatives_BK = relatives_BK.to(torch.int32).contiguous()
        factors = row_factor_MB.float(), column_factor_MN.float()
        if path == "fused":
            job = _Job(dims, relatives_BK, *limits, want_columns, workspace_mib)
            outputs = _Fused.apply(q_BD, p_ND, *factors, None, job)
            return outputs if want_columns else (outputs[0], None)
        rows, kept_bytes = [], 0
        for m, d in enumerate(dims):
            at = slice(m, m + 1)
            row_limit_1B = None if limits[0] is None else limits[0][at]
            job = _Job((d,), relatives_BK, row_limit_1B, None, False, workspace_mib, kept_bytes)
            foretell = functools.partial(row_gradient, m) if row_gradient else None
            given = q_BD, p_ND, factors[0][at], factors[1][at]
            row_1B, is_safe = _Rows.apply(*given, job, path, foretell)
            if path == "eform" and not is_safe:
                _log_once("similarity sums: exponentials out of range or an empty row; chunk")
                job = replace(job, copied_bytes=kept_bytes)
                row_1B, _ = _Rows.apply(*given, job, "chunk", foretell)
            kept_bytes = job.copied_bytes  # until the backward
            rows.append(row_1B)
        return torch.cat(rows), None


@torch.compiler.disable
def softplus_sweep(
    q_BD: Tensor,
    p_ND: Tensor,
    row_factor_MB: Tensor,
    column_factor_MN: Tensor,
    bias: Tensor,
    *,
    dims: Sequence[int],
    relatives_BK: Tensor | None = None,
    row_limit_MB: Tensor | None = None,
    path: str = "auto",
    workspace_mib: float = 1024,
) -> Tensor:
    """sum of softplus(z + bias) over rows, (M, B): the negatives of the pairwise sigmoid loss.

    bias  a scalar tensor; gradients reach it as well
    path  auto, fused or dense
    The rest as in sweep; a sum over nothing is 0. Source: Zhai et al. 2023 (SigLIP), eq. 1.
    """
    dims = tuple(int(d) for d in dims)
    _check(q_BD, p_ND, row_factor_MB, column_factor_MN, dims, relatives_BK)
    limits = _limits(row_limit_MB, None, False, len(dims), q_BD, p_ND)
    if bias.numel() != 1:
        raise ValueError(f"softplus_sweep: bias {tuple(bias.shape)}; want a scalar")
    dtype = torch.promote_types(q_BD.dtype, p_ND.dtype)
    _check_path(path, dtype, q_BD.device.type, "sums of softplus")
    path = choose(path, len(q_BD), len(p_ND), len(dims), False, dtype, q_BD.device.type, False)
    with torch.autocast(q_BD.device.type, enabled=False), torch.cuda.device_of(q_BD):
        q_BD, p_ND = q_BD.to(dtype), p_ND.to(dtype)
        given = q_BD, p_ND, row_factor_MB, column_factor_MN
        if path == "dense":
            return _dense(*given, dims, relatives_BK, limits, False, bias)[0]
        if relatives_BK is not None:
            relatives_BK = relatives_BK.to(torch.int32).contiguous()
        job = _Job(dims, relatives_BK, *limits, False, workspace_mib)
        factors = row_factor_MB.float(), column_factor_MN.float()
        return _Fused.apply(q_BD, p_ND, *factors, bias.float().reshape(1), job)[0]


def choose(
    path: str, B: int, N: int, M: int, want_columns: bool, dtype: torch.dtype, device: str,
    is_foretold: bool,
) -> str:  # fmt: skip
    """The table of paths, first line that fits; from estimates, none of it measured on a GPU."""
    table = (
        (path != "auto", path, "asked for"),
        (dtype == torch.float64, "dense", "float64"),
        (device != "cuda" and not INTERPRETING, "dense", f"no kernels on {device}"),
        (B * N * M <= _DENSE_CELLS, "dense", f"at most {_DENSE_CELLS} cells"),
        (
            M == 1 and not want_columns and dtype == torch.bfloat16 and is_foretold,
            "eform",
            "rows of one dim",
        ),
        (True, "fused", "several dims, columns, or a gradient not known beforehand"),
    )
    chosen, reason = next((p, why) for fits, p, why in table if fits)
    _log_once(f"similarity sums: {chosen} ({reason})")
    return chosen


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def _check(q_BD, p_ND, row_factor_MB, column_factor_MN, dims, relatives_BK) -> None:
    if q_BD.ndim != 2 or p_ND.ndim != 2 or q_BD.shape[1] != p_ND.shape[1]:
        raise ValueError(
            f"sweep: q {tuple(q_BD.shape)}, p {tuple(p_ND.shape)}; want (B, D), (N, D)"
        )
    B, N, D = len(q_BD), len(p_ND), q_BD.shape[1]
    if not dims or list(dims) != sorted(set(dims)) or not 0 < dims[0] <= dims[-1] <= D:
        raise ValueError(f"sweep: dims {list(dims)} must ascend from 1 to {D}")
    M = len(dims)
    got = tuple(row_factor_MB.shape), tuple(column_factor_MN.shape)
    if got != ((M, B), (M, N)):
        raise ValueError(
            f"sweep: factors of rows {got[0]} and columns {got[1]}; want {(M, B)}, {(M, N)}"
        )
    if relatives_BK is not None and (relatives_BK.ndim != 2 or len(relatives_BK) != B):
        raise ValueError(f"sweep: relatives {tuple(relatives_BK.shape)}; want ({B}, K)")
    if relatives_BK is not None and relatives_BK.is_floating_point():
        raise ValueError(f"sweep: relatives are {relatives_BK.dtype}; want integers")


def _check_path(path: str, dtype: torch.dtype, device: str, what: str) -> None:
    """what  "rows", "sums of columns" or "sums of softplus": what the path must be able to give"""
    if path not in PATHS:
        raise ValueError(f"sweep: no path {path!r}; there are {', '.join(PATHS)}")
    if path in ("auto", "dense"):
        return
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"sweep: path {path} computes in float32; for {dtype} take path='dense'")
    if device != "cuda" and not INTERPRETING:
        raise ValueError(
            f"sweep: path {path} needs a CUDA device, got {device}; take path='dense', or set"
            " TRITON_INTERPRET=1 before triton is imported (slow: for tests)"
        )
    if path == "fused":
        return
    if what != "rows":
        raise ValueError(f"sweep: path {path} has no {what}; take path='fused'")
    if dtype == torch.float16:
        raise ValueError(f"sweep: float16 has too small a range for path {path}; take 'fused'")


def _limits(row_limit_MB, column_limit_MN, want_columns, M, q_BD, p_ND):
    """Both limits as (M, n) float32, stride 0 over M where one serves all; None: no limit."""
    limits = []
    for name, limit, n in (
        ("row", row_limit_MB, len(q_BD)),
        ("column", column_limit_MN, len(p_ND)),
    ):
        if limit is None or (name == "column" and not want_columns):
            limits.append(None)
            continue
        if limit.ndim != 2 or limit.shape[0] not in (1, M) or limit.shape[1] != n:
            raise ValueError(f"sweep: {name} limit {tuple(limit.shape)}; want ({M} or 1, {n})")
        wide = limit.detach().to(torch.promote_types(limit.dtype, torch.float32)).contiguous()
        limits.append(wide.expand(M, n))
    return limits


# ----------------------------------------------------------------------------------------------
# what the paths share


@dataclass
class _Job:
    """What a sweep does, and the parts of it that carry no gradient."""

    dims: tuple[int, ...]
    relatives_BK: Tensor | None
    row_limit_MB: Tensor | None
    column_limit_MN: Tensor | None
    want_columns: bool
    workspace_mib: float
    copied_bytes: int = 0  # by padding; at the start, what other dims' jobs keep

    def tile(self, kernel: str, x: Tensor, has_bias: bool = False, is_ragged: bool = False) -> Tile:
        if INTERPRETING:
            return TILE_INTERPRETED
        major, _ = torch.cuda.get_device_capability(x.device)
        tiles = TILES_90 if major == 9 else TILES_80
        has_both = self.row_limit_MB is not None and self.column_limit_MN is not None
        if len(self.dims) > 1:
            own, usual = "softplus" if has_bias else "many both" if has_both else "", "many"
            if is_ragged and (self.want_columns or has_bias):
                own = "ragged"
        else:
            own, usual = "both" if has_both else "", "one"
        size = x.element_size()
        return tiles.get((kernel, own, size)) or tiles[kernel, usual, size]

    def padded(self, x_nD: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """x with every segment padded with zeros to whole steps of features, (n, S), and the end of
        each: a mask on features inside the hot loop would cost its wide, early loads. Starts at a
        multiple of 16 bytes, as descriptors must."""
        step = TILE_INTERPRETED.features if INTERPRETING else 128 // x_nD.element_size()
        widths = [-(-(hi - lo) // step) * step for lo, hi in _segments(self.dims)]
        ends = tuple(sum(widths[: m + 1]) for m in range(len(widths)))
        if ends == self.dims and x_nD.shape[1] == ends[-1]:
            x_nS = x_nD.contiguous()
            if x_nS.data_ptr() % 16:  # a view into something else
                x_nS = x_nS.clone()
                self.copied_bytes += x_nS.numel() * x_nS.element_size()
            return x_nS, ends
        x_nS = x_nD.new_zeros(len(x_nD), ends[-1])
        self.copied_bytes += x_nS.numel() * x_nS.element_size()
        for (lo, hi), (start, _) in zip(_segments(self.dims), _segments(ends), strict=True):
            x_nS[:, start : start + hi - lo] = x_nD[:, lo:hi]
        return x_nS, ends

    def unpadded(self, x_nS: Tensor, ends: tuple[int, ...], like_nD: Tensor) -> Tensor:
        if x_nS.shape == like_nD.shape and ends == self.dims:
            return x_nS.to(like_nD.dtype)
        x_nD = torch.zeros_like(like_nD)
        for (lo, hi), (start, _) in zip(_segments(self.dims), _segments(ends), strict=True):
            x_nD[:, lo:hi] = x_nS[:, start : start + hi - lo]
        return x_nD

    def room_beside(self, grad_q_BS: Tensor | None, grad_p_NS: Tensor | None, dtype) -> float:
        """Bytes of workspace beside padded copies and the wide form of narrow gradients."""
        room = self.workspace_mib * 2**20 - self.copied_bytes
        if dtype != torch.float32:
            room -= 4 * sum(x.numel() for x in (grad_q_BS, grad_p_NS) if x is not None)
        return room

    def chunks(self, B: int, row_bytes: int, room_bytes: float, step: int) -> list[tuple[int, int]]:
        """Rows lo..hi so that a chunk of `row_bytes` a row fits into the room; whole tiles (`step`)
        of one size but for the last. At least a tile, and about _LEAST_ROWS: the bound gives way,
        not the result or its time."""
        least = _LEAST_ROWS[len(self.dims) > 1] * min(1.0, self.workspace_mib / 1024)
        c = max(step, int(least) // step * step, int(room_bytes / row_bytes) // step * step)
        if c < B:  # equal chunks: no short one at the end that leaves the device idle
            pieces = -(-B // c)
            c = min(c, -(-B // (pieces * step)) * step)
        return [(lo, min(lo + c, B)) for lo in range(0, B, c)]


def _segments(ends: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *ends[:-1]), ends, strict=True))


def _relatives_of(job: _Job, lo: int, hi: int, like: Tensor) -> tuple[Tensor, int]:
    """A chunk's relatives and their number; a pointer that nobody follows where there are none."""
    if job.relatives_BK is None or job.relatives_BK.shape[1] == 0:
        return like.view(torch.int32), 0
    return job.relatives_BK[lo:hi], job.relatives_BK.shape[1]


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _options(tile: Tile) -> dict:
    """Shape of the tile, how tl.dot multiplies (float32 as torch's own switch says), launch."""
    is_fast = torch.get_float32_matmul_precision() != "highest" and not INTERPRETING
    return {
        "BR": tile.rows, "BC": tile.columns, "BF": tile.features, "GROUP": _GROUP,
        "TMA": tile.tma, "PRECISION": "tf32" if is_fast else "ieee", "UPCAST": INTERPRETING,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _given(q_cS: Tensor, p_NS: Tensor, tile: Tile) -> tuple:
    """The operands as a kernel takes them."""
    if not tile.tma:
        return q_cS, p_NS
    return (
        TensorDescriptor.from_tensor(q_cS, [tile.rows, tile.features]),
        TensorDescriptor.from_tensor(p_NS, [tile.columns, tile.features]),
    )


def _stored(x: Tensor) -> torch.dtype:
    """The type of stored planes; under the interpreter, which truncates, torch rounds later."""
    return torch.float32 if INTERPRETING else x.dtype


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y with float32 sums, in float32."""
    if x.dtype == torch.float32 or x.device.type != "cuda":  # no mixed product on a CPU
        return x.float() @ y.float()
    return torch.mm(x, y, out_dtype=torch.float32)


def _add_product(out_32: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x @ y with float32 sums, in place."""
    if x.dtype == torch.float32 or x.device.type != "cuda":
        out_32.addmm_(x.float(), y.float())
    elif _adds_in_place(x.dtype):
        torch.addmm(out_32, x, y, out_dtype=torch.float32, out=out_32)
    else:
        out_32.add_(_product(x, y))


@functools.cache
def _adds_in_place(dtype: torch.dtype) -> bool:
    """Whether this torch adds a narrow product to a float32 matrix in place: some releases refuse,
    some return garbage for `out=`. Asked once, of a small product in a wide matrix."""
    x = torch.arange(256, device="cuda").reshape(16, 16).remainder(7).to(dtype)
    base = torch.ones(16, 32, device="cuda")
    wanted = base.clone()
    wanted[:, :16] += x.float() @ x.float()
    try:
        out = base[:, :16]
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
        works = torch.equal(base, wanted)
    except (RuntimeError, TypeError):
        works = False
    if not works:
        _log_once(f"this torch cannot add {dtype} products to float32 in place; one copy more")
    return works


def _combine(part_MTn: Tensor, out_Mn: Tensor, keep: bool) -> None:
    M, tiles, n = part_MTn.shape
    block, step = (16, 16) if INTERPRETING else (64, 16)
    _combine_kernel[(triton.cdiv(n, block), M)](
        part_MTn, out_Mn, n, tiles, out_Mn.stride(0), KEEP=keep, BLOCK=block, STEP=step
    )


def _finite(x: Tensor) -> Tensor:
    """-inf (the log-sum of nothing) as 0, so that x - x is no nan."""
    return x.masked_fill(x == -math.inf, 0.0)


# ----------------------------------------------------------------------------------------------
# path "fused": one sweep for the sums, one for the gradient


class _Fused(torch.autograd.Function):
    """Rows and columns of all dims at once; each direction meets the matrix in tiles only.

    With W = row_factor * column_factor * dL/dz of each dim, and suffix sums over the dims from a
    segment's own upwards: dL/dq[segment] = W p[segment], dL/dp[segment] = W^T q[segment],
    dL/drow_factor = sum_j dL/dz z / row_factor, and so for columns.
    """

    @staticmethod
    def forward(ctx, q_BD, p_ND, row_factor_MB, column_factor_MN, bias, job: _Job):
        q_BS, ends = job.padded(q_BD)
        p_NS, _ = job.padded(p_ND)
        a_MB, b_MN = row_factor_MB.contiguous(), column_factor_MN.contiguous()
        row_MB, column_MN = _tile_sums(job, q_BS, p_NS, a_MB, b_MN, bias, ends)
        ctx.save_for_backward(q_BD, p_ND, q_BS, p_NS, a_MB, b_MN, bias, row_MB, column_MN)
        ctx.job, ctx.ends = job, ends
        if bias is not None:
            return (row_MB,)
        if job.want_columns:
            return row_MB / _LOG2E, column_MN / _LOG2E
        return (row_MB / _LOG2E,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_row_MB, grad_column_MN=None):
        q_BD, p_ND, q_BS, p_NS, a_MB, b_MN, bias, row_MB, column_MN = ctx.saved_tensors
        job, ends = ctx.job, ctx.ends
        for_q, for_p = ctx.needs_input_grad[0:4:2], ctx.needs_input_grad[1:4:2]
        grads = _Gradients(job, q_BS, p_NS, a_MB, b_MN, bias, ends, any(for_q), any(for_p))
        with torch.autocast(q_BS.device.type, enabled=False):
            grads.run(row_MB, column_MN, grad_row_MB, grad_column_MN)
        grad_q_BD = job.unpadded(grads.q_BS, ends, q_BD) if for_q[0] else None
        grad_p_ND = job.unpadded(grads.p_NS, ends, p_ND) if for_p[0] else None
        return grad_q_BD, grad_p_ND, grads.row_MB, grads.column_MN, grads.bias, None


def _tile_sums(
    job: _Job,
    q_BS: Tensor,
    p_NS: Tensor,
    a_MB: Tensor,
    b_MN: Tensor,
    bias: Tensor | None,
    ends: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Base-2 log-sums of rows and columns, (M, B) and (M, N); with a bias the rows' sums of
    softplus.
    """
    M, B, N = len(ends), len(q_BS), len(p_NS)
    tile = job.tile("sums", q_BS, bias is not None, bool(B % 16 or N % 16))
    column_tiles = triton.cdiv(N, tile.columns)
    row_MB = a_MB.new_full((M, B), -math.inf if bias is None else 0.0)
    column_MN = a_MB.new_full((M, N), -math.inf) if job.want_columns else None
    if N == 0:
        return row_MB, column_MN
    row_bytes = 4 * M * (column_tiles + (-(-N // tile.rows) if job.want_columns else 0))
    room = min(job.workspace_mib * 2**20, _TABLE_BYTES)
    for lo, hi in job.chunks(B, row_bytes, room, tile.rows):
        c, row_tiles = hi - lo, triton.cdiv(hi - lo, tile.rows)
        row_part_MTc = a_MB.new_empty(M, column_tiles, c)
        column_part_MTN = a_MB.new_empty(M, row_tiles, N) if job.want_columns else row_part_MTc
        relatives, K = _relatives_of(job, lo, hi, a_MB)
        row_limit = None if job.row_limit_MB is None else job.row_limit_MB[:, lo:hi]
        _sums_kernel[(row_tiles * column_tiles,)](
            *_given(q_BS[lo:hi], p_NS, tile), a_MB[:, lo:hi], b_MN, relatives,
            a_MB if row_limit is None else row_limit,
            b_MN if job.column_limit_MN is None else job.column_limit_MN,
            a_MB if bias is None else bias, row_part_MTc, column_part_MTN, c, N, K,
            a_MB.stride(0), b_MN.stride(0), _stride(row_limit), _stride(job.column_limit_MN),
            S=ends[-1], ENDS=ends, M=M, ROW_LIMIT=row_limit is not None,
            COLUMN_LIMIT=job.column_limit_MN is not None, COLUMNS=job.want_columns,
            SOFTPLUS=bias is not None, **_options(tile),
        )  # fmt: skip
        if bias is None:
            _combine(row_part_MTc, row_MB[:, lo:hi], keep=False)
        else:
            row_MB[:, lo:hi] = row_part_MTc.sum(1)
        if job.want_columns:
            _combine(column_part_MTN, column_MN, keep=lo > 0)
        del row_part_MTc, column_part_MTN  # before the next chunk's are made
    return row_MB, column_MN


class _Gradients:
    """The second sweep: planes of W for a chunk of rows, then plain matrix products."""

    def __init__(self, job: _Job, q_BS, p_NS, a_MB, b_MN, bias, ends, for_q: bool, for_p: bool):
        self.job, self.ends, self.M = job, ends, len(ends)
        self.in_q_BS, self.in_p_NS, self.a_MB, self.b_MN = q_BS, p_NS, a_MB, b_MN
        self.in_bias = bias
        self.bias = None if bias is None else torch.zeros_like(bias)
        self.q_BS = torch.zeros_like(q_BS, dtype=torch.float32) if for_q else None
        self.p_NS = torch.zeros_like(p_NS, dtype=torch.float32) if for_p else None
        self.row_MB, self.column_MN = torch.zeros_like(a_MB), torch.zeros_like(b_MN)

    def run(self, row_MB, column_MN, grad_row_MB, grad_column_MN) -> None:
        q_BS, p_NS, a_MB, b_MN, M = self.in_q_BS, self.in_p_NS, self.a_MB, self.b_MN, self.M
        job, B, N = self.job, len(q_BS), len(p_NS)
        if B == 0 or N == 0:
            return
        grad_row_MB = torch.zeros_like(a_MB) if grad_row_MB is None else grad_row_MB.float()
        has_columns = column_MN is not None and grad_column_MN is not None
        gain = _gain(q_BS.dtype, a_MB, b_MN, grad_row_MB, grad_column_MN)
        row_up_MB = (grad_row_MB * gain).contiguous()
        column_up_MN = (grad_column_MN.float() * gain).contiguous() if has_columns else b_MN
        has_bias = self.in_bias is not None
        row_log_MB = a_MB if has_bias else _finite(row_MB)
        column_log_MN = _finite(column_MN) if has_columns else b_MN
        tile = job.tile("planes", q_BS, has_bias, bool(B % 16 or N % 16))
        held = min(tile.held, M - 1)
        column_tiles = triton.cdiv(N, tile.columns)
        stored = _stored(q_BS)
        cell = 2 if stored != torch.float32 else 4
        row_bytes = M * cell * column_tiles * tile.columns
        if M > 1:
            row_bytes += 4 * M * (column_tiles + -(-N // tile.rows))
        if has_bias:
            row_bytes += 4 * M * column_tiles
        room = job.room_beside(self.q_BS, self.p_NS, q_BS.dtype)
        for lo, hi in job.chunks(B, row_bytes, room, tile.rows):
            c, row_tiles = hi - lo, triton.cdiv(hi - lo, tile.rows)
            planes_MRC = q_BS.new_empty(
                M, row_tiles * tile.rows, column_tiles * tile.columns, dtype=stored
            )
            row_part_MTc = a_MB.new_empty((M, column_tiles, c) if M > 1 else (1,))
            column_part_MTN = a_MB.new_empty((M, row_tiles, N) if M > 1 else (1,))
            bias_part_MTc = a_MB.new_empty((M, column_tiles, c) if has_bias else (1,))
            relatives, K = _relatives_of(job, lo, hi, a_MB)
            row_limit = None if job.row_limit_MB is None else job.row_limit_MB[:, lo:hi]
            column_limit = job.column_limit_MN if has_columns else None
            _planes_kernel[(row_tiles * column_tiles,)](
                *_given(q_BS[lo:hi], p_NS, tile), a_MB[:, lo:hi], b_MN, relatives,
                a_MB if row_limit is None else row_limit,
                b_MN if column_limit is None else column_limit,
                self.in_bias if has_bias else a_MB,
                row_log_MB[:, lo:hi], column_log_MN, row_up_MB[:, lo:hi], column_up_MN,
                planes_MRC, row_part_MTc, column_part_MTN, bias_part_MTc, c, N, K,
                a_MB.stride(0), b_MN.stride(0), _stride(row_limit), _stride(column_limit),
                row_log_MB.stride(0), row_up_MB.stride(0), *planes_MRC.shape[1:],
                S=self.ends[-1], ENDS=self.ends, M=M, HELD=held, ROW_LIMIT=row_limit is not None,
                COLUMN_LIMIT=column_limit is not None, COLUMNS=has_columns, SOFTPLUS=has_bias,
                **_options(tile),
            )  # fmt: skip
            self._emit(planes_MRC[:, :c, :N], lo, hi, held)
            if M > 1:
                self.row_MB[:, lo:hi] = row_part_MTc.sum(1)
                self.column_MN += column_part_MTN.sum(1)
            if has_bias:
                self.bias += bias_part_MTc.sum()
            # before the next chunk's are made
            del planes_MRC, row_part_MTc, column_part_MTN, bias_part_MTc
        self._finish(gain)

    def _emit(self, planes_McN: Tensor, lo: int, hi: int, held: int) -> None:
        """Products of a chunk's planes: whole prefixes of planes stored as they are, segments of
        suffix sums."""
        first_sum = self.M - 1 - held
        for m, (start, end) in enumerate(_segments(self.ends)):
            at = slice(start if m > first_sum else 0, end)
            w_cN = planes_McN[m].to(self.in_q_BS.dtype)
            if self.q_BS is not None:
                _add_product(self.q_BS[lo:hi, at], w_cN, self.in_p_NS[:, at])
            if self.p_NS is not None:
                _add_product(self.p_NS[:, at], w_cN.T, self.in_q_BS[lo:hi, at])

    def _finish(self, gain: Tensor | float) -> None:
        """Undo the gain; the factors' gradients."""
        for x in (self.q_BS, self.p_NS, self.row_MB, self.column_MN, self.bias):
            if x is not None and isinstance(gain, Tensor):
                x /= gain
        if self.M > 1:
            self.row_MB /= self.a_MB
            self.column_MN /= self.b_MN
            return
        # one dim: sum_j dL/dz z is q . dL/dq, no sum in the kernel
        if self.q_BS is not None:
            self.row_MB[0] = (self.q_BS * self.in_q_BS).sum(1) / self.a_MB[0]
        if self.p_NS is not None:
            self.column_MN[0] = (self.p_NS * self.in_p_NS).sum(1) / self.b_MN[0]


def _gain(dtype, a_MB, b_MN, grad_row_MB, grad_column_MN) -> Tensor | float:
    """A power of two that brings the largest cell of W close to the end of float16, whose range
    begins at 6e-8: gradients of a large batch would vanish. 1 for types with the range of float32.
    """
    if dtype != torch.float16:
        return 1.0
    a_M, b_M = a_MB.abs().amax(1), b_MN.abs().amax(1)
    bound = ((grad_row_MB.float() * a_MB).abs().amax(1) * b_M).sum()
    if grad_column_MN is not None:
        bound = bound + ((grad_column_MN.float() * b_MN).abs().amax(1) * a_M).sum()
    gain = torch.exp2(torch.floor(torch.log2(2.0**15 / bound)))
    return torch.where(torch.isfinite(gain) & (gain > 0), gain, 1.0)


# ----------------------------------------------------------------------------------------------
# paths "chunk" and "eform": rows of one dim, gradients in the forward where they can be foretold


class _Rows(torch.autograd.Function):
    """Log-sums of rows, and with `foretell` the gradients as well: a chunk of rows sees all its
    columns, so its sums are known before it is thrown away."""

    @staticmethod
    def forward(ctx, q_BD, p_ND, row_factor_1B, column_factor_1N, job: _Job, path, foretell):
        q_BS, ends = job.padded(q_BD)
        p_NS, _ = job.padded(p_ND)
        a_B, b_N = row_factor_1B[0].contiguous(), column_factor_1N[0].contiguous()
        for_q, for_p = any(ctx.needs_input_grad[0:4:2]), any(ctx.needs_input_grad[1:4:2])
        wants = foretell is not None
        walk = _Walk(job, path, q_BS, p_NS, a_B, b_N, ends, for_q and wants, for_p and wants)
        up_B = torch.zeros_like(a_B)
        row_B = torch.full_like(a_B, -math.inf)

        def note(lo: int, hi: int, row_c: Tensor) -> Tensor:
            row_B[lo:hi] = row_c
            if wants:
                up_B[lo:hi] = foretell(lo, hi, row_c / _LOG2E).detach()
            return up_B[lo:hi]

        walk.run(note)
        is_safe = walk.is_safe()
        ctx.save_for_backward(q_BD, p_ND, q_BS, p_NS, a_B, b_N, row_B)
        ctx.job, ctx.path, ctx.ends = job, path, ends
        ctx.foretold = (up_B, walk.grad_q_BS, walk.grad_p_NS) if wants and is_safe else None
        if wants:
            wide = [x for x in (walk.grad_q_BS, walk.grad_p_NS) if x is not None]
            job.copied_bytes += 4 * sum(x.numel() for x in wide)
        return row_B[None] / _LOG2E, is_safe

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_row_1B, _):
        q_BD, p_ND, q_BS, p_NS, a_B, b_N, row_B = ctx.saved_tensors
        job, ends = ctx.job, ctx.ends
        grad_B = grad_row_1B[0].float()
        factor = None
        if ctx.foretold is not None:
            up_B, grad_q_BS, grad_p_NS = ctx.foretold
            ctx.foretold = None  # a second backward computes again; most graphs see one
            factor = _common_factor(up_B, grad_B)
            if factor is None:
                _log_once("similarity sums: the gradient was not as foretold; computed again")
        if factor is None:
            factor = 1.0
            for_q, for_p = any(ctx.needs_input_grad[0:4:2]), any(ctx.needs_input_grad[1:4:2])
            walk = _Walk(job, ctx.path, q_BS, p_NS, a_B, b_N, ends, for_q, for_p)
            with torch.autocast(q_BS.device.type, enabled=False):
                walk.run(lambda lo, hi, row_c: grad_B[lo:hi], row_B)
            grad_q_BS, grad_p_NS = walk.grad_q_BS, walk.grad_p_NS
        grad_q_BD = grad_p_ND = row_1B = column_1N = None
        if grad_q_BS is not None:
            grad_q_BS *= factor
            row_1B = ((grad_q_BS * q_BS).sum(1) / a_B)[None]
            grad_q_BD = job.unpadded(grad_q_BS, ends, q_BD)
        if grad_p_NS is not None:
            grad_p_NS *= factor
            column_1N = ((grad_p_NS * p_NS).sum(1) / b_N)[None]
            grad_p_ND = job.unpadded(grad_p_NS, ends, p_ND)
        return grad_q_BD, grad_p_ND, row_1B, column_1N, None, None, None


def _common_factor(foretold_B: Tensor, grad_B: Tensor) -> float | None:
    """x with grad = x * foretold up to rounding, or None. One device sync."""
    if not len(grad_B):  # a rank without queries
        return 1.0
    norm = foretold_B.square().sum()
    factor = (foretold_B * grad_B).sum() / torch.where(norm > 0, norm, 1.0)
    tolerance_B = 1e-4 * (factor * foretold_B).abs() + 1e-6 * grad_B.abs().amax()
    is_close = ((grad_B - factor * foretold_B).abs() <= tolerance_B).all()
    is_close, factor = torch.stack([is_close.float(), factor]).tolist()
    return factor if is_close else None


class _Walk:
    """Chunks of rows of one dim: their sums, and gradients if asked. Two ways, by `path`:

    chunk  the product in float32 by the library, then row kernels; any logits
    eform  exp(z - reference) in one kernel, its rows scaled after the product: no second pass over
           the chunk. The reference is fixed, so |z| <= row_factor must hold or nearly: is_safe()
    """

    def __init__(self, job: _Job, path: str, q_BS, p_NS, a_B, b_N, ends, for_q: bool, for_p: bool):
        self.job, self.path, self.ends = job, path, ends
        self.q_BS, self.p_NS, self.a_B, self.b_N = q_BS, p_NS, a_B, b_N
        self.grad_q_BS = torch.zeros_like(q_BS, dtype=torch.float32) if for_q else None
        self.grad_p_NS = torch.zeros_like(p_NS, dtype=torch.float32) if for_p else None
        self.low, self.high = [], []

    def run(self, grad_of: Callable[[int, int, Tensor], Tensor], row_B: Tensor | None = None):
        """grad_of(lo, hi, row_c) hears the base-2 sums of rows and answers their gradient."""
        q_BS, p_NS = self.q_BS, self.p_NS
        if len(p_NS) == 0:
            return
        tile = self.job.tile("exps", q_BS)
        columns = triton.cdiv(len(p_NS), tile.columns) * tile.columns
        cell = torch.empty(0, dtype=_stored(q_BS)).element_size()
        row_bytes = columns * cell + (4 * len(p_NS) if self.path == "chunk" else 0)
        room = self.job.room_beside(self.grad_q_BS, self.grad_p_NS, q_BS.dtype)
        step = self._eform if self.path == "eform" else self._chunk
        for lo, hi in self.job.chunks(len(q_BS), row_bytes, room, tile.rows):
            step(lo, hi, grad_of, row_B, tile, columns)

    def _limit(self, lo: int, hi: int) -> tuple[Tensor, bool]:
        limit = self.job.row_limit_MB
        return (self.a_B, False) if limit is None else (limit[0, lo:hi], True)

    def _chunk(self, lo, hi, grad_of, row_B, tile, columns) -> None:
        q_cS, p_NS, N = self.q_BS[lo:hi], self.p_NS, len(self.p_NS)
        dots_cN = _product(q_cS, p_NS.T)
        limit, has_limit = self._limit(lo, hi)
        relatives, K = _relatives_of(self.job, lo, hi, self.a_B)
        block = 64 if INTERPRETING else 2048
        given = dots_cN, self.a_B[lo:hi], self.b_N, relatives, limit
        options = {"BLOCK": block, "ROW_LIMIT": has_limit}
        if row_B is None:
            row_c = torch.empty_like(self.a_B[lo:hi])
            _row_log_kernel[(hi - lo,)](*given, row_c, N, K, **options)
        else:
            row_c = row_B[lo:hi]
        grad_c = grad_of(lo, hi, row_c)
        if self.grad_q_BS is None and self.grad_p_NS is None:
            return
        plane_cC = q_cS.new_empty(hi - lo, columns, dtype=_stored(q_cS))
        _row_grad_kernel[(hi - lo,)](
            *given, _finite(row_c), grad_c.contiguous(), plane_cC, N, K, columns, **options
        )
        w_cN = plane_cC[:, :N].to(q_cS.dtype)
        if self.grad_q_BS is not None:
            _add_product(self.grad_q_BS[lo:hi], w_cN, p_NS)
        if self.grad_p_NS is not None:
            _add_product(self.grad_p_NS, w_cN.T, q_cS)

    def _eform(self, lo, hi, grad_of, row_B, tile, columns) -> None:
        q_cS, p_NS, N = self.q_BS[lo:hi], self.p_NS, len(self.p_NS)
        a_c = self.a_B[lo:hi]
        reference_c = (a_c.abs() * _LOG2E - 58).clamp_min(0)  # exps stay below 2^58
        column_tiles, row_tiles = columns // tile.columns, triton.cdiv(hi - lo, tile.rows)
        exps_RC = q_cS.new_empty(row_tiles * tile.rows, columns, dtype=_stored(q_cS))
        row_part_Tc = a_c.new_empty(column_tiles, hi - lo)
        limit, has_limit = self._limit(lo, hi)
        relatives, K = _relatives_of(self.job, lo, hi, self.a_B)
        _exps_kernel[(row_tiles * column_tiles,)](
            *_given(q_cS, p_NS, tile), a_c, self.b_N, relatives, limit, reference_c, exps_RC,
            row_part_Tc, hi - lo, N, K, columns, S=self.ends[-1], ROW_LIMIT=has_limit,
            **_options(tile),
        )  # fmt: skip
        total_c = row_part_Tc.sum(0)
        self.low.append(total_c.amin())
        self.high.append(total_c.amax())
        row_c = total_c.log2() + reference_c if row_B is None else row_B[lo:hi]
        grad_c = grad_of(lo, hi, row_c)
        if self.grad_q_BS is None and self.grad_p_NS is None:
            return
        exps_cN = exps_RC[: hi - lo, :N].to(q_cS.dtype)
        scale_c = (a_c * grad_c / total_c)[:, None]
        if self.grad_q_BS is not None:
            _add_product(self.grad_q_BS[lo:hi], exps_cN, p_NS)
            self.grad_q_BS[lo:hi] *= scale_c
        if self.grad_p_NS is not None:
            _add_product(self.grad_p_NS, exps_cN.T, (q_cS * scale_c).to(q_cS.dtype))

    def is_safe(self) -> bool:
        """Whether no exponential overflowed and no row sank to where the smallest are lost. One
        device sync (eform only)."""
        if self.path != "eform" or not self.low:
            return True
        low, high = torch.stack(
            [torch.stack(self.low).amin(), torch.stack(self.high).amax()]
        ).tolist()
        return 2.0**-100 < low and high < 2.0**100


# ----------------------------------------------------------------------------------------------
# path "dense": the definition, in torch


def _dense(
    q_BD, p_ND, row_factor_MB, column_factor_MN, dims, relatives_BK, limits, want_columns, bias=None
) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(q_BD.dtype, torch.float32)
    q_BD, p_ND = q_BD.to(wide), p_ND.to(wide)
    B, N = len(q_BD), len(p_ND)
    is_relative_BN = torch.zeros(B, N + 1, dtype=torch.bool, device=q_BD.device)
    if relatives_BK is not None:
        relatives_BK = relatives_BK.long()
        is_relative_BN.scatter_(1, torch.where(relatives_BK < 0, N, relatives_BK), True)
    is_relative_BN = is_relative_BN[:, :N]
    dot_BN, rows, columns = 0.0, [], []
    for m, (lo, hi) in enumerate(_segments(dims)):
        dot_BN = dot_BN + q_BD[:, lo:hi] @ p_ND[:, lo:hi].T
        z_BN = dot_BN * row_factor_MB[m, :, None] * column_factor_MN[m]
        for axis, limit, out in ((1, limits[0], rows), (0, limits[1], columns)):
            if axis == 0 and not want_columns:
                continue
            hole_BN = is_relative_BN
            if limit is not None:
                hole_BN = hole_BN | (z_BN.detach() > limit[m].unsqueeze(axis))
            if bias is not None:  # 20, the default threshold, is 2e-9 off
                x_BN = F.softplus(z_BN + bias, threshold=40)
                out.append(x_BN.masked_fill(hole_BN, 0.0).sum(1))
                continue
            x_BN = z_BN.masked_fill(hole_BN, -math.inf)
            # the gradient of a log-sum of nothing is nan: a constant takes its place
            is_empty = hole_BN.all(axis, keepdim=True)
            sum_n = torch.logsumexp(x_BN.masked_fill(is_empty, 0.0), axis)
            out.append(sum_n.masked_fill(is_empty.squeeze(axis), -math.inf))
    return torch.stack(rows), torch.stack(columns) if want_columns else None
