"""Time and memory of the loss alone, forward and backward: python -m benchmarks.infonce

Ours against the other ways of computing the same loss on the same unit-norm embeddings, one dim or
several Matryoshka dims, each in float32 as it comes. Times: all sides by turns in one process, with
the allocator of train.py, after a call that is not counted; the ratio to a peer is the median over
rounds, a rate is queries over seconds. Memory: growth at the highest point of one call, gradients
included, in a process of its own. Beside them the relative error of the gradient against float64.

Shapes: B queries, N candidate passages (the first B answer them, in order), D embedding, d a prefix
of it.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = ("1024x1024x384", "2048x2048x384", "4096x4096x384", "8192x8192x384", "2048x4096x384")
DIMS = ("-", "384,256,128,64,32")
TEMPERATURE = 0.05
Gradients = tuple[Tensor, Tensor, Tensor]  # loss, its gradient by q_BD and by p_ND

# ----------------------------------------------------------------------------------------------
# the sides: (q_BD, p_ND, dims) -> Gradients; the loss is the mean over dims, () is the full width


def rook(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]) -> Gradients:
    from conf.schema import LossConfig
    from losses.infonce import InfoNCE, Targets

    B = len(q_BD)
    row_B = torch.arange(B, device=q_BD.device)
    targets = Targets(
        pair_query_P=row_B,
        pair_passage_P=row_B,
        pair_weight_P=torch.ones(B, device=q_BD.device),
        relatives_BK=row_B[:, None],
        num_examples=B,
    )
    loss_fn = InfoNCE(LossConfig(temperature=TEMPERATURE, dims=list(dims))).to(q_BD.device)
    q_BD, p_ND = _leaves(q_BD, p_ND)
    loss, _ = loss_fn(q_BD, p_ND, targets)
    loss.backward()
    return loss.detach(), q_BD.grad, p_ND.grad


def dense(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]) -> Gradients:
    """Plain torch: cross_entropy of B x N scores."""

    def one(q_Bd: Tensor, p_Nd: Tensor, row_B: Tensor) -> Tensor:
        return F.cross_entropy(q_Bd @ p_Nd.T / TEMPERATURE, row_B)

    return _mean_over_dims(one, q_BD, p_ND, dims)


def linear_cross_entropy(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]) -> Gradients:
    """torch's own chunked form, as its documentation switches it on."""
    from torch.nn import LinearCrossEntropyOptions

    def one(q_Bd: Tensor, p_Nd: Tensor, row_B: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions()
        return F.linear_cross_entropy(q_Bd / TEMPERATURE, p_Nd, row_B, options=options)

    return _mean_over_dims(one, q_BD, p_ND, dims)


def sentence_transformers(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int]) -> Gradients:
    """The loss stage of CachedMultipleNegativesRankingLoss, under MatryoshkaLoss for several dims.

    Called as its forward_cached calls it: leaves of mini_batch_size (32) rows, the backward inside.
    Passages beyond the first B are columns of hard negatives.
    """
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator

    no_model = torch.nn.Sequential(torch.nn.Identity())  # the loss stage never encodes
    loss_fn = CachedMultipleNegativesRankingLoss(no_model, scale=1 / TEMPERATURE)
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


@dataclass(frozen=True)
class Side:
    compute: Callable[[Tensor, Tensor, Sequence[int]], Gradients]
    is_here: Callable[[], bool] = lambda: True
    precisions: tuple[str, ...] = ("fp32",)


OURS = "rook"
SIDES = {
    OURS: Side(rook),
    "dense": Side(dense),
    "linear_cross_entropy": Side(
        linear_cross_entropy, lambda: hasattr(torch.nn, "LinearCrossEntropyOptions")
    ),
    "sentence-transformers": Side(
        sentence_transformers, lambda: importlib.util.find_spec("sentence_transformers") is not None
    ),
}
DTYPES = {"fp32": torch.float32}


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _prefixes(
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


def _mean_over_dims(
    one: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_BD: Tensor,
    p_ND: Tensor,
    dims: Sequence[int],
) -> Gradients:
    q_BD, p_ND = _leaves(q_BD, p_ND)
    row_B = torch.arange(len(q_BD), device=q_BD.device)
    loss = sum(one(q, p, row_B) * weight for q, p, weight in _prefixes(q_BD, p_ND, dims))
    loss.backward()
    return loss.detach(), q_BD.grad, p_ND.grad


# ----------------------------------------------------------------------------------------------
# what they are given and what they must find


def embeddings(B: int, N: int, D: int, *, cosine: float) -> tuple[Tensor, Tensor]:
    """Seeded random unit vectors; a query and its answer have about the given cosine."""
    generator = torch.Generator().manual_seed(0)
    q_BD = F.normalize(torch.randn(B, D, generator=generator), dim=-1)
    p_ND = F.normalize(torch.randn(N, D, generator=generator), dim=-1)
    p_ND[:B] = F.normalize(cosine * q_BD + math.sqrt(1 - cosine**2) * p_ND[:B], dim=-1)
    return q_BD, p_ND


def truth(q_BD: Tensor, p_ND: Tensor, dims: Sequence[int], *, rows: int = 256) -> Gradients:
    """The loss and its gradients in float64, `rows` queries at a time so that no B x N scores are
    held."""
    q_BD, p_ND = _leaves(q_BD.double(), p_ND.double())
    total = q_BD.new_zeros(())
    for start in range(0, len(q_BD), rows):
        some = slice(start, min(start + rows, len(q_BD)))
        row_b = torch.arange(some.start, some.stop, device=q_BD.device)
        for q_bd, p_Nd, weight in _prefixes(q_BD[some], p_ND, dims):
            log_p_bN = torch.log_softmax(q_bd @ p_Nd.T / TEMPERATURE, 1)
            loss = -log_p_bN[row_b - start, row_b].sum() * weight / len(q_BD)
            loss.backward()
            total += loss.detach()
    return total, q_BD.grad, p_ND.grad


def gradient_error(found: Gradients, wanted: Gradients, q_BD: Tensor, p_ND: Tensor) -> float:
    """Norm of the difference over the norm, of both gradients together.

    Along the sphere alone: a tower's normalisation drops the rest, and a side that normalises
    itself has dropped it already.
    """

    def along(gradients: Gradients) -> Tensor:
        parts = []
        for g, x in zip(gradients[1:], (q_BD.double(), p_ND.double()), strict=True):
            g = g.double()
            parts.append((g - (g * x).sum(1, keepdim=True) * x).flatten())
        return torch.cat(parts)

    a, b = along(found), along(wanted)
    return ((a - b).norm() / b.norm()).item()


# ----------------------------------------------------------------------------------------------
# measuring


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.infonce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    peers = [side for side in SIDES if side != OURS]
    parser.add_argument("--peer", nargs="+", choices=peers, default=peers)
    parser.add_argument("--size", nargs="+", default=SIZES, metavar="BxNxD", help="N >= B")
    parser.add_argument(
        "--dims", nargs="+", default=DIMS, help="each a list with commas; - is the full width"
    )
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cosine", type=float, default=0.4, help="of a query and its answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/data/infonce.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for size in args.size:
        if len(shape := size.split("x")) != 3 or not all(n.isdigit() for n in shape):
            parser.error(f"--size {size}: want BxNxD, such as 2048x4096x384")
        if int(shape[0]) > int(shape[1]):
            parser.error(f"--size {size}: every query needs its answer among N >= B passages")
    return args


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import emit

    rows = []
    for precision in args.precision:
        sides = [OURS, *(p for p in args.peer if precision in SIDES[p].precisions)]
        missing = [side for side in sides if not SIDES[side].is_here()]
        if missing:
            print(f"left out, not in this environment: {', '.join(missing)}")
        sides = [side for side in sides if side not in missing]
        if len(sides) == 1:
            raise SystemExit(f"no peer is left in {precision}; choose others with --peer")
        for size in args.size:
            for dims in args.dims:
                rows += measured(args, precision, size, dims, sides)
    emit(rows, csv_name="infonce.csv" if args.csv else None, json_path=args.json)


def measured(
    args: argparse.Namespace, precision: str, size: str, dims: str, sides: list[str]
) -> list[dict]:
    """A row for each peer."""
    from benchmarks.turns import row, run_worker

    options = ["--size", size, "--dims", dims, "--precision", precision]
    options += ["--device", args.device, "--cosine", str(args.cosine)]
    times = run_worker(
        "benchmarks.infonce",
        [*("--worker", "times"), *options, "--rounds", str(args.rounds), "--peer", *sides[1:]],
    )
    B = int(size.split("x")[0])
    results, ms, error = {}, {}, times["gradient_error"]
    for side in sides:
        alone = run_worker("benchmarks.infonce", ["--worker", side, *options])
        shared = {"peak_mib": alone["peak_mib"], "device": times["device"]}
        results[side] = [shared | {"rate": B / s} for s in times["seconds"][side]]
        ms[side] = round(1000 * sorted(times["seconds"][side])[args.rounds // 2], 2)
    name = f"loss {size} dims {dims if dims != '-' else size.split('x')[2]}"
    return [
        row(name, peer, precision, results)
        | {
            **{"ms": ms[OURS], "peer_ms": ms[peer], "loss": times["loss"]},
            **{"gradient_error": error[OURS], "peer_gradient_error": error[peer]},
        }
        for peer in sides[1:]
    ]


def _given(args: argparse.Namespace) -> tuple[Tensor, Tensor, list[int], torch.device]:
    from runtime.device import pick_device

    device = pick_device(args.device)
    B, N, D = map(int, args.size[0].split("x"))
    dims = [] if args.dims[0] == "-" else [int(d) for d in args.dims[0].split(",")]
    q_BD, p_ND = embeddings(B, N, D, cosine=args.cosine)
    dtype = DTYPES[args.precision[0]]
    return q_BD.to(device, dtype), p_ND.to(device, dtype), dims, device


def work_times(args: argparse.Namespace) -> dict:
    """Seconds and gradient error of every side, in this process."""
    from benchmarks.turns import device_name, interleaved
    from runtime.device import keep_freed_memory

    keep_freed_memory()
    q_BD, p_ND, dims, device = _given(args)
    wanted = truth(q_BD, p_ND, dims)
    sides = [OURS, *args.peer]
    found = {side: SIDES[side].compute(q_BD, p_ND, dims) for side in sides}
    for side in sides:
        if not torch.isclose(found[side][0].double(), wanted[0], rtol=1e-2):
            raise SystemExit(f"{side} finds loss {found[side][0]}, float64 {wanted[0]}")
    error = {
        side: float(f"{gradient_error(found[side], wanted, q_BD, p_ND):.2g}") for side in sides
    }
    del found
    calls = {side: (lambda _, s=side: SIDES[s].compute(q_BD, p_ND, dims)) for side in sides}
    return {
        "seconds": interleaved(calls, args.rounds, device),
        "gradient_error": error,
        "loss": round(wanted[0].item(), 4),
        "device": device_name(device),
    }


def work_memory(args: argparse.Namespace) -> dict:
    """Growth at the highest point of one call of one side, alone in this process."""
    from benchmarks.turns import PeakMemory, release_freed_memory

    q_BD, p_ND, dims, device = _given(args)
    compute = SIDES[args.worker].compute
    # libraries load what they need, and threads their buffers
    compute(q_BD[:64].clone(), p_ND[:64].clone(), dims)
    release_freed_memory()
    with PeakMemory(device) as memory:
        compute(q_BD, p_ND, dims)
    return {"peak_mib": round(memory.grown_mib, 1)}


if __name__ == "__main__":
    from benchmarks.turns import main

    main(arguments, compare, {"times": work_times, **{side: work_memory for side in SIDES}})
