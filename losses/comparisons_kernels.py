"""The row of losses/check.py about the Triton kernels: they against the specification.

In a process of its own, because Triton's interpreter, which stands in for a GPU where there is
none, has to be chosen before triton is imported.

Shapes: A queries and N candidate passages, D embedding.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

from conf.schema import LossConfig
from losses import comparisons, similarity
from losses.comparisons import Row
from losses.specification import KINDS

ROOT = Path(__file__).parents[1]
NAME = "kernels"
TEMPERATURES = (0.1, 0.03)
LOSS = 1e-2  # nats, with one dim
DIMS = [5, 12, 24]  # for several


def start(c: LossConfig) -> subprocess.Popen | None:
    """The process, where the experiment asks for kernels and triton is installed."""
    is_wanted = c.backend == "triton" and c.kind in KINDS
    if not is_wanted or importlib.util.find_spec("triton") is None:
        return None
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process.stdin as pipe:
        pipe.write(json.dumps(dataclasses.asdict(c)))
    process.stdin = None
    return process


def compare_kernels(process: subprocess.Popen | None, timeout_s: float = 120) -> Iterator[Row]:
    """Wait for it. No row where no kernel serves the loss."""
    if process is None:
        return
    try:
        out, errors = process.communicate(timeout=timeout_s)
        if process.returncode == 0:
            yield from (Row(**row) for row in json.loads(out.splitlines()[-1]))
            return
        why = (errors.strip().splitlines() or ["no message"])[-1][:120]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        why = f"over {timeout_s:g} s"
    yield Row(NAME, f"the process failed: {why}", math.inf, comparisons.EXACT)


def rows_of(c: LossConfig, device: torch.device) -> list[Row]:
    """A row a temperature: the largest error in float32 over the kernels' paths, one dim and, where
    the experiment has several, three."""
    targets, kernels, found = comparisons.one_answer_each(), similarity.kernels(), []
    with (
        patch.object(kernels, "sweep", wraps=kernels.sweep) as sweep,
        patch.object(kernels, "softplus_sweep", wraps=kernels.softplus_sweep) as softplus_sweep,
    ):
        for temperature in TEMPERATURES:
            one = dataclasses.replace(c, backend="auto", path="auto")
            one = comparisons.plain(one, temperature)
            given = comparisons.leaning_at([LOSS], comparisons.dense_loss(one), targets)
            q_AD, p_ND, _ = min(given, key=lambda x: abs(math.log(max(x[2], 1e-9) / LOSS)))
            worst = 0.0
            for dims in ([], DIMS) if c.dims else ([],):
                for path in paths_of(c):
                    try:
                        ours = dataclasses.replace(one, dims=dims, backend="triton", path=path)
                    except ValueError:  # no kernel has what this loss asks for
                        return []
                    error = comparisons.rounding(ours, q_AD.float(), p_ND.float(), targets, device)
                    worst = comparisons.larger(worst, error)
            calls = sweep.call_args_list + softplus_sweep.call_args_list
            taken = dict.fromkeys(call.kwargs["path"] for call in calls)
            where = "on this GPU" if device.type == "cuda" else "in Triton's interpreter"
            what = f"{', '.join(taken)}, float32, {where}; float64 on the same inputs"
            name, bound = f"{NAME}, temperature {temperature:g}", comparisons.float32_bound(one)
            found.append(Row(name, what, worst, bound))
    return found if calls else []


def paths_of(c: LossConfig) -> list[str]:
    """The one that is set, or all that serve the loss; at this size auto would take none."""
    if c.path not in ("auto", "dense"):
        return [c.path]
    has_columns = c.symmetric > 0 or "passage_query" in c.negatives
    return ["fused"] if has_columns or c.kind == "sigmoid" else ["fused", "chunk", "eform"]


def main() -> None:
    torch.set_num_threads(1)
    c = LossConfig(**json.load(sys.stdin))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps([dataclasses.asdict(row) for row in rows_of(c, device)]))


if __name__ == "__main__":
    main()
