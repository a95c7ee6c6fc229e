"""Real processes that train together over gloo, for tests: run_on_ranks(fn, 3, ...)."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def run_on_ranks(fn: Callable, world: int, *args: Any) -> list[Any]:
    """fn(ranks, *args) in `world` new processes; what each returned, in rank order.

    fn is a function of a module's top level, so that a new process can import it. A failing process
    fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _work, (world, free_port(), folder, fn, args), nprocs=world, join=True
        )
        return [torch.load(_result(folder, r), weights_only=False) for r in range(world)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def _work(rank: int, world: int, port: int, folder: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(rank, world, port))
    from runtime.distributed import init_ranks

    torch.save(fn(init_ranks("cpu"), *args), _result(folder, rank))


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"
