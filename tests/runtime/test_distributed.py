"""Collectives between real gloo processes, against one process that has all the rows."""

import atexit
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime.distributed import SINGLE, RankFailed, Ranks, broadcast_state, init_ranks
from tests.ranks import run_on_ranks

COUNTS = {2: [[3, 2], [0, 4], [2, 0]], 3: [[1, 4, 2], [2, 0, 3], [0, 0, 5], [0, 0, 0]]}


def rows(rank: int, counts: list[int], dtype=torch.float64) -> torch.Tensor:
    """Rank `rank`'s part of (sum of counts, 3) seeded rows."""
    all_N3 = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(5)).to(dtype)
    return all_N3.split(counts)[rank]


def loss_of(rank: int, x_N3: torch.Tensor) -> torch.Tensor:
    """Different on each rank, and not linear: a swapped or lost row changes the gradient."""
    weight_N3 = torch.arange(1.0, x_N3.numel() + 1, dtype=x_N3.dtype).view_as(x_N3)
    return ((rank + 1) * weight_N3 * x_N3.sin()).sum() + (x_N3 @ x_N3.T).exp().sum() * rank / 10


def gather_all(ranks: Ranks) -> list:
    """For each ragged split: the gathered rows and the gradient of this rank's."""
    found = []
    for counts in COUNTS[ranks.size]:
        x_n3 = rows(ranks.rank, counts).clone().requires_grad_()
        x_N3 = ranks.gather_rows(x_n3)
        loss_of(ranks.rank, x_N3).backward()
        found.append((x_N3.detach(), x_n3.grad))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_gathered_rows_and_their_gradients_are_those_of_one_process(world):
    """Ragged ranks and ranks without rows: an offset that is off by a rank's padding, a missing sum
    over ranks, or a hang shows here."""
    by_rank = run_on_ranks(gather_all, world)
    for i, counts in enumerate(COUNTS[world]):
        x_N3 = torch.cat([rows(r, counts) for r in range(world)]).requires_grad_()
        sum(loss_of(r, x_N3) for r in range(world)).backward()
        expected_grads = x_N3.grad.split(counts) if sum(counts) else [x_N3.grad] * world
        for rank in range(world):
            found, grad = by_rank[rank][i]
            assert torch.equal(found, x_N3.detach())
            # float64, the order of two or three sums
            torch.testing.assert_close(grad, expected_grads[rank], rtol=1e-12, atol=1e-12)


def other_types(ranks: Ranks) -> dict:
    x = rows(ranks.rank, [2, 1], torch.bfloat16).clone().requires_grad_()
    gathered = ranks.gather_rows(x)
    (gathered * (1.0 if ranks.is_main else 0.5)).sum().backward()
    numbers = ranks.gather_rows(torch.arange(ranks.rank + 1))
    vector = ranks.gather_rows(torch.full((ranks.rank,), 1.5))
    flat = ranks.all_reduce_sum(torch.tensor([1.0, ranks.rank]))
    return {
        "bf16": gathered.detach(),
        "bf16 grad": x.grad,
        "int64": numbers,
        "vector": vector,
        "sum": flat,
        "objects": ranks.gather_objects({"rank": ranks.rank}),
        "first": ranks.first(None if ranks.is_main else "SIGTERM"),
        "nothing": ranks.first(None),
        "state": shared_state(ranks),
    }


def shared_state(ranks: Ranks) -> list[torch.Tensor]:
    """Weights and AdamW state after one more step, where the ranks began with different ones and
    rank 0 alone had made steps."""
    torch.manual_seed(ranks.rank)
    model = nn.Linear(3, 2)
    model.register_buffer("level", torch.tensor(float(ranks.rank + 7)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step():
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    if ranks.is_main:
        step()
        step()
    broadcast_state(ranks, [model], optimizer)
    step()
    states = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in (*model.state_dict().values(), *states)]


def errors(ranks: Ranks) -> list[str]:
    """What this rank meets when something fails on one rank, on all, or on rank 0 alone."""

    def outcome(fn) -> str:
        try:
            with ranks.together():
                return f"value {fn()}"
        except Exception as error:
            return f"{type(error).__name__}: {error} shared={error.is_shared}"

    def fail(on=(0, 1)):
        if ranks.rank in on:
            raise ValueError(f"of rank {ranks.rank}")

    return [
        outcome(lambda: fail(on=())),
        outcome(lambda: fail(on=(1,))),
        outcome(fail),
        outcome(lambda: ranks.on_main(fail)),
        outcome(lambda: ranks.on_main(lambda: f"of rank {ranks.rank}")),
    ]


def types_and_errors(ranks: Ranks) -> tuple[dict, list[str]]:
    return other_types(ranks), errors(ranks)


@pytest.mark.slow
def test_what_ranks_tell_each_other():
    """Types beside float64, state of an optimiser that has made no step, and failures: nobody may
    be left waiting for a rank that has failed, and one rank alone says why."""
    (one, errors_0), (two, errors_1) = run_on_ranks(types_and_errors, 2)
    for name in ("bf16", "int64", "vector", "sum"):
        assert torch.equal(one[name], two[name])
    assert torch.equal(one["bf16"], torch.cat([rows(r, [2, 1], torch.bfloat16) for r in (0, 1)]))
    assert one["bf16 grad"].dtype == torch.bfloat16
    assert torch.equal(one["bf16 grad"], torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    assert one["int64"].tolist() == [0, 0, 1] and one["vector"].tolist() == [1.5]
    assert one["sum"].tolist() == [2, 1]
    assert one["objects"] == two["objects"] == [{"rank": 0}, {"rank": 1}]
    assert one["first"] == two["first"] == "SIGTERM" and one["nothing"] is None
    assert len(one["state"]) == 3 + 2 * 3  # weight, bias, buffer; step and two means of each
    for a, b in zip(one["state"], two["state"], strict=True):
        assert torch.equal(a, b)
    assert one["state"][2] == 7
    told = "RankFailed: rank {} failed shared=True"
    assert errors_0 == [
        "value None",
        told.format(1),
        "ValueError: of rank 0 shared=True",
        "ValueError: of rank 0 shared=True",
        "value of rank 0",
    ]
    assert errors_1 == [
        "value None",
        "ValueError: of rank 1 shared=True",
        told.format(0),
        told.format(0),
        "value of rank 0",
    ]


def threads_around_the_end(ranks: Ranks) -> tuple[int, int]:
    """This process's threads before and after the group's destruction, an optimiser step behind."""
    weight = nn.Parameter(torch.ones(2))
    (ranks.gather_rows(weight[None]).sum()).backward()
    torch.optim.AdamW([weight]).step()
    before = len(os.listdir("/proc/self/task"))
    dist.destroy_process_group()
    atexit.unregister(dist.destroy_process_group)
    return before, len(os.listdir("/proc/self/task"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")
def test_no_thread_of_the_group_outlives_it():
    """gloo's loop and its two workers: one that releases a tensor while Python ends aborts it."""
    for before, after in run_on_ranks(threads_around_the_end, 2):
        assert after <= before - 3


def test_one_process_never_touches_torch_distributed(monkeypatch):
    """Without torchrun there is no process group: any call into it would fail."""
    monkeypatch.setattr("runtime.distributed.dist", None)
    assert init_ranks("cpu") is SINGLE and SINGLE.is_main
    x = torch.ones(2, 3, requires_grad=True)
    assert SINGLE.gather_rows(x) is x and SINGLE.all_reduce_sum(x) is x
    assert SINGLE.broadcast(x) is x and SINGLE.first(None) is None and SINGLE.first("a") == "a"
    assert SINGLE.on_main(lambda a, b: a + b, 1, b=2) == 3
    broadcast_state(SINGLE, [nn.Linear(1, 1)], torch.optim.AdamW([x]))
    with pytest.raises(ZeroDivisionError), SINGLE.together():
        _ = 1 / 0
    assert not isinstance(ZeroDivisionError(), RankFailed)


def test_a_device_that_cannot_be_shared_is_refused(monkeypatch):
    """Two ranks on one mps device, or more ranks than cards, would fail later and elsewhere."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match=r"cannot share one mps device.*runtime\.device=cpu"):
        init_ranks("mps")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 3 .* there are 2; lower --nproc-per-node"):
        init_ranks("auto")
