"""The kernels at sizes that fill a GPU: every shipped tile, memory, offsets beyond 2^31.

Shapes: B queries, N candidates, D embedding, M dims.
"""

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MANY = (64, 128, 256, 384)


def _inputs(B: int, N: int, D: int, M: int, dtype: torch.dtype, tau: float):
    torch.manual_seed(0)
    q_BD = F.normalize(torch.randn(B, D, device="cuda"), dim=1).to(dtype)
    p_ND = F.normalize(torch.randn(N, D, device="cuda"), dim=1).to(dtype)
    a_MB = (0.8 + 0.4 * torch.rand(M, B, device="cuda")) / tau
    b_MN = 0.8 + 0.4 * torch.rand(M, N, device="cuda")
    return q_BD, p_ND, a_MB, b_MN


def _run(kernels, inputs, dtype=None, **options):
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    sums = [x for x in kernels.sweep(*leaves, **options) if x is not None]
    g = torch.Generator("cuda").manual_seed(1)
    loss = 0
    for x in sums:
        up = torch.rand(x.shape, generator=g, device="cuda") - 0.3
        loss = loss + (x * up).sum()
    loss.backward()
    return [x.detach() for x in sums], [x.grad for x in leaves]


def _error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def _limits_beside(inputs, dims, near: float):
    """Limits of rows (1, B) and columns (1, N) about `near`, each midway between neighbouring
    float64 scores of all dims: which side of it a cell is on is no matter of rounding."""
    q_BD, p_ND, a_MB, b_MN = (x.double() for x in inputs)
    dots = [q_BD[:, :d] @ p_ND[:, :d].T for d in dims]
    z_BNM = torch.stack(dots, 2) * a_MB.T[:, None] * b_MN.T[None]
    limits = []
    for z_nk in (z_BNM.flatten(1), z_BNM.transpose(0, 1).flatten(1)):
        sorted_nk = z_nk.sort(1).values
        gap_nk, middle_nk = sorted_nk.diff(dim=1), (sorted_nk[:, 1:] + sorted_nk[:, :-1]) / 2
        at_n = (middle_nk - near).abs().masked_fill(gap_nk < 1e-4, 9.0).argmin(1)
        limit_1n = middle_nk.gather(1, at_n[:, None]).T.float()
        assert (limit_1n - near).abs().max() < 0.5
        assert (z_nk - limit_1n.T.double()).abs().min() > 4e-5  # float32 sums are 6e-6 off
        limits.append(limit_1n)
    return limits


# gradients: bf16 and fp16 round W, and what leaves; float32 rounds scores of 1 / tau
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dims", [(384,), MANY, (100, 250, 301)])
@pytest.mark.parametrize("columns", [False, True])
def test_ragged_thousands_equal_dense_float64(kernels, dtype, dims, columns):
    """No size is a multiple of a tile; relatives and limits in the middle of the matrix."""
    B, N, D = 1543, 2311, 384
    inputs = _inputs(B, N, D, len(dims), dtype, 0.05)
    row_limit_1B, _ = _limits_beside(inputs, dims, 2.0)
    _, column_limit_1N = _limits_beside(inputs, dims, 2.5)
    options = {
        "dims": dims,
        "relatives_BK": torch.randint(-1, N, (B, 3), device="cuda"),
        "row_limit_MB": row_limit_1B,
        "column_limit_MN": column_limit_1N if columns else None,
        "want_columns": columns,
    }
    sums, grads = _run(kernels, inputs, path="fused", workspace_mib=24, **options)
    want_sums, want_grads = _run(kernels, inputs, torch.float64, path="dense", **options)
    for got, want in zip(sums, want_sums, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)
    for got, want in zip(grads, want_grads, strict=True):
        assert _error(got, want) < 10 * TOLERANCE[dtype] ** 0.5 * TOLERANCE[dtype] ** 0.5


@pytest.mark.parametrize("path", ["chunk", "eform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_paths_in_thousands(kernels, path, dtype):
    B, N, D = 1543, 2311, 384
    inputs = _inputs(B, N, D, 1, dtype, 0.05)
    options = {"dims": (D,), "relatives_BK": torch.arange(B, device="cuda")[:, None]}
    sums, grads = _run(kernels, inputs, path=path, workspace_mib=24, **options)
    want_sums, want_grads = _run(kernels, inputs, torch.float64, path="dense", **options)
    torch.testing.assert_close(sums[0].double(), want_sums[0], rtol=0, atol=1e-4)
    for got, want in zip(grads, want_grads, strict=True):
        assert _error(got, want) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dims", [(384,), MANY])
def test_sums_of_softplus_in_thousands(kernels, dtype, dims):
    """SigLIP's bias and temperature: most terms are far below the rounding error of 1."""
    B, N, D = 1543, 2311, 384
    inputs = _inputs(B, N, D, len(dims), dtype, 0.1)
    relatives_BK = torch.arange(B, device="cuda")[:, None]
    found = []
    for path, wide in (("fused", None), ("dense", torch.float64)):
        leaves = [x.detach().clone().to(wide or x.dtype).requires_grad_() for x in inputs]
        bias = torch.tensor(-10.0, device="cuda", dtype=wide, requires_grad=True)
        sums_MB = kernels.softplus_sweep(
            *leaves, bias, dims=dims, relatives_BK=relatives_BK, path=path, workspace_mib=24
        )
        up = torch.rand(sums_MB.shape, generator=torch.Generator("cuda").manual_seed(1),
                        device="cuda") - 0.3  # fmt: skip
        (sums_MB * up).sum().backward()
        found.append([sums_MB.detach(), *(x.grad for x in (*leaves, bias))])
    for got, want in zip(*found, strict=True):
        assert _error(got, want.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    "path, dims", [("fused", (384,)), ("fused", MANY), ("eform", (384,)), ("eform", MANY)]
)
def test_memory_stays_within_the_workspace(kernels, path, dims):
    """16,384 x 32,768 cells are 2 GiB in float32; a sweep may hold 256 MiB beyond its gradients.
    "eform" keeps the foretold ones of every dim until the backward."""
    B, N, D, bound_mib = 16384, 32768, 384, 256
    inputs = _inputs(B, N, D, len(dims), torch.bfloat16, 0.05)
    leaves = [x.requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row_MB, _ = kernels.sweep(
        *leaves, dims=dims, path=path, workspace_mib=bound_mib,
        row_gradient=None if path == "fused" else lambda m, lo, hi, row_c: torch.ones_like(row_c),
    )  # fmt: skip
    row_MB.sum().backward()
    grown_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    gradients_mib = sum(x.grad.numel() * x.grad.element_size() for x in leaves) / 2**20
    assert grown_mib < gradients_mib + bound_mib + 32  # 32: what the matrix library takes once


@pytest.mark.parametrize("path", ["fused", "chunk"])
def test_offsets_beyond_two_to_the_31(kernels, path):
    """70,000 x 40,000 cells, and planes of 2^31 elements: an int32 offset would wrap."""
    B, N, D = 70_000, 40_000, 64
    inputs = _inputs(B, N, D, 1, torch.bfloat16, 0.05)
    (row_MB,), (grad_q_BD, grad_p_ND, *_) = _run(
        kernels, inputs, dims=(D,), path=path, workspace_mib=40_000
    )
    last = slice(B - 64, B)
    z_64N = (
        inputs[2][0, last, None] * inputs[3][0] * (inputs[0][last].float() @ inputs[1].float().T)
    )
    torch.testing.assert_close(row_MB[0, last], torch.logsumexp(z_64N, 1), rtol=0, atol=1e-3)
    assert torch.isfinite(grad_q_BD).all() and torch.isfinite(grad_p_ND).all()
    assert (grad_q_BD[last] != 0).any()


@pytest.mark.parametrize("path", ["fused", "chunk", "eform"])
def test_two_runs_give_the_same_bits_at_size(kernels, path):
    inputs = _inputs(4000, 9000, 384, 1, torch.bfloat16, 0.05)
    first, again = (_run(kernels, inputs, dims=(384,), path=path) for _ in range(2))
    for a, b in zip(first[0] + first[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


def test_under_torch_compile_the_graph_breaks_and_the_result_stands(kernels):
    inputs = _inputs(300, 500, 64, 1, torch.bfloat16, 0.05)

    def loss(*x):
        return kernels.sweep(*x, dims=(64,), path="fused")[0].mean() * 2

    torch.testing.assert_close(torch.compile(loss)(*inputs), loss(*inputs))
