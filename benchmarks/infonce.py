"""Time and memory of the loss alone, forward and backward: python -m benchmarks.infonce

Ours against the other ways of computing the same loss on the same unit-norm embeddings, one dim or
several Matryoshka dims, in float32 and, where the device multiplies it, bfloat16 (then inputs and
gradients are bfloat16). benchmarks/infonce_sides.py has the sides; one that fails or does not serve
a case gets a row with the reason. Beside time and memory the relative error of the gradient against
float64, of some rows where there are many.

On a CPU  all sides by turns in one process, with the allocator of train.py, after a call that is
          not counted; the ratio to a peer is the median over rounds. Memory is the growth at the
          highest point of one call, gradients included, in a process of its own.
On CUDA   one side after the other in a worker process, which a broken one leaves to a new one.
          Events around each call, the L2 cache swept before it; the ratio is that of the medians.

Shapes: B queries, N candidate passages (the first B answer them, in order), D embedding.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.infonce_cells import CELL_LIMIT_S, Cell, run_cells
from benchmarks.infonce_sides import (
    DTYPES,
    KINDS,
    OURS,
    PATHS,
    PEERS,
    SIDES,
    SOFTMAX_TEMPERATURE,
    Case,
    temperature_of,
)
from benchmarks.infonce_truth import cosine_for, embeddings, gradient_error, truth

SIZES = ("1024x1024x384", "2048x2048x384", "4096x4096x384", "8192x8192x384", "2048x4096x384")
DIMS = ("-", "384,256,128,64,32")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.infonce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    others = [*PATHS, *PEERS]
    parser.add_argument("--loss", nargs="+", choices=KINDS, default=["one-sided"])
    parser.add_argument(
        "--ours", choices=(OURS, *PATHS), default=OURS, help="rook: as a training step calls it"
    )
    parser.add_argument(
        "--peer", nargs="+", choices=tuple(SIDES), metavar="SIDE",
        help=f"of {', '.join(others)}; default: all others, on a CPU none of our own paths",
    )  # fmt: skip
    parser.add_argument("--size", nargs="+", default=SIZES, metavar="BxNxD", help="N >= B")
    parser.add_argument(
        "--dims", nargs="+", default=DIMS, help="each a list with commas; - is the full width"
    )
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cosine", type=float, default=0.4, help="of a query and its answer")
    parser.add_argument(
        "--at-loss", nargs="+", type=float, metavar="NATS",
        help="instead: the cosine at which one-sided InfoNCE is about this; a case each",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, help="of both softmax losses, by turns alone; default 0.05"
    )
    parser.add_argument("--rounds", type=int, default=7, help="by turns, on a CPU")
    parser.add_argument(
        "--way", choices=("auto", "turns", "cells"), default="auto",
        help="turns on a CPU, cells on CUDA",
    )  # fmt: skip
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="cells: begin none after this"
    )
    parser.add_argument("--cell-limit-s", type=float, default=CELL_LIMIT_S)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to infonce.csv")
    parser.add_argument("--out", metavar="FOLDER", help="of infonce.csv, for benchmarks/data")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    for size in args.size:
        if len(shape := size.split("x")) != 3 or not all(n.isdigit() for n in shape):
            parser.error(f"--size {size}: want BxNxD, such as 2048x4096x384")
        if int(shape[0]) > int(shape[1]):
            parser.error(f"--size {size}: every query needs its answer among N >= B passages")
    if args.temperature is not None:
        if args.temperature <= 0 or args.way == "cells":
            parser.error("--temperature: want a number > 0, and --way turns")
        SOFTMAX_TEMPERATURE[0] = args.temperature
    return args


def cases_of(args: argparse.Namespace) -> Iterator[Case]:
    for kind in args.loss:
        for precision in args.precision:
            for size in args.size:
                for listed in args.dims:
                    B, N, D = map(int, size.split("x"))
                    dims = () if listed == "-" else tuple(int(d) for d in listed.split(","))
                    at_loss = [cosine_for(x, N, D) for x in args.at_loss or ()]
                    for cosine in at_loss or [args.cosine]:
                        yield Case(kind, precision, B, N, D, dims, cosine)


def compare(args: argparse.Namespace) -> None:
    from runtime.device import pick_device

    device = pick_device(args.device).type
    by_turns = args.way == "turns" or (args.way == "auto" and device == "cpu")
    if args.temperature is not None and not by_turns:
        raise SystemExit("--temperature: add --way turns")
    if by_turns:
        args.peer = [p for p in args.peer or PEERS if p != args.ours]
        rows = [row for case in cases_of(args) for row in by_turns_in(args, case, device)]
    else:
        rows = in_cells([args], device, limit_s=args.limit_s)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.csv:
        save(rows, args.out)


# ----------------------------------------------------------------------------------------------
# by turns


def by_turns_in(args: argparse.Namespace, case: Case, device: str) -> list[dict]:
    """A row for each peer."""
    from benchmarks.turns import row, run_worker

    reasons = {side: SIDES[side].why_not(case, device) for side in (args.ours, *args.peer)}
    sides = [side for side, why_not in reasons.items() if not why_not]
    if reasons[args.ours] or len(sides) == 1:
        lines = "\n".join(f"  {side}: {why_not}" for side, why_not in reasons.items())
        raise SystemExit(f"{case.name}: nothing to compare\n{lines}")
    options = ["--loss", case.kind, "--size", case.size, "--precision", case.precision]
    options += ["--dims", ",".join(map(str, case.dims)) or "-", "--device", device]
    options += ["--cosine", str(case.cosine), "--ours", args.ours]
    if args.temperature is not None:
        options += ["--temperature", str(args.temperature)]
    times = run_worker(
        "benchmarks.infonce",
        [*("--worker", "times"), *options, "--rounds", str(args.rounds), "--peer", *sides],
    )
    reasons |= times["failed"]
    results, ms, error = {}, {}, times["gradient_error"]
    for side in times["seconds"]:
        alone = run_worker("benchmarks.infonce", ["--worker", side, *options])
        shared = {"peak_mib": alone["peak_mib"], "device": times["device"]}
        results[side] = [shared | {"rate": case.B / s} for s in times["seconds"][side]]
        ms[side] = round(1000 * statistics.median(times["seconds"][side]), 2)
    ours = args.ours
    if ours not in results:
        raise SystemExit(f"{case.name}: {ours}: {reasons[ours]}")
    rows = []
    for peer in args.peer:
        if peer not in results:
            if case.kind in SIDES[peer].kinds:
                print(f"{case.name}: {peer}: {reasons[peer]}")
            continue
        found = row(case.name, peer, case.precision, results, ours=ours)
        found |= {"ms": ms[ours], "peer_ms": ms[peer], "loss": times["loss"]}
        found |= {"gradient_error": error[ours], "peer_gradient_error": error[peer]}
        rows.append(found | _about(case, ours) | {"note": SIDES[peer].note(case)})
    return rows


def _about(case: Case, ours: str) -> dict:
    about = {"kind": case.kind, "ours": ours, "cosine": round(case.cosine, 4)}
    return about | {"temperature": temperature_of(case.kind)}


def _given(args: argparse.Namespace) -> tuple[Tensor, Tensor, Case, torch.device]:
    from runtime.device import pick_device

    device = pick_device(args.device)
    (case,) = cases_of(args)
    q_BD, p_ND = embeddings(case.B, case.N, case.D, cosine=case.cosine)
    dtype = DTYPES[case.precision]
    return q_BD.to(device, dtype), p_ND.to(device, dtype), case, device


def work_times(args: argparse.Namespace) -> dict:
    """Seconds and gradient error of the sides in --peer, ours among them, in this process."""
    from benchmarks.turns import device_name, interleaved
    from runtime.device import keep_freed_memory

    keep_freed_memory()
    q_BD, p_ND, case, device = _given(args)
    wanted = truth(q_BD, p_ND, case.dims, case.kind)
    failed, error = {}, {}
    for side in args.peer:
        try:
            found = SIDES[side].compute(q_BD, p_ND, case.dims, case.kind)
        except Exception as reason:  # a line, not the end of the run
            failed[side] = f"{type(reason).__name__}: {reason}"[:200]
            continue
        if not torch.isclose(found[0].double(), wanted.loss, rtol=1e-2, atol=0):
            failed[side] = f"finds loss {found[0]:.6g}, float64 {wanted.loss:.6g}"
            continue
        error[side] = float(f"{gradient_error(found, wanted, q_BD, p_ND):.2g}")
        del found
    calls = {
        side: (lambda _, s=side: SIDES[s].compute(q_BD, p_ND, case.dims, case.kind))
        for side in error
    }
    return {
        "seconds": interleaved(calls, args.rounds, device),
        "failed": failed,
        "gradient_error": error,
        "loss": round(wanted.loss.item(), 4),
        "device": device_name(device),
    }


def work_memory(args: argparse.Namespace) -> dict:
    """Growth at the highest point of one call of one side, alone in this process."""
    from benchmarks.turns import PeakMemory, release_freed_memory

    q_BD, p_ND, case, device = _given(args)
    compute = SIDES[args.worker].compute
    # libraries load what they need, and threads their buffers
    compute(q_BD[:64].clone(), p_ND[:64].clone(), case.dims, case.kind)
    release_freed_memory()
    with PeakMemory(device) as memory:
        compute(q_BD, p_ND, case.dims, case.kind)
    return {"peak_mib": round(memory.grown_mib, 1)}


# ----------------------------------------------------------------------------------------------
# in cells


def in_cells(
    requests: list[argparse.Namespace],
    device: str,
    *,
    limit_s: float,
    say: Callable[[str], None] = print,
    lines: Path | None = None,
) -> list[dict]:
    """A row for each case and peer of each request; ours is measured once a case.

    lines  a file that every cell is appended to as soon as it is there, one JSON line each: what
           rows_of_lines takes when this process is killed
    """
    from benchmarks.turns import provenance

    groups = []
    for args in requests:
        for case in cases_of(args):
            peers = [p for p in args.peer or [*PATHS, *PEERS] if p != args.ours]
            groups.append((case, args.ours, [p for p in peers if case.kind in SIDES[p].kinds]))
    cells = [Cell(case, side) for case, ours, peers in groups for side in (ours, *peers)]
    ours_of_cells = iter([ours for _, ours, peers in groups for _ in (ours, *peers)])
    found, now = [], provenance()

    def report(cell: Cell, answer: dict) -> None:  # in the order of cells
        outcome = f"{answer['ms']:g} ms" if "ms" in answer else answer["note"]
        say(f"{cell.case.name} {cell.case.precision} {cell.side}: {outcome}")
        line = {"case": asdict(cell.case), "ours": next(ours_of_cells), "side": cell.side}
        found.append(line | {"found": answer, "provenance": now})
        if lines is not None:
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")

    limits = {"limit_s": limit_s, "cell_limit_s": max(args.cell_limit_s for args in requests)}
    run_cells(cells, device=device, report=report, **limits)
    return rows_of_lines(found)


def rows_of_lines(lines: list[dict]) -> list[dict]:
    """A row for each line of a peer, beside that of ours of its case before it; one for ours alone
    where no peer follows."""
    rows, of_ours, has_peer = [], None, True

    def add(line: dict, side: str, answer: dict) -> None:
        case = Case(**(line["case"] | {"dims": tuple(line["case"]["dims"])}))
        row = paired(case, line["ours"], of_ours["found"], side, answer)
        rows.append(row | line["provenance"])

    for line in [*lines, None]:
        is_ours = line is None or line["side"] == line["ours"]
        if is_ours and not has_peer:
            add(of_ours, "", {})
        if is_ours:
            of_ours, has_peer = line, False
        else:
            add(line, line["side"], line["found"])
            has_peer = True
    return rows


def paired(case: Case, ours: str, of_ours: dict, peer: str, of_peer: dict) -> dict:
    """The row of a comparison by turns, with empty cells for what is not known; its `note` says why
    and is the peer's, `ours_note` ours."""
    first = of_ours if "ms" in of_ours else of_peer
    both = "ms" in of_ours and "ms" in of_peer
    row = {
        "name": case.name,
        "peer": peer,
        "precision": case.precision,
        "device": first.get("device", ""),
        "rate": _rate(case, of_ours),
        "peer_rate": _rate(case, of_peer),
        "ratio": round(of_peer["ms"] / of_ours["ms"], 3) if both else "",
        "peak_mib": of_ours.get("peak_mib", ""),
        "peer_peak_mib": of_peer.get("peak_mib", ""),
        "rounds": first.get("calls", ""),
        "loss": first.get("loss", ""),
    }
    for key in ("ms", "p20_ms", "p80_ms", "beyond_mib", "gradients", "gradient_error"):
        row |= {key: of_ours.get(key, ""), f"peer_{key}": of_peer.get(key, "")}
    return (
        row | _about(case, ours) | {"ours_note": of_ours["note"], "note": of_peer.get("note", "")}
    )


def _rate(case: Case, found: dict) -> float | str:
    return round(1000 * case.B / found["ms"], 2) if "ms" in found else ""


# ----------------------------------------------------------------------------------------------
# the table


SHOWN = {
    "name": "name", "precision": "type", "cosine": "cosine", "loss": "loss", "peer": "peer",
    "ms": "ms", "peer_ms": "peer ms", "ratio": "ratio", "peak_mib": "MiB",
    "peer_peak_mib": "peer MiB", "gradient_error": "error", "peer_gradient_error": "peer error",
    "note": "note",
}  # fmt: skip


def table(rows: list[dict], shown: dict[str, str] = SHOWN) -> str:
    """Columns as wide as their longest cell; numbers to the right."""
    lines = [list(shown.values()), *([str(r.get(k, "")) for k in shown] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [any(isinstance(r.get(k), str) and r[k] for r in rows) for k in shown]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in lines
    )


def save(rows: list[dict], folder: str | Path | None) -> None:
    """Append what was measured to infonce.csv of a folder (None: benchmarks/data)."""
    from benchmarks.turns import DATA, append_csv, provenance

    folder = Path(folder or DATA)
    folder.mkdir(parents=True, exist_ok=True)
    measured = [r for r in rows if r["ms"] != "" or r["peer_ms"] != ""]
    here = provenance()  # of rows by turns; those of cells bring theirs
    rows = [r | {k: r.get(k, v) for k, v in here.items()} for r in measured]
    append_csv(folder / "infonce.csv", rows)


if __name__ == "__main__":
    from benchmarks.turns import main

    main(arguments, compare, {"times": work_times, **{side: work_memory for side in SIDES}})
