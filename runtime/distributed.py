"""Several processes on one batch: which one this is, and the few collectives that training needs.

Shapes: n rows of this rank, N rows of all ranks, K any further dimensions.

One process is SINGLE, whose methods are the identity and never touch torch.distributed: callers
need no branch. What is summed over ranks is not averaged: gradients are those of the global batch.
"""

import atexit
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Functions of torch.distributed.nn have the process group as a default argument: None, where it is
# imported before there is one, as here. torch imports it too, within an optimiser's first step: the
# group would then outlive its destruction, and gloo's threads the interpreter, which aborts now and
# then at exit.
if dist.is_available():
    import torch.distributed.nn

log = logging.getLogger(__name__)

# Others wait while rank 0 evaluates. A rank that dies does not cost this long: its connections
# close, and torchrun ends the rest.
TIMEOUT = timedelta(days=1)


class RankFailed(Exception):
    """Another rank has failed and says why; every rank knows and has left the same work."""

    is_shared, is_said_elsewhere = True, True


class RankLost(ConnectionError):
    """A collective broke, most likely because another rank ended in the middle of it."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size` processes that train together; rank 0 alone writes files."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_rows(self, x_nK: Tensor) -> Tensor:
        """The rows of all ranks in rank order, (N, K); n may differ between ranks and be 0.

        Differentiable: the backward sums the upstream gradients of all ranks and returns this
        rank's rows, so what is differentiated is the sum over ranks of their losses. Each rank must
        take part in forward and backward, one without rows too. Integers have no gradient.
        """
        return x_nK if self.size == 1 else _GatherRows.apply(x_nK, self.size)

    def all_reduce_sum(self, flat: Tensor) -> Tensor:
        """`flat` summed over ranks, in place."""
        if self.size > 1:
            with _collective():
                dist.all_reduce(flat)
        return flat

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in place."""
        if self.size > 1:
            with _collective():
                dist.broadcast(x, 0)
        return x

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's value, in rank order, on every rank; small picklable objects."""
        values = [value] * self.size
        if self.size > 1:
            with _collective():
                dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """The first rank's value that is not None, on every rank; None where all are None."""
        return next((v for v in self.gather_objects(value) if v is not None), None)

    def on_main(self, fn: Callable, *args: Any, **options: Any) -> Any:
        """fn(*args, **options) on rank 0 alone, while the others wait; its result on every rank.

        What it raises is raised on rank 0; the others raise RankFailed.
        """
        if self.size == 1:
            return fn(*args, **options)
        values = [None]
        with self.together():
            if self.is_main:
                values = [fn(*args, **options)]
        with _collective():
            dist.broadcast_object_list(values, 0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks when it fails on one: the first of those that failed
        raises its own error, all others RankFailed. No collective inside, but in on_main()."""
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except RankLost:  # nobody is left to tell
            raise
        except Exception as e:
            error = e
        failed = [r for r, text in enumerate(self.gather_objects(error and repr(error))) if text]
        if not failed:
            return
        if isinstance(error, RankFailed):  # told already, by a block inside this one
            raise error
        if failed[0] == self.rank:
            error.is_shared = True
            raise error
        raise RankFailed(f"rank {failed[0]} failed") from error


SINGLE = Ranks()


def init_ranks(device_name: str = "auto") -> Ranks:
    """This process's place among those that torchrun started; SINGLE without torchrun.

    device_name  auto | cpu | cuda: with CUDA this process takes the card LOCAL_RANK
    The process group is made once a process, so that a sweep's runs share it. Tensors on a CPU go
    through gloo, those on a card through nccl.
    Raises ValueError when the device cannot be had by each of the processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return SINGLE
    has_cuda = torch.cuda.is_available()
    if device_name == "mps" or (
        device_name == "auto" and not has_cuda and torch.backends.mps.is_available()
    ):
        raise ValueError(
            f"several processes cannot share one mps device: got runtime.device={device_name} and"
            f" WORLD_SIZE={world}; start one process, or set runtime.device=cpu"
        )
    if device_name == "cuda" or (device_name == "auto" and has_cuda):
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine needs a card of its own, but there are"
                f" {torch.cuda.device_count()}; lower --nproc-per-node, or set runtime.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
        log.info("%d processes train together", world)
    return Ranks(dist.get_rank(), dist.get_world_size())


def broadcast_state(
    ranks: Ranks, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Give every rank the weights, buffers and optimiser state of rank 0, in place."""
    if ranks.size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            ranks.broadcast(tensor)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes_P = [
        {name: (x.shape, x.dtype, x.device.type) for name, x in optimizer.state.get(p, {}).items()}
        for p in parameters
    ]  # before the first step there is no state
    for p, shapes in zip(parameters, ranks.gather_objects(shapes_P)[0], strict=True):
        for name, (shape, dtype, kind) in shapes.items():
            device = p.device if kind == p.device.type else kind
            if not ranks.is_main:
                optimizer.state[p][name] = torch.empty(shape, dtype=dtype, device=device)
            ranks.broadcast(optimizer.state[p][name])


class _GatherRows(torch.autograd.Function):
    """Blocks are padded to the longest: gloo gathers equal shapes alone."""

    @staticmethod
    def forward(ctx, x_nK: Tensor, size: int) -> Tensor:
        ctx.count, counts = len(x_nK), [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
        with _collective():  # on the CPU, so that a card is not waited for
            dist.all_gather(counts, torch.tensor([ctx.count]))
        ctx.counts = [int(c) for c in counts]
        most = max(ctx.counts)
        if most == 0:
            return x_nK.clone()
        padded = x_nK.new_zeros(most, *x_nK.shape[1:])
        padded[: ctx.count] = x_nK
        blocks = list(x_nK.new_empty(size, *padded.shape).unbind(0))
        with _collective():
            dist.all_gather(blocks, padded)
        return torch.cat([block[:n] for block, n in zip(blocks, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, grad_NK: Tensor) -> tuple[Tensor, None]:
        most, start = max(ctx.counts), 0
        if most == 0:
            return grad_NK, None
        wide = torch.promote_types(grad_NK.dtype, torch.float32)  # bf16 is no type to sum in
        blocks = grad_NK.new_zeros(len(ctx.counts), most, *grad_NK.shape[1:], dtype=wide)
        for block, n in zip(blocks.unbind(0), ctx.counts, strict=True):
            block[:n] = grad_NK[start : start + n]
            start += n
        own = torch.empty_like(blocks[0])
        with _collective():
            dist.reduce_scatter(own, list(blocks.unbind(0)))
        return own[: ctx.count].to(grad_NK.dtype), None


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error)).split(". ")[0].strip()
        raise RankLost(
            f"the exchange with the other ranks broke ({reason}); if one of them failed, its own"
            f" message says why"
        ) from error
