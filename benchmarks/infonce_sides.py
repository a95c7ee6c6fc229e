"""Who computes the loss in benchmarks/infonce.py: ours by each path, torch's ways, other libraries.

Shapes: B queries, N candidate passages (the first B answer them, in order), D embedding, d a prefix
of it, M Matryoshka dims, c rows of a chunk.

Three losses, each the mean over Matryoshka dims, z = cosine / temperature:

one-sided   mean_i of -log softmax(z_i)[i]                              InfoNCE
two-sided   half of it, and half the same over the columns 0..B         CLIP
sigmoid     sum over cells of -log sigmoid(+-(z + bias)) / B            SigLIP

A side takes (q_BD, p_ND, dims, kind) and answers (loss, gradient of q_BD, gradient of p_ND), in the
type of its inputs; None for a gradient that it does not have. dims () is the full width alone.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("one-sided", "two-sided", "sigmoid")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOFTMAX_TEMPERATURE = [0.05]  # of this process: --temperature writes another
SIGMOID_TEMPERATURE, SIGMOID_BIAS = 0.1, -10.0  # where SigLIP starts
Gradients = tuple[Tensor, Tensor, Tensor | None]


def temperature_of(kind: str = "one-sided") -> float:
    return SIGMOID_TEMPERATURE if kind == "sigmoid" else SOFTMAX_TEMPERATURE[0]


@dataclass(frozen=True)
class Case:
    """What is computed."""

    kind: str
    precision: str
    B: int
    N: int
    D: int
    dims: tuple[int, ...] = ()
    cosine: float = 0.4  # of a query and its answer

    @property
    def size(self) -> str:
        return f"{self.B}x{self.N}x{self.D}"

    @property
    def name(self) -> str:
        kind = "" if self.kind == "one-sided" else f"{self.kind} "
        return f"loss {kind}{self.size} dims {','.join(map(str, self.dims)) or self.D}"


@dataclass(frozen=True)
class Side:
    """One way to compute, and what it serves; `fits` answers why it does not serve a case."""

    compute: Callable[[Tensor, Tensor, Sequence[int], str], Gradients]
    kinds: tuple[str, ...] = KINDS
    precisions: tuple[str, ...] = tuple(DTYPES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""  # a package
    fits: Callable[[Case], str] = lambda case: ""
    note: Callable[[Case], str] = lambda case: ""

    def why_not(self, case: Case, device: str) -> str:
        """Empty when this side serves the case here."""
        if case.kind not in self.kinds:
            return f"has no {case.kind} loss"
        if case.precision not in self.precisions:
            return f"has no {case.precision}"
        if device not in self.devices and not (INTERPRETED in self.devices and interpreting()):
            return f"does not run on {device}"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"package {self.needs} is missing"
        return self.fits(case)


INTERPRETED = "cpu through Triton's interpreter"


def interpreting() -> bool:
    from losses.similarity import kernels

    return importlib.util.find_spec("triton") is not None and kernels().INTERPRETING


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def backward(loss: Tensor, q_BD: Tensor, p_ND: Tensor) -> Gradients:
    loss.backward()
    return loss.detach(), q_BD.grad, p_ND.grad


def prefixes(
    q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(q_Bd, p_Nd, weight) for each dim; prefixes are normalised again."""
    D = q_BD.shape[1]
    for d in dims or (D,):
        if d == D:
            yield q_BD, p_ND, 1 / max(1, len(dims))
        else:
            q_Bd, p_Nd = F.normalize(q_BD[:, :d], dim=-1), F.normalize(p_ND[:, :d], dim=-1)
            yield q_Bd, p_Nd, 1 / len(dims)


def mean_over_dims(
    one: Callable[[Tensor, Tensor], Tensor], q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]
) -> Gradients:
    """One dim after the other."""
    q_BD, p_ND = leaves(q_BD, p_ND)
    loss = sum(one(q, p) * weight for q, p, weight in prefixes(q_BD, p_ND, dims))
    return backward(loss, q_BD, p_ND)


# ----------------------------------------------------------------------------------------------
# ours


def rook(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """The loss module as a training step calls it, kernels on CUDA, chunks in torch elsewhere."""
    from conf.schema import LossConfig
    from losses.infonce import InfoNCE, Targets
    from losses.sigmoid import Sigmoid

    B = len(q_BD)
    row_B = torch.arange(B, device=q_BD.device)
    targets = Targets(
        pair_query_P=row_B,
        pair_passage_P=row_B,
        pair_weight_P=torch.ones(B, device=q_BD.device),
        relatives_BK=row_B[:, None],
        num_examples=B,
    )
    own = {"kind": "sigmoid", "sigmoid_bias": SIGMOID_BIAS} if kind == "sigmoid" else {}
    config = LossConfig(
        **own,
        temperature=temperature_of(kind),
        symmetric=0.5 if kind == "two-sided" else 0.0,
        dims=list(dims),
        backend="triton" if q_BD.is_cuda else "auto",
    )
    loss_fn = (Sigmoid if kind == "sigmoid" else InfoNCE)(config).to(q_BD.device)
    q_BD, p_ND = leaves(q_BD, p_ND)
    loss, _ = loss_fn(q_BD, p_ND, targets)
    return backward(loss, q_BD, p_ND)


def rook_by(path: str) -> Callable[..., Gradients]:
    """One path of kernels/infonce_triton.py, or "torch": the chunks of losses/similarity.py. Rows
    alone tell the gradient of one-sided InfoNCE, so "chunk" and "eform" get it foretold."""

    def compute(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
        from losses.similarity import kernels, positive_scores, prefix_factors, similarity_sums

        q_BD, p_ND = leaves(q_BD, p_ND)
        B, D = q_BD.shape
        dims = sorted(dims) or [D]
        scale = torch.tensor(1 / temperature_of(), device=q_BD.device)
        row_B = torch.arange(B, device=q_BD.device)
        two_sided = kind == "two-sided"
        z_MB = positive_scores(q_BD, p_ND, scale, row_B, row_B, dims=dims)
        if path == "torch":
            want = ("row", "column") if two_sided else ("row",)
            sums = similarity_sums(
                q_BD, p_ND, scale, dims=dims, relatives_BK=row_B[:, None], want=want
            )
            row_MB, column_MN = sums.row_MB, sums.column_MN
        else:

            def foretell(m: int, lo: int, hi: int, row_c: Tensor) -> Tensor:
                return torch.sigmoid(row_c - z_MB[m, lo:hi]) / z_MB.numel()

            row_MB, column_MN = kernels().sweep(
                q_BD, p_ND, scale * prefix_factors(q_BD, dims), prefix_factors(p_ND, dims),
                dims=dims, relatives_BK=row_B[:, None], want_columns=two_sided, path=path,
                row_gradient=foretell if path in ("chunk", "eform") else None,
            )  # fmt: skip
        loss = F.softplus(row_MB - z_MB, threshold=40).mean()
        if two_sided:
            loss = (loss + F.softplus(column_MN[:, :B] - z_MB, threshold=40).mean()) / 2
        return backward(loss, q_BD, p_ND)

    return compute


# ----------------------------------------------------------------------------------------------
# torch


def dense_loss(q_Bd: Tensor, p_Nd: Tensor, kind: str) -> Tensor:
    """The definition, on B x N scores: a product in the inputs' type, the rest in float32."""
    z_BN = (q_Bd @ p_Nd.T).float() / temperature_of(kind)
    row_B = torch.arange(len(z_BN), device=z_BN.device)
    if kind == "sigmoid":
        sign_BN = torch.full_like(z_BN, -1.0)
        sign_BN.fill_diagonal_(1.0)
        return -F.logsigmoid(sign_BN * (z_BN + SIGMOID_BIAS)).sum() / len(z_BN)
    loss = F.cross_entropy(z_BN, row_B)
    if kind == "two-sided":
        loss = (loss + F.cross_entropy(z_BN[:, : len(z_BN)].T, row_B)) / 2
    return loss


def dense(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    return mean_over_dims(lambda q, p: dense_loss(q, p, kind), q_BD, p_ND, dims)


@functools.lru_cache(maxsize=1)
def _compiled(kind: str, *shapes: object) -> Callable[..., Tensor]:
    """A program of its own for each shape: dynamic shapes are slower, and after eight shapes of one
    function torch gives up compiling it."""
    torch._dynamo.reset()

    def loss(q_BD: Tensor, p_ND: Tensor, dims: tuple[int, ...]) -> Tensor:
        return sum(dense_loss(q, p, kind) * weight for q, p, weight in prefixes(q_BD, p_ND, dims))

    return torch.compile(loss, dynamic=False)


def compiled_dense(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    q_BD, p_ND = leaves(q_BD, p_ND)
    loss_fn = _compiled(kind, q_BD.shape, p_ND.shape, q_BD.dtype, tuple(dims))
    return backward(loss_fn(q_BD, p_ND, tuple(dims)), q_BD, p_ND)


def linear_cross_entropy(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """torch's own chunked form (2.13), as its documentation switches it on."""
    from torch.nn import LinearCrossEntropyOptions

    def one(q_Bd: Tensor, p_Nd: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions()
        row_B = torch.arange(len(q_Bd), device=q_Bd.device)
        return F.linear_cross_entropy(q_Bd / temperature_of(), p_Nd, row_B, options=options)

    return mean_over_dims(one, q_BD, p_ND, dims)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The algorithm of F.linear_cross_entropy for a torch that lacks it: a chunk of rows at a time,
    scores in float32 by the library, gradients in the forward, 6 B N D operations.

    rows  of a chunk; None: torch's rule (a chunk of scores takes half the memory of q_BD)
    As its "compact" policy, the gradient of p_ND is added up in the type of p_ND; unlike it, 1 is
    taken from the positive's probability before rounding. Read in torch 2.13.
    """

    @staticmethod
    def forward(ctx, q_BD: Tensor, p_ND: Tensor, rows: int | None) -> Tensor:
        B, D = q_BD.shape
        if rows is None:
            ratio = -(-len(p_ND) // D)
            rows = max(1, (1 << (-(-B // ratio) - 1).bit_length()) // 2)
        grad_q_BD, grad_p_ND = torch.empty_like(q_BD), torch.zeros_like(p_ND)
        total = torch.zeros((), device=q_BD.device)
        for lo in range(0, B, rows):
            q_cD = q_BD[lo : lo + rows]
            row_c = torch.arange(len(q_cD), device=q_BD.device)
            log_p_cN = torch.log_softmax(_wide_product(q_cD, p_ND.T), 1)
            total -= log_p_cN[row_c, lo + row_c].sum()
            g_cN = log_p_cN.exp_()
            g_cN[row_c, lo + row_c] -= 1.0
            g_cN = g_cN.div_(B).to(q_BD.dtype)
            torch.mm(g_cN, p_ND, out=grad_q_BD[lo : lo + rows])
            grad_p_ND.addmm_(g_cN.T, q_cD)
        ctx.save_for_backward(grad_q_BD, grad_p_ND)
        return total / B

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_q_BD, grad_p_ND = ctx.saved_tensors
        return grad_q_BD.mul_(upstream), grad_p_ND.mul_(upstream), None


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in float32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return x.float() @ y.float()
    return torch.mm(x, y, out_dtype=torch.float32)


def chunked(rows: int | None) -> Callable[..., Gradients]:
    def compute(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
        def one(q_Bd: Tensor, p_Nd: Tensor) -> Tensor:
            return ChunkedCrossEntropy.apply(q_Bd / temperature_of(), p_Nd, rows)

        return mean_over_dims(one, q_BD, p_ND, dims)

    return compute


# ----------------------------------------------------------------------------------------------
# other libraries


def sentence_transformers(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """The loss stage of CachedMultipleNegativesRankingLoss, under MatryoshkaLoss for several dims.

    Called as its forward_cached calls it: leaves of mini_batch_size rows, the backward inside.
    Passages beyond the first B are columns of hard negatives.
    """
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator

    no_model = torch.nn.Sequential(torch.nn.Identity())  # the loss stage never encodes
    options = {"mini_batch_size": ST_CUDA_ROWS} if q_BD.is_cuda else {}
    if kind == "two-sided":
        options["directions"] = ("query_to_doc", "doc_to_query")
        options["partition_mode"] = "per_direction"
    loss_fn = CachedMultipleNegativesRankingLoss(no_model, scale=1 / temperature_of(), **options)
    calculate = loss_fn.calculate_loss
    if dims:
        calculate = CachedLossDecorator(calculate, list(dims), [1 / len(dims)] * len(dims))
    columns = [q_BD, *p_ND.split(len(q_BD))]
    parts = [
        [x.detach().requires_grad_() for x in column.split(loss_fn.mini_batch_size)]
        for column in columns
    ]
    loss = calculate(parts, None, with_backward=True)
    q_grad, *p_grads = (torch.cat([x.grad for x in column]) for column in parts)
    return loss.detach(), q_grad, torch.cat(p_grads)


ST_CUDA_ROWS = 1024  # with its 32 a batch of 65,536 would be four million small additions


def _st_fits(case: Case) -> str:
    if case.kind == "one-sided":
        return ""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    has_it = "partition_mode" in inspect.signature(CachedMultipleNegativesRankingLoss).parameters
    return "" if has_it else "this version has no two directions"


def memeff(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """stable=False: by default its gradients are multiplied by sqrt(B * temperature). Its one-sided
    loss, LiT, has the gradient of one tower alone."""
    import memeff as library

    name = "CLIP" if kind == "two-sided" else "LiT"
    options = {"temperature": temperature_of(), "normalized_inputs": True, "stable": False}
    if dims:
        options |= {"dims": sorted(dims), "weights": [1 / len(dims)] * len(dims)}
        name = f"Matryoshka{name}"
    loss_fn = getattr(library, f"MemoryEfficient{name}Loss")(**options)
    q_BD, p_ND = leaves(q_BD, p_ND)
    return backward(loss_fn(q_BD, p_ND), q_BD, p_ND)


def _memeff_fits(case: Case) -> str:
    if case.B != case.N:
        return "wants N = B"
    if case.D % 64 or any(d % 64 for d in case.dims) or max(case.dims, default=case.D) != case.D:
        return "wants dims in multiples of 64 that end in D"
    return ""


def _memeff_note(case: Case) -> str:
    notes = ["gradient of the queries alone"] if case.kind == "one-sided" else []
    return "; ".join([*notes, "tf32 products"] if case.precision == "fp32" else notes)


def inf_cl(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """One call a direction and a dim; it computes in float32, rounded to tf32, whatever it is
    given."""
    import inf_cl as library

    def one(q_Bd: Tensor, p_Nd: Tensor) -> Tensor:
        width = _head_width(q_Bd.shape[1])
        loss = library.cal_flash_loss(q_Bd, p_Nd, scale=1 / temperature_of(), head_dim=width).mean()
        if kind == "two-sided":
            other = library.cal_flash_loss(p_Nd, q_Bd, scale=1 / temperature_of(), head_dim=width)
            loss = (loss + other.mean()) / 2
        return loss

    return mean_over_dims(one, q_BD, p_ND, dims)


def _head_width(d: int) -> int:
    return next((w for w in (256, 128, 64, 32, 16) if d % w == 0), 0)


def _inf_cl_fits(case: Case) -> str:
    if case.B % 64 or case.N % 64:
        return "reads out of bounds where 64 does not divide B and N"
    if case.kind == "two-sided" and case.B != case.N:
        return "wants N = B"
    return "" if all(map(_head_width, case.dims or (case.D,))) else "wants dims in multiples of 16"


def siglip_kernel(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], kind: str) -> Gradients:
    """Its own choice of kernel by type and device. Gradients of temperature and bias come along."""
    import siglip_kernel as library

    log_scale = torch.tensor(1 / SIGMOID_TEMPERATURE, device=q_BD.device).log().requires_grad_()
    bias = torch.tensor(SIGMOID_BIAS, device=q_BD.device, requires_grad=True)
    return mean_over_dims(
        lambda q, p: library.fused_siglip_loss(q.contiguous(), p.contiguous(), log_scale, bias),
        q_BD, p_ND, dims,
    )  # fmt: skip


SOFTMAX = ("one-sided", "two-sided")
KERNEL_DEVICES = ("cuda", INTERPRETED)


OURS = "rook"
PATHS = {
    "rook-fused": Side(rook_by("fused"), SOFTMAX, devices=KERNEL_DEVICES),
    "rook-eform": Side(rook_by("eform"), ("one-sided",), devices=KERNEL_DEVICES),
    "rook-chunk": Side(rook_by("chunk"), ("one-sided",), devices=KERNEL_DEVICES),
    "rook-dense": Side(rook_by("dense"), SOFTMAX, devices=KERNEL_DEVICES),
    "rook-torch": Side(
        rook_by("torch"), SOFTMAX, note=lambda c: "float32 products" * (c.precision != "fp32")
    ),
}
PEERS = {
    "dense": Side(dense),
    "torch.compile": Side(compiled_dense),
    "linear_cross_entropy": Side(
        linear_cross_entropy, ("one-sided",),
        fits=lambda case: "" if hasattr(torch.nn, "LinearCrossEntropyOptions") else
        f"torch {torch.__version__} has none",
    ),
    "chunked-lce": Side(chunked(None), ("one-sided",)),
    "chunked-lce-4096": Side(chunked(4096), ("one-sided",), note=lambda c: "4096 rows a chunk"),
    "memeff": Side(
        memeff, SOFTMAX, devices=("cuda",), needs="memeff", fits=_memeff_fits, note=_memeff_note
    ),
    "inf-cl": Side(
        inf_cl, SOFTMAX, devices=("cuda",), needs="inf_cl", fits=_inf_cl_fits,
        note=lambda case: "float32 rounded to tf32",
    ),
    "siglip-kernel": Side(
        siglip_kernel, ("sigmoid",), devices=("cuda",), needs="siglip_kernel",
        fits=lambda case: "" if case.B == case.N else "wants N = B",
    ),
    "sentence-transformers": Side(
        sentence_transformers, SOFTMAX, needs="sentence_transformers", fits=_st_fits,
    ),
}  # fmt: skip
SIDES = {OURS: Side(rook), **PATHS, **PEERS}
