"""What the sides of benchmarks/infonce.py are given, and what they must find: in float64.

Shapes: B queries, N passages, D embedding, d a prefix of it, r and c some rows and columns of the
B x N scores, n rows of any of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.infonce_sides import SIGMOID_BIAS, Gradients, temperature_of

_CELLS = {"cpu": 2**20, "cuda": 2**26}  # scores in float64 held at once


def embeddings(
    B: int, N: int, D: int, *, cosine: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Seeded random unit vectors; a query and its answer have about the given cosine."""
    generator = torch.Generator(device).manual_seed(0)
    q_BD = F.normalize(torch.randn(B, D, generator=generator, device=device), dim=-1)
    p_ND = F.normalize(torch.randn(N, D, generator=generator, device=device), dim=-1)
    p_ND[:B] = F.normalize(cosine * q_BD + math.sqrt(1 - cosine**2) * p_ND[:B], dim=-1)
    return q_BD, p_ND


def cosine_for(loss: float, N: int, D: int) -> float:
    """The cosine of query and answer at which one-sided InfoNCE of `embeddings` is about `loss`:
    the other scores are normal with variance 1 / (D temperature^2)."""
    log_sum = math.log(N - 1) + 1 / (2 * D * temperature_of() ** 2)
    cosine = temperature_of() * (log_sum - math.log(math.expm1(loss)))
    if not -1 < cosine < 1:
        raise SystemExit(f"no cosine gives a loss of {loss:g} at N {N}, D {D}: {cosine:.3g}")
    return cosine


@dataclass
class Truth:
    """loss; gradients of some rows of q_BD (row_r) and of p_ND (column_c), which may be all."""

    loss: Tensor
    row_r: Tensor
    column_c: Tensor
    grad_q_rD: Tensor
    grad_p_cD: Tensor


@torch.no_grad()
def truth(
    q_BD: Tensor,
    p_ND: Tensor,
    dims: Sequence[int],
    kind: str = "one-sided",
    *,
    sample: int | None = None,
    cells: int | None = None,
) -> Truth:
    """The loss of all rows, and the gradients of about `sample` rows of each side (None: all).

    From the equations, a block of scores at a time: sums first, then the gradient of any block is
    known. cells: scores held at once; it changes rounding alone.
    """
    cells = cells or _CELLS.get(q_BD.device.type, 2**20)
    q_BD, p_ND = q_BD.double(), p_ND.double()
    row_r, column_c = (_some(len(x), sample, x.device) for x in (q_BD, p_ND))
    found = Truth(
        q_BD.new_zeros(()), row_r, column_c,
        q_BD.new_zeros(len(row_r), q_BD.shape[1]), p_ND.new_zeros(len(column_c), p_ND.shape[1]),
    )  # fmt: skip
    for d in dims or (q_BD.shape[1],):
        scores = _Scores(q_BD, p_ND, d, kind, cells)
        weight = 1 / max(1, len(dims))
        found.loss += scores.loss * weight
        found.grad_q_rD[:, :d] += weight * scores.gradient_of_queries(row_r)
        found.grad_p_cD[:, :d] += weight * scores.gradient_of_passages(column_c)
    return found


def _some(n: int, sample: int | None, device: torch.device) -> Tensor:
    if sample is None or sample >= n:
        return torch.arange(n, device=device)
    return torch.linspace(0, n - 1, sample, device=device, dtype=torch.float64).long()


class _Scores:
    """z of one dim in blocks: the loss and its gradients."""

    def __init__(self, q_BD: Tensor, p_ND: Tensor, d: int, kind: str, cells: int):
        self.B, self.kind, self.cells = len(q_BD), kind, cells
        is_full = d == q_BD.shape[1]
        self.q_norm_B1, self.p_norm_N1 = (
            None if is_full else x[:, :d].norm(dim=1, keepdim=True) for x in (q_BD, p_ND)
        )
        self.q_Bd = q_BD if is_full else q_BD[:, :d] / self.q_norm_B1
        self.p_Nd = p_ND if is_full else p_ND[:, :d] / self.p_norm_N1
        self.temperature = temperature_of(kind)
        self._sum()

    def _blocks(self, n: int, width: int) -> list[slice]:
        step = max(1, self.cells // max(1, width))
        return [slice(lo, min(lo + step, n)) for lo in range(0, n, step)]

    def _sum(self) -> None:
        """Log-sums of rows, and of columns where the loss has them; the loss."""
        B, q_Bd, p_Nd = self.B, self.q_Bd, self.p_Nd
        own_B = (q_Bd * p_Nd[:B]).sum(1) / self.temperature
        self.row_log_B = torch.empty_like(own_B)
        self.column_log_N = own_B.new_full((len(p_Nd),), -math.inf)
        self.loss = own_B.new_zeros(())
        for at in self._blocks(B, len(p_Nd)):
            z_rN = q_Bd[at] @ p_Nd.T / self.temperature
            if self.kind == "sigmoid":
                x_rN = z_rN + SIGMOID_BIAS
                # log(1 + e^x) of all cells; a positive's is log(1 + e^-x), x less
                of_all = F.softplus(x_rN, threshold=40).sum()
                self.loss += (of_all - (own_B[at] + SIGMOID_BIAS).sum()) / B
                continue
            self.row_log_B[at] = torch.logsumexp(z_rN, 1)
            if self.kind == "two-sided":
                self.column_log_N = torch.logaddexp(self.column_log_N, torch.logsumexp(z_rN, 0))
        if self.kind != "sigmoid":
            self.loss = (self.row_log_B - own_B).mean()
        if self.kind == "two-sided":
            self.loss = (self.loss + (self.column_log_N[:B] - own_B).mean()) / 2

    def _gradient(self, row_r: Tensor, column_c: Tensor) -> Tensor:
        """dL/dz of the cells of some rows and columns, (r, c)."""
        z_rc = self.q_Bd[row_r] @ self.p_Nd[column_c].T / self.temperature
        is_own_rc = row_r[:, None] == column_c
        if self.kind == "sigmoid":
            x_rc = z_rc + SIGMOID_BIAS
            return torch.where(is_own_rc, -torch.sigmoid(-x_rc), torch.sigmoid(x_rc)) / self.B
        g_rc = (z_rc - self.row_log_B[row_r, None]).exp()
        if self.kind == "two-sided":
            of_columns_rc = (z_rc - self.column_log_N[column_c]).exp() * (column_c < self.B)
            g_rc = (g_rc + of_columns_rc) / 2
        return (g_rc - is_own_rc.double()) / self.B

    def gradient_of_queries(self, row_r: Tensor) -> Tensor:
        N = len(self.p_Nd)
        all_N = torch.arange(N, device=row_r.device)
        parts = [self._gradient(row_r[at], all_N) @ self.p_Nd for at in self._blocks(len(row_r), N)]
        norm_B1 = self.q_norm_B1
        return self._through_norm(
            torch.cat(parts), self.q_Bd[row_r], None if norm_B1 is None else norm_B1[row_r]
        )

    def gradient_of_passages(self, column_c: Tensor) -> Tensor:
        all_B = torch.arange(self.B, device=column_c.device)
        parts = [
            self._gradient(all_B, column_c[at]).T @ self.q_Bd
            for at in self._blocks(len(column_c), self.B)
        ]
        norm_N1 = self.p_norm_N1
        return self._through_norm(
            torch.cat(parts), self.p_Nd[column_c], None if norm_N1 is None else norm_N1[column_c]
        )

    def _through_norm(self, grad_nd: Tensor, unit_nd: Tensor, norm_n1: Tensor | None) -> Tensor:
        grad_nd = grad_nd / self.temperature
        if norm_n1 is None:
            return grad_nd
        return (grad_nd - (grad_nd * unit_nd).sum(1, keepdim=True) * unit_nd) / norm_n1


def gradient_error(found: Gradients, wanted: Truth, q_BD: Tensor, p_ND: Tensor) -> float:
    """Norm of the difference over the norm, of both gradients together; of the queries' alone where
    a side has no other.

    Along the sphere alone: a tower's normalisation drops the rest, and a side that normalises
    itself has dropped it already.
    """
    pairs = [(found[1], wanted.grad_q_rD, q_BD, wanted.row_r)]
    if found[2] is not None:
        pairs.append((found[2], wanted.grad_p_cD, p_ND, wanted.column_c))
    difference = size = 0.0
    for got, want_nD, x, at_n in pairs:
        x_nD = x[at_n].double()
        a, b = (g - (g * x_nD).sum(1, keepdim=True) * x_nD for g in (got[at_n].double(), want_nD))
        difference += (a - b).square().sum().item()
        size += b.square().sum().item()
    return math.sqrt(difference / size)
