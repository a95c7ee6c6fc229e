"""kernels/infonce_triton.py against dense float64 autograd, on every path.

Shapes: B queries, N candidates, D embedding, M dims, K relatives.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) = -inf


@dataclass(frozen=True)
class Case:
    B: int = 20
    N: int = 20
    dims: tuple[int, ...] = (24,)
    D: int = 24
    tau: float = 0.05
    K: int = 1
    columns: bool = False
    limits: str = ""  # "each": a limit per dim; "one": one row of limits for all dims
    dtype: torch.dtype = torch.float32
    path: str = "fused"


@dataclass
class Given:
    q_BD: Tensor
    p_ND: Tensor
    a_MB: Tensor
    b_MN: Tensor
    relatives_BK: Tensor
    row_limit_MB: Tensor | None
    column_limit_MN: Tensor | None
    up_row_MB: Tensor
    up_column_MN: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        four = (self.q_BD, self.p_ND, self.a_MB, self.b_MN)
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in four]


def given(c: Case, device: str, seed: int = 0) -> Given:
    g = torch.Generator().manual_seed(seed)
    M = len(c.dims)
    q_BD = F.normalize(torch.randn(c.B, c.D, generator=g), dim=1)
    p_ND = F.normalize(torch.randn(c.N, c.D, generator=g), dim=1)
    shuffled_BN = torch.rand(c.B, c.N, generator=g).argsort(1)
    p_ND[shuffled_BN[:, 0]] += 0.5 * q_BD  # a permuted positive each: the first relative
    p_ND = F.normalize(p_ND, dim=1)
    relatives_BK = shuffled_BN[:, : c.K].clone()
    relatives_BK[::3, 1:] = -1
    factor = torch.tensor([1.0] if M == 1 else [1 + 0.3 * (M - 1 - m) for m in range(M)])
    a_MB = factor[:, None] * (0.8 + 0.4 * torch.rand(M, c.B, generator=g)) / c.tau
    b_MN = 0.8 + 0.2 * torch.rand(M, c.N, generator=g)
    row_limit_MB = column_limit_MN = None
    if c.limits:
        rows = M if c.limits == "each" else 1
        row_limit_MB = (torch.rand(rows, c.B, generator=g) * 0.4 - 0.05) / c.tau
        column_limit_MN = (torch.rand(rows, c.N, generator=g) * 0.4 - 0.05) / c.tau
    up_row_MB, up_column_MN = (torch.randn(M, n, generator=g) for n in (c.B, c.N))
    found = Given(q_BD.to(c.dtype), p_ND.to(c.dtype), a_MB, b_MN, relatives_BK, row_limit_MB,
                  column_limit_MN, up_row_MB, up_column_MN)  # fmt: skip
    for name, x in vars(found).items():
        setattr(found, name, None if x is None else x.to(device))
    return found


def reference(c: Case, x: Given):
    """Row and column sums and the four gradients by the definition, in float64."""
    q_BD, p_ND, a_MB, b_MN = leaves = x.leaves(torch.float64)
    is_in_BN = torch.ones(c.B, c.N, dtype=torch.bool, device=q_BD.device)
    for i, relatives in enumerate(x.relatives_BK.tolist()):
        for j in relatives:
            if j >= 0:
                is_in_BN[i, j] = False
    rows, columns = [], []
    for m, d in enumerate(c.dims):
        z_BN = a_MB[m][:, None] * b_MN[m][None] * (q_BD[:, :d] @ p_ND[:, :d].T)
        in_row_BN = in_column_BN = is_in_BN
        if c.limits:
            k = m if c.limits == "each" else 0
            in_row_BN = is_in_BN & (z_BN <= x.row_limit_MB[k][:, None])
            in_column_BN = is_in_BN & (z_BN <= x.column_limit_MN[k][None])
        rows.append(_log((z_BN.exp() * in_row_BN).sum(1)))
        columns.append(_log((z_BN.exp() * in_column_BN).sum(0)))
    row_MB, column_MN = torch.stack(rows), torch.stack(columns)
    total(c, x, row_MB, column_MN if c.columns else None).backward()
    return row_MB.detach(), column_MN.detach(), [leaf.grad for leaf in leaves]


def _log(x: Tensor) -> Tensor:
    """-inf of 0, without the nan in its gradient."""
    return torch.where(x > 0, x, 1.0).log().masked_fill(x == 0, -math.inf)


def total(c: Case, x: Given, row_MB: Tensor, column_MN: Tensor | None) -> Tensor:
    """A loss with any upstream gradient; sums over nothing have no say."""
    found = (row_MB.masked_fill(row_MB == -math.inf, 0.0) * x.up_row_MB).sum()
    if column_MN is not None:
        finite_MN = column_MN.masked_fill(column_MN == -math.inf, 0.0)
        found = found + (finite_MN * x.up_column_MN).sum()
    return found


def computed(kernels, c: Case, x: Given, **options):
    leaves = x.leaves()
    row_MB, column_MN = kernels.sweep(
        *leaves,
        dims=c.dims,
        relatives_BK=x.relatives_BK,
        row_limit_MB=x.row_limit_MB,
        column_limit_MN=x.column_limit_MN,
        want_columns=c.columns,
        path=c.path,
        **options,
    )
    total(c, x, row_MB, column_MN).backward()
    column_MN = None if column_MN is None else column_MN.detach()
    return row_MB.detach(), column_MN, [leaf.grad for leaf in leaves]


def error(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item()


def check(kernels, c: Case, x: Given, tolerance: tuple[float, float, float], **options) -> None:
    """tolerance: of sums (absolute), of gradients of q and p, of gradients of the factors."""
    row_MB, column_MN, grads = computed(kernels, c, x, **options)
    want_row_MB, want_column_MN, want_grads = reference(c, x)
    pairs = [(row_MB, want_row_MB)]
    if c.columns:
        pairs.append((column_MN, want_column_MN))
    for got, want in pairs:
        assert torch.equal(got == -math.inf, want == -math.inf)
        is_finite = want > -math.inf
        torch.testing.assert_close(
            got[is_finite].double(), want[is_finite], rtol=0, atol=tolerance[0]
        )
    for k, (got, want) in enumerate(zip(grads, want_grads, strict=True)):
        assert torch.isfinite(got).all()
        assert error(got, want) <= tolerance[1 + k // 2], ("q", "p", "a", "b")[k]


# float32: a score of 1 / tau has a rounding error of 6e-8 / tau, and a gradient that of its score
def exact(c: Case) -> tuple[float, float, float]:
    return 3e-7 / c.tau, 2e-7 / c.tau, 2e-7 / c.tau


MANY = (10, 27, 50)  # no dim is a multiple of a step, and the last is not D
CASES = {
    "square": Case(),
    "tail_of_columns": Case(N=23, tau=0.07),
    "hard_negatives": Case(B=18, N=55, tau=0.01),
    "columns": Case(B=33, N=35, columns=True),
    "limits": Case(B=33, N=35, columns=True, limits="each", K=3),
    "two_dims": Case(B=17, N=52, dims=(16, 32), D=32, columns=True),
    "ragged_dims": Case(B=33, N=37, dims=MANY, D=60, columns=True, limits="each", K=3),
    "one_limit_for_all": Case(B=20, N=24, dims=MANY, D=60, columns=True, limits="one"),
    "five_dims": Case(B=20, N=61, dims=(5, 16, 20, 32, 40), D=40, tau=0.07),
    "five_dims_cold": Case(B=20, N=33, dims=(5, 16, 20, 32, 40), D=40, tau=0.01, columns=True),
    "one_by_one": Case(B=1, N=1, K=1, columns=True),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_equal_dense_float64(kernels, device, name):
    """Tiles stick out on both sides, segments are padded, relatives hit single tiles."""
    c = CASES[name]
    check(kernels, c, given(c, device), exact(c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(24,), (10, 16, 24)])
def test_narrow_inputs_cost_one_rounding_of_the_coefficients(kernels, device, dtype, dims):
    """Sums stay float32; only W is rounded, after it was formed in float32."""
    c = Case(B=20, N=29, dims=dims, dtype=dtype, columns=True)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    check(kernels, c, given(c, device), (3e-7 / c.tau, unit, unit))


def test_small_coefficients_survive_float16(kernels, device):
    """A gradient of 1e-3 made of cells of 1e-7, where float16 has one digit left."""
    c = Case(B=20, N=29, dtype=torch.float16)
    x = given(c, device)
    x.a_MB, x.b_MN, x.p_ND = x.a_MB * 0.02, x.b_MN / 2**10, x.p_ND * 2**10
    x.up_row_MB *= 1e-2
    *_, (grad_q_BD, *_) = computed(kernels, c, x)
    assert error(grad_q_BD, reference(c, x)[2][0]) < 2**-9


@pytest.mark.parametrize("path", ["chunk", "eform"])
@pytest.mark.parametrize("limits", ["", "each"])
def test_row_paths_equal_dense_float64(kernels, device, path, limits):
    """Each dim is a walk of its own there."""
    c = Case(B=33, N=41, dims=(20, 50), D=50, limits=limits, K=2, path=path, tau=0.07)
    check(kernels, c, given(c, device), exact(c), workspace_mib=1e-3)


@pytest.mark.parametrize("path", ["chunk", "eform"])
def test_bf16_row_paths(kernels, device, path):
    """eform rounds exponentials and scaled queries: two roundings, not one."""
    c = Case(B=20, N=41, dtype=torch.bfloat16, path=path)
    check(kernels, c, given(c, device), (3e-7 / c.tau, 2**-7, 2**-7))


def test_dense_path_is_the_definition(kernels, device):
    c = Case(B=20, N=24, dims=MANY, D=60, columns=True, limits="one", K=3, path="dense")
    check(kernels, c, given(c, device), exact(c))


def test_operands_by_descriptor_equal_operands_by_pointer(kernels, device, monkeypatch):
    """The sm_90 tiles load through descriptors, which fill with zeros where pointers repeat."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator (sm_90)")
    c = CASES["ragged_dims"]
    x, found = given(c, device), []
    for is_tma in (False, True):
        tile = replace(kernels.TILE_INTERPRETED, tma=is_tma)
        monkeypatch.setattr(kernels, "TILE_INTERPRETED", tile)
        tiles = {key: replace(t, tma=is_tma) for key, t in kernels.TILES_90.items()}
        monkeypatch.setattr(kernels, "TILES_90", tiles)
        row_MB, column_MN, grads = computed(kernels, c, x)
        found.append([row_MB, column_MN, *grads])
    for by_pointer, by_descriptor in zip(*found, strict=True):
        torch.testing.assert_close(by_pointer, by_descriptor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("held", [0, 1, 4])
def test_planes_held_for_suffix_sums_change_rounding_alone(kernels, device, monkeypatch, held):
    """Planes before the held ones are multiplied as whole prefixes."""
    tile = replace(kernels.TILE_INTERPRETED, held=held)
    monkeypatch.setattr(kernels, "TILE_INTERPRETED", tile)
    tiles = {k: replace(t, held=held, rows=64, columns=64) for k, t in kernels.TILES_90.items()}
    monkeypatch.setattr(kernels, "TILES_90", tiles)
    c = Case(B=16, N=24, dims=(8, 16, 20, 40), D=40)
    check(kernels, c, given(c, device), exact(c))


@pytest.mark.parametrize("path", ["fused", "chunk", "eform", "dense"])
def test_sum_over_nothing_is_minus_infinity_without_gradient(kernels, device, path):
    """Queries whose every candidate is a relative, and candidates that nobody may take."""
    c = Case(B=19, N=18, K=18, columns=path in ("fused", "dense"), path=path)
    x = given(c, device)
    x.relatives_BK[:, 1:] = -1
    x.relatives_BK[[3, 17]] = torch.arange(18, device=x.relatives_BK.device)
    if c.columns:  # column 5 is a relative of all; row 3 keeps all its own
        x.relatives_BK[:, 1] = 5
        x.relatives_BK[[3, 17], 1] = 1
    check(kernels, c, x, exact(c))
    row_MB, _, (grad_q_BD, *_) = computed(kernels, c, x)
    assert (row_MB[0, [3, 17]] == -math.inf).all()
    assert (grad_q_BD[[3, 17]] == 0).all()


def test_no_relatives_at_all(kernels, device):
    c = Case(B=17, N=19, columns=True)
    x = given(c, device)
    leaves, wide = x.leaves(), x.leaves(torch.float64)
    row_MB, column_MN = kernels.sweep(*leaves, dims=c.dims, want_columns=True, path="fused")
    z_BN = wide[2][0][:, None] * wide[3][0] * (wide[0] @ wide[1].T)
    torch.testing.assert_close(row_MB[0].double(), torch.logsumexp(z_BN, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(column_MN[0].double(), torch.logsumexp(z_BN, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["fused", "chunk", "eform"])
def test_two_runs_give_the_same_bits(kernels, device, path):
    """No atomics: the order of every sum is fixed."""
    c = Case(B=33, N=41, dtype=torch.bfloat16, columns=path == "fused", path=path)
    x = given(c, device)
    first, again = (computed(kernels, c, x, workspace_mib=1e-3) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


@pytest.mark.parametrize("path", ["fused", "chunk", "eform"])
def test_workspace_changes_rounding_alone(kernels, device, path):
    """Rows are independent, so their sums keep every bit; other sums are taken in another order."""
    c = Case(B=40, N=37, columns=path == "fused", path=path)
    x = given(c, device)
    whole = computed(kernels, c, x)
    pieces = computed(kernels, c, x, workspace_mib=1e-4)
    assert torch.equal(whole[0], pieces[0])
    for a, b in zip(whole[2], pieces[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_are_whole_tiles_that_fit(kernels):
    """The bound holds unless a single tile is too large, and no row is left out."""
    job = kernels._Job((24,), None, None, None, False, 1.0)
    for B, room in ((1000, 1), (1000, 64_000), (1000, 10**9), (0, 100)):
        chunks = job.chunks(B, 100, room, 64)
        assert [lo for lo, _ in chunks] == [hi for _, hi in [(0, 0), *chunks]][: len(chunks)]
        assert B == 0 or chunks[-1][1] == B
        largest = max((hi - lo for lo, hi in chunks), default=0)
        assert largest * 100 <= max(room, 64 * 100)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("N, D", [(65_536, 768), (131_072, 1024), (262_144, 768)])
def test_chunks_stay_large_where_gradients_fill_the_workspace(kernels, M, N, D):
    """Chunks of one tile would read and write the float32 gradient of the candidates 2,048 times,
    longer than all products take."""
    job = kernels._Job(tuple(range(1, M + 1)), None, None, None, False, 1024)
    wide = torch.empty(N, D, device="meta")
    row_bytes = 2 * M * N + (4 * M * (N // 64 + N // 128) if M > 1 else 0)
    chunks = job.chunks(N, row_bytes, job.room_beside(wide, wide, torch.bfloat16), 128)
    rows = chunks[0][1] - chunks[0][0]
    assert rows >= (2048 if M == 1 else 896)
    if N == 65_536:  # where the goal of 1 GiB stands
        assert rows * row_bytes + 2 * 4 * wide.numel() <= 2**30


def test_what_earlier_dims_keep_is_taken_from_the_workspace_of_later_ones(
    kernels, device, monkeypatch
):
    """Foretold gradients of all dims live until the backward: the bound is on all of them."""
    c = Case(B=20, N=24, dims=(8, 16), D=16, path="chunk")
    x, rooms, room_beside = given(c, device), [], kernels._Job.room_beside
    monkeypatch.setattr(
        kernels._Job, "room_beside", lambda *a: rooms.append(room_beside(*a)) or rooms[-1]
    )
    options = {"dims": c.dims, "path": "chunk", "workspace_mib": 8}
    kernels.sweep(*x.leaves(), **options, row_gradient=lambda m, lo, hi, row_c: row_c * 0)
    first, second = rooms
    step = kernels._Job((8,), None, None, None, False, 8).padded(x.q_BD[:, :8])[0].shape[1]
    assert first - second >= 4 * (c.B + c.N) * step


def test_a_tile_of_its_own_is_taken_where_the_usual_one_spills(kernels, monkeypatch):
    """The gate compiles what is listed; a key that nothing asks for would protect nobody."""
    monkeypatch.setattr(kernels, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    wide, x = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bfloat16)
    asked = set()
    for dims in ((8,), (4, 8)):
        for columns, limits in ((False, False), (True, False), (True, True)):
            limit = wide if limits else None
            job = kernels._Job(dims, None, limit, limit if columns else None, columns, 1)
            for has_bias in {False, not columns}:
                for is_ragged in (False, True):
                    for kernel in ("sums", "planes"):
                        tile = job.tile(kernel, x, has_bias, is_ragged)
                        asked |= {k for k, t in kernels.TILES_90.items() if t is tile}
                        assert job.tile(kernel, x.float(), has_bias, is_ragged).features == 32
    assert asked == {k for k in kernels.TILES_90 if k[0] != "exps" and k[2] == 2}


def test_operands_begin_where_a_descriptor_can(kernels, device):
    """A contiguous view at an odd offset: the tensor memory accelerator takes multiples of 16."""
    job = kernels._Job((64,), None, None, None, False, 1)
    x_nD = torch.arange(1 + 4 * 64.0, device=device)[1:].reshape(4, 64)
    assert x_nD.is_contiguous() and x_nD.data_ptr() % 16
    x_nS, _ = job.padded(x_nD)
    assert x_nS.data_ptr() % 16 == 0 and torch.equal(x_nS, x_nD)
    assert job.copied_bytes == x_nS.numel() * x_nS.element_size()


# ----------------------------------------------------------------------------------------------
# sums of softplus


def softplus_of(kernels, c: Case, x: Given, bias: float, **options) -> list[Tensor]:
    """Sums and gradients of q, p, both factors and the bias; no kernel: the definition, float64."""
    wide = torch.float64 if kernels is None else None
    leaves = [*x.leaves(wide), torch.tensor(bias, dtype=wide, device=x.a_MB.device)]
    leaves[-1].requires_grad_()
    if kernels is not None:
        sums_MB = kernels.softplus_sweep(
            *leaves, dims=c.dims, relatives_BK=x.relatives_BK, row_limit_MB=x.row_limit_MB,
            **options,
        )  # fmt: skip
    else:
        q_BD, p_ND, a_MB, b_MN, b = leaves
        rows = []
        for m, d in enumerate(c.dims):
            z_BN = a_MB[m][:, None] * b_MN[m][None] * (q_BD[:, :d] @ p_ND[:, :d].T)
            is_in_BN = torch.ones_like(z_BN, dtype=torch.bool)
            for i, relatives in enumerate(x.relatives_BK.tolist()):
                for j in relatives:
                    is_in_BN[i, j] &= j < 0
            if x.row_limit_MB is not None:
                is_in_BN &= z_BN <= x.row_limit_MB[m if c.limits == "each" else 0][:, None]
            rows.append((torch.log1p((z_BN + b).exp()) * is_in_BN).sum(1))
        sums_MB = torch.stack(rows)
    (sums_MB * x.up_row_MB).sum().backward()
    return [sums_MB.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("bias", [-10.0, 0.3])
@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize(
    "name", ["square", "hard_negatives", "ragged_dims", "one_limit_for_all", "five_dims"]
)
def test_softplus_sums_and_gradients_equal_dense_float64(kernels, device, name, path, bias):
    """At a bias of -10 almost every term is far below the rounding error of 1."""
    c = replace(CASES[name], tau=max(CASES[name].tau, 0.05), columns=False)
    x = given(c, device)
    found = softplus_of(kernels, c, x, bias, path=path, workspace_mib=1e-3)
    wanted = softplus_of(None, c, x, bias)
    for what, got, want in zip(("sums", "q", "p", "a", "b", "bias"), found, wanted, strict=True):
        assert error(got, want) <= 2e-7 / c.tau, what


def test_softplus_of_narrow_inputs(kernels, device):
    for dtype, unit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        c = Case(B=20, N=29, dims=(10, 24), dtype=dtype)
        x = given(c, device)
        found = softplus_of(kernels, c, x, -3.0, path="fused")
        for got, want in zip(found, softplus_of(None, c, x, -3.0), strict=True):
            assert error(got, want) <= unit


def test_softplus_keeps_every_digit_from_one_end_to_the_other(kernels, device):
    """log(1 + 2^x) by 1 + 2^x has no digit left at x = -24, and no path but fused is for it."""
    z_1N = torch.linspace(-60, 60, 241, device=device)[None]
    one = torch.ones(1, 1, device=device)
    for j in range(0, 241, 8):
        z = z_1N[:, j : j + 1]
        sums = kernels.softplus_sweep(
            one, one, z, one, torch.zeros((), device=device), dims=(1,), path="fused"
        )
        rounding = 3e-7 + 6e-8 * abs(z.item())  # of arithmetic, and of z in base 2
        assert error(sums, torch.log1p(z.double().exp())) < rounding
    with pytest.raises(ValueError, match="no sums of softplus; take path='fused'"):
        kernels.softplus_sweep(one, one, one, one, one, dims=(1,), path="chunk")
    with pytest.raises(ValueError, match="want a scalar"):
        kernels.softplus_sweep(one, one, one, one, z_1N, dims=(1,))


# ----------------------------------------------------------------------------------------------
# gradients in the forward


def _rows_of_infonce(x: Given, z_B: Tensor):
    """(loss of row sums, forecast of its gradient) for one positive a query."""
    weight_B = torch.rand(len(z_B), generator=torch.Generator().manual_seed(3)).to(z_B.device)

    def loss(row_MB: Tensor) -> Tensor:
        return (F.softplus(row_MB[0] - z_B, threshold=40) * weight_B).sum()

    def forecast(m: int, lo: int, hi: int, row_c: Tensor) -> Tensor:
        return torch.sigmoid(row_c - z_B[lo:hi]) * weight_B[lo:hi]

    return loss, forecast


@pytest.mark.parametrize("path", ["chunk", "eform"])
def test_foretold_gradient_is_used_and_any_other_is_computed(kernels, device, path, monkeypatch):
    """A forecast saves a pass when it is right up to a factor, and must do no harm when wrong."""
    c = Case(B=33, N=41, path=path)
    x = given(c, device)
    z_B = 10 + torch.rand(c.B, generator=torch.Generator().manual_seed(1)).to(device)
    loss, forecast = _rows_of_infonce(x, z_B)
    walks, run = [], kernels._Walk.run
    monkeypatch.setattr(kernels._Walk, "run", lambda *a: (walks.append(1), run(*a))[1])

    def grads(factor: float, row_gradient=None) -> list[Tensor]:
        leaves = x.leaves()
        row_MB, _ = kernels.sweep(
            *leaves,
            dims=c.dims,
            relatives_BK=x.relatives_BK,
            path=path,
            workspace_mib=1e-3,
            row_gradient=row_gradient,
        )
        (factor * loss(row_MB)).backward()
        return [leaf.grad for leaf in leaves]

    plain = grads(0.25)
    assert len(walks) == 2
    walks.clear()
    foretold = grads(0.25, forecast)
    assert len(walks) == 1
    wrong = grads(0.25, lambda m, lo, hi, row_c: forecast(m, lo, hi, row_c) * row_c)
    assert len(walks) == 3
    for a, b, d in zip(plain, foretold, wrong, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6 * a.abs().max().item())
        assert torch.equal(d, a)


def test_exponentials_out_of_range_fall_back(kernels, device, caplog):
    """At 1 / tau = 200 a row whose negatives are all opposite lies 2^-550 under the reference."""
    c = Case(B=16, N=20, tau=0.005, path="eform")
    x = given(c, device)
    direction_D = F.normalize(torch.ones(c.D, device=device), dim=0)
    x.q_BD[:] = direction_D
    x.p_ND[:] = -direction_D + 0.01 * x.p_ND
    kernels._log_once.cache_clear()
    with caplog.at_level("INFO"):
        check(kernels, c, x, exact(c))
    assert "out of range" in caplog.text


# ----------------------------------------------------------------------------------------------
# what the sums are for


@pytest.mark.parametrize("path", ["fused", "chunk", "eform"])
@pytest.mark.parametrize("gap", [0.2, 0.45])
def test_gradient_of_easy_positives_in_bf16(kernels, device, path, gap):
    """The positive never meets a bf16 sum: subtracting 1 from a rounded probability loses 10% of
    the gradient at a loss of 1e-2 and all of it at 1e-4. See docs/numerics.md."""
    B, D, tau = 48, 32, 0.05
    g = torch.Generator().manual_seed(5)
    q_BD = F.normalize(torch.randn(B, D, generator=g), dim=1)
    noise_BD = F.normalize(torch.randn(B, D, generator=g), dim=1)
    p_BD = F.normalize(q_BD + (1 - gap) * noise_BD, dim=1)
    q_BD, p_BD = q_BD.bfloat16().to(device), p_BD.bfloat16().to(device)
    diagonal_B1 = torch.arange(B, device=device)[:, None]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, p = (x.detach().clone().to(dtype).requires_grad_() for x in (q_BD, p_BD))
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        z_B = (q.to(wide) * p.to(wide)).sum(1) / tau
        if dtype == torch.float64:
            z_BB = (q @ p.T / tau).masked_fill(diagonal_B1 == diagonal_B1.T, -math.inf)
            row_B = torch.logsumexp(z_BB, 1)
        else:
            a_1B, b_1B = torch.full((1, B), 1 / tau), torch.ones(1, B)
            row_1B, _ = kernels.sweep(
                q,
                p,
                a_1B.to(device),
                b_1B.to(device),
                dims=(D,),
                relatives_BK=diagonal_B1,
                path=path,
            )
            row_B = row_1B[0]
        loss = F.softplus(row_B - z_B, threshold=40).mean()
        loss.backward()
        found.append((loss.item(), q.grad, p.grad))
    (loss, *grads), (want_loss, *want_grads) = found
    assert want_loss < 0.05
    assert abs(loss - want_loss) < 2e-5 * want_loss
    for got, want in zip(grads, want_grads, strict=True):
        assert error(got, want) < 6e-3  # bf16 gradients: 2^-9 each for W, operand and result


def test_agrees_with_the_torch_primitive(kernels, device):
    """losses/similarity.py is the contract: prefix norms, learned scale, limits, columns; the
    factors' gradients end in autograd outside both."""
    from losses.similarity import Limits, prefix_factors, similarity_sums

    c = Case(B=26, N=37, dims=(7, 16, 30), D=30, K=2, limits="each")
    x = given(c, device)
    found = []
    for is_ours in (True, False):
        q_BD, p_ND, *_ = x.leaves()
        scale = torch.tensor(20.0, device=device, requires_grad=True)
        if is_ours:
            row_MB, column_MN = kernels.sweep(
                q_BD,
                p_ND,
                scale * prefix_factors(q_BD, c.dims),
                prefix_factors(p_ND, c.dims),
                dims=c.dims,
                relatives_BK=x.relatives_BK,
                row_limit_MB=x.row_limit_MB,
                column_limit_MN=x.column_limit_MN,
                want_columns=True,
                path="fused",
            )
        else:
            limits = Limits(x.row_limit_MB / 20, x.column_limit_MN / 20)
            sums = similarity_sums(
                q_BD,
                p_ND,
                scale,
                dims=c.dims,
                relatives_BK=x.relatives_BK,
                limits=limits,
                want=("row", "column"),
            )
            row_MB, column_MN = sums.row_MB, sums.column_MN
        total(c, x, row_MB, column_MN).backward()
        found.append([row_MB, column_MN, q_BD.grad, p_ND.grad, scale.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_frozen_candidates_get_no_gradient(kernels, device):
    """A frozen tower's side costs no product, and the other side's gradient does not change."""
    for path in ("fused", "eform", "chunk"):
        c = Case(B=18, N=21, path=path)
        x = given(c, device)
        q_BD = x.q_BD.clone().requires_grad_()
        row_MB, _ = kernels.sweep(
            q_BD, x.p_ND, x.a_MB, x.b_MN, dims=c.dims, relatives_BK=x.relatives_BK, path=path
        )
        total(c, x, row_MB, None).backward()
        assert error(q_BD.grad, reference(c, x)[2][0]) < 1e-5


# ----------------------------------------------------------------------------------------------
# the switch


def test_path_is_chosen_by_size_and_logged(kernels, caplog):
    kernels._log_once.cache_clear()
    bf16, fp32 = torch.bfloat16, torch.float32
    with caplog.at_level("INFO"):
        assert kernels.choose("auto", 64, 64, 5, True, bf16, "cuda", False) == "dense"
        assert kernels.choose("auto", 8192, 8192, 1, False, bf16, "cuda", True) == "eform"
        assert kernels.choose("auto", 8192, 8192, 1, False, fp32, "cuda", False) == "fused"
        assert kernels.choose("auto", 8192, 8192, 5, True, bf16, "cuda", True) == "fused"
        assert kernels.choose("auto", 8192, 8192, 1, True, torch.float64, "cuda", True) == "dense"
        assert kernels.choose("chunk", 8, 8, 1, False, fp32, "cuda", False) == "chunk"
        kernels.choose("auto", 8192, 8192, 5, True, bf16, "cuda", False)
    assert len(caplog.records) == len({r.message for r in caplog.records})
    assert "fused" in caplog.text and "asked for" in caplog.text


@pytest.mark.parametrize(
    "change, says",
    [
        ({"dims": (24, 16)}, "must ascend from 1 to 24"),
        ({"dims": (25,)}, "must ascend from 1 to 24"),
        ({"path": "fast"}, "no path 'fast'"),
        ({"path": "eform", "want_columns": True}, "no sums of columns"),
        ({"row_limit_MB": torch.zeros(2, 20)}, "row limit"),
        ({"relatives_BK": torch.zeros(19, 1, dtype=torch.long)}, "relatives"),
        ({"relatives_BK": torch.zeros(20, 1)}, "want integers"),
    ],
)
def test_what_does_not_fit_is_told(kernels, change, says):
    x = given(Case(), "cpu")
    arguments = {"dims": (24,), "path": "fused"} | change
    with pytest.raises(ValueError, match=says):
        kernels.sweep(x.q_BD, x.p_ND, x.a_MB, x.b_MN, **arguments)
    with pytest.raises(ValueError, match="float64"):
        kernels.sweep(x.q_BD.double(), x.p_ND, x.a_MB, x.b_MN, dims=(24,), path="fused")
    with pytest.raises(ValueError, match="too small a range"):
        kernels.sweep(x.q_BD.half(), x.p_ND.half(), x.a_MB, x.b_MN, dims=(24,), path="eform")


def test_readme_shows_infonce(kernels, device):
    """The function a reader copies is cross entropy, gradients of the temperature included."""
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
    source = readme.split("```python\n")[-1].split("```")[0]
    names = {"torch": torch, "F": F, "sweep": kernels.sweep}
    exec(source, names)
    x = given(Case(B=20, N=31), device)
    found = []
    for is_ours in (True, False):
        q_BD, p_ND, *_ = x.leaves(None if is_ours else torch.float64)
        temperature = torch.tensor(0.05, device=device, dtype=q_BD.dtype, requires_grad=True)
        if is_ours:
            loss = names["infonce"](q_BD, p_ND, temperature)
        else:
            target_B = torch.arange(20, device=device)
            loss = F.cross_entropy(q_BD @ p_ND.T / temperature, target_B)
        loss.backward()
        found.append([loss, q_BD.grad, p_ND.grad, temperature.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
