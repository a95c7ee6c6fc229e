"""What this device can do at most, at our shapes: python -m benchmarks.ceilings --device cuda

Copy bandwidth (bytes read and written), and the rate of library products: a large square one, and
those that an InfoNCE step of B = N rows consists of, a chunk of rows at a time. On random values:
zeros run faster.

Shapes: B queries, N candidates, D embedding, c rows of a chunk.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.infonce import table
from benchmarks.turns import DATA, append_csv, device_name, provenance
from runtime.device import pick_device

_CALLS = 10


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rows", type=int, default=65_536, help="N")
    parser.add_argument("--chunk", type=int, default=4096, help="c")
    parser.add_argument("--width", type=int, nargs="+", default=[768, 1024, 384, 256, 128, 64])
    parser.add_argument("--square", type=int, default=8192)
    parser.add_argument("--copy-mib", type=int, default=4096)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to ceilings.csv")
    parser.add_argument("--out", metavar="FOLDER", help="of ceilings.csv, for benchmarks/data")
    return parser.parse_args(given)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of _CALLS calls after two that are not counted."""
    times = []
    for turn in range(_CALLS + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            passed_ms = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            call()
            passed_ms = 1000 * (time.perf_counter() - began)
        if turn >= 2:
            times.append(passed_ms)
    return sorted(times)[_CALLS // 2]


def jobs(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, float, str, Callable[[], object]]]:
    """(name, work of a call, unit of work a second, call); tensors live until the next one."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    wide = {"out_dtype": torch.float32} if dtype != torch.float32 and device.type == "cuda" else {}

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    source = torch.randint(0, 255, (args.copy_mib * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield "copy", 2e-12 * source.numel(), "TB/s", partial(target.copy_, source)
    del source, target
    n, c, N = args.square, args.chunk, args.rows
    x, y = some(n, n), some(n, n)
    yield f"product {n} x {n} x {n}", 2e-12 * n**3, "TFLOP/s", partial(torch.mm, x, y)
    del x, y
    for D in args.width:
        q_cD, p_ND, g_cN = some(c, D), some(N, D), some(c, N)
        work = 2e-12 * c * N * D
        shape = f"c {c} N {N} D {D}"
        for name, x, y, options in (
            ("scores q p^T", q_cD, p_ND.T, {}),
            ("scores q p^T in float32", q_cD, p_ND.T, wide),
            ("gradient g p in float32", g_cN, p_ND, wide),
            ("gradient g^T q in float32", g_cN.T, q_cD, wide),
        ):
            yield f"{name}, {shape}", work, "TFLOP/s", partial(torch.mm, x, y, **options)


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    deadline = time.monotonic() + args.limit_s
    rows = []
    folder = Path(args.out or DATA)
    folder.mkdir(parents=True, exist_ok=True)
    for name, work, unit, call in jobs(args, device):
        if time.monotonic() > deadline:
            print(f"{name}: not run: no time left")
            continue
        found = {"name": name, "precision": args.precision, "device": device_name(device)}
        try:
            ms = milliseconds(call, device)
            found |= {"ms": float(f"{ms:.4g}"), "rate": float(f"{1000 * work / ms:.4g}")}
            rows.append(found | {"unit": unit})
            if args.csv:
                append_csv(folder / "ceilings.csv", [rows[-1] | provenance()])
        except (RuntimeError, TypeError) as error:  # a product this torch lacks, or no memory
            print(f"{name}: {' '.join(str(error).split())[:160]}")
    shown = {k: k for k in ("name", "precision", "ms", "rate", "unit")}
    print(table(rows, shown))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
