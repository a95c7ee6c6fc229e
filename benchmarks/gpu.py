"""Everything there is to measure on a CUDA device, by one command: python -m benchmarks.gpu

In this order: the correctness suite, ceilings, the alternatives of our loss, peers, Matryoshka
dims, gradient errors, what the loss is of a step, registers and spills of every kernel. Each part
has its seconds and what those before it left over; one that overruns is stopped and said so, and
what it found stays. Under 8 minutes in all; --full goes on to 262k and takes up to 40, with the
benchmarks of whole training steps, which want more packages and a model.

Every cell goes to cells.jsonl of the folder as soon as it is measured, and the files of a finished
part stay: python -m benchmarks.gpu --rebuild --out FOLDER completes infonce.csv and summary.txt of
a killed run, on any machine.

Needs torch, triton, numpy and pytest. What else is missing is named, and its rows are left out. The
peers are pure Python; where that machine has no network, bring them along:

    pip install --target peers --no-deps \\
        memeff==0.3.1 inf-cl==1.2.1 siglip-kernel==0.1.2 sentence-transformers
    PYTHONPATH=peers make gpu
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

BEGAN = time.monotonic()  # torch takes seconds to import, and they count

from benchmarks import infonce  # noqa: E402
from benchmarks.turns import DATA  # noqa: E402

ROOT = Path(__file__).parents[1]
TOTAL_S, FULL_S = 470, 2400
LEAST_S = 10  # in which a process can start and find anything
OPTIONAL = ("memeff", "inf_cl", "siglip_kernel", "sentence_transformers", "xdist", "omegaconf")
SUITE = ("tests/kernels", "tests/models/test_gpu.py")
FIVE = "768,512,256,128,64"
MOST_ERROR = 0.05  # of a gradient, relative: bf16 has 0.002
LIBRARIES = ["chunked-lce", "chunked-lce-4096", "linear_cross_entropy", "memeff", "inf-cl", "dense"]
OWN = ["rook-eform", "rook-fused", "rook-chunk", "rook-torch"]


@dataclass(frozen=True)
class Part:
    """limit_s  seconds for all its commands together."""

    name: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]  # after `python -m`


def loss(sizes: str, peers: list[str], *options: str, dims: str = "-") -> tuple[str, ...]:
    shapes = sizes.split() if "x" in sizes else [f"{n}x{n}x768" for n in sizes.split()]
    return (
        *("benchmarks.infonce", "--device", "cuda", "--precision", "bf16"),
        *("--size", *shapes, "--dims", dims, "--peer", *peers, *options),
    )


def tests() -> tuple[str, ...]:
    spread = ()
    if importlib.util.find_spec("xdist"):  # most of the time is compiling, on a core each
        spread = ("-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))))
    return ("pytest", "-m", "gpu", "--tb=short", *spread, *SUITE)


def gate() -> tuple[str, ...]:
    """No kernel spills with the triton of this machine; it needs cores, not the device."""
    file = "tests/kernels/test_ahead_of_time.py"
    return ("pytest", "-m", "slow", "-k", "90", "-s", "--tb=short", file)


def parts() -> list[Part]:
    """Under 8 minutes; the sizes of the goals come first, in case the time is too short."""
    two, five = ("--loss", "two-sided"), {"dims": FIVE}
    ceilings = ("benchmarks.ceilings", "--device", "cuda", "--csv")
    return [
        Part("tests", 120, (tests(),)),
        Part("ceilings", 20, (ceilings,)),
        Part("alternatives", 70, (
            loss("65536 8192 32768", OWN),
            loss("65536 8192 32768", ["rook-fused", "rook-torch"], *two),
        )),
        Part("peers", 80, (
            loss("65536 8192 32768", LIBRARIES),
            loss("65536 8192 32768", ["memeff", "inf-cl", "dense"], *two),
            loss("65536 8192", ["siglip-kernel", "dense"], "--loss", "sigmoid"),
            loss("32768", ["torch.compile", "sentence-transformers"]),
        )),
        Part("matryoshka", 55, (
            loss("65536 8192 32768", ["rook-fused", "rook-eform", "memeff", "chunked-lce-4096",
                                      "dense"], **five),
            loss("65536", ["rook-fused", "memeff"], *two, **five),
        )),
        Part("gradient errors", 45, (
            loss("8192", [*OWN[:3], *LIBRARIES, "sentence-transformers"],
                 "--at-loss", "1e-4", "1e-2", "1"),
            loss("8192", ["rook-fused", "memeff", "inf-cl"], *two,
                 "--at-loss", "1e-4", "1e-2", "1"),
        )),
        Part("share of a step", 40, (("benchmarks.share", "--device", "cuda", "--csv"),)),
        Part("registers", 40, (gate(),)),
    ]  # fmt: skip


def full_parts() -> list[Part]:
    """What `parts` has, with time enough, then all sizes from 1k to 262k and other widths."""
    everything = "262144 131072 65536 32768 16384 8192 4096 2048 1024"
    peers = ["rook-eform", "rook-fused", "rook-chunk", *LIBRARIES]
    many = ["rook-fused", "rook-eform", "memeff", "chunked-lce-4096", "dense"]
    two = ("--loss", "two-sided")
    widths = " ".join(f"{n}x{n}x{D}" for D in (384, 1024) for n in (65536, 32768, 8192))
    longer = [Part(p.name, 2 * p.limit_s, p.commands) for p in parts()]
    step = ("benchmarks.step", "--device", "cuda", "--csv")
    return [
        *longer,
        Part("all sizes", 300, (
            loss(everything, peers),
            loss(everything, ["rook-fused", "memeff", "inf-cl", "dense"], *two),
            loss(everything, ["siglip-kernel", "dense"], "--loss", "sigmoid"),
        )),
        Part("all sizes, five dims", 200, (loss(everything, many, dims=FIVE),)),
        Part("widths", 150, (loss(widths, peers), loss(widths, ["rook-fused", "memeff"], *two))),
        Part("compiled", 150, (
            loss("8192 65536", ["torch.compile"], "--loss", "one-sided", "two-sided", "sigmoid"),
            loss("8192 65536", ["torch.compile"], dims=FIVE),
        )),
        Part("float32", 120, (
            loss("8192 32768", [*peers, "siglip-kernel"], "--precision", "fp32", "--loss",
                 "one-sided", "two-sided", "sigmoid"),
        )),
        Part("training steps", 480, (
            step,
            (*step, "--peer", "sentence-transformers-cached"),
            (*step, "--peer", "direct"),
            ("benchmarks.encode", "--device", "cuda", "--csv"),
            ("benchmarks.memory", "--device", "cuda", "--csv"),
        )),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------
# running


class Run:
    """Runs parts one after the other; what they print goes to the screen and to `log`.

    total_s  seconds for all parts from now on
    rows     of benchmarks/infonce.py, measured or not
    """

    def __init__(self, out: Path, log: TextIO, total_s: float):
        self.out, self.log, self.deadline = out, log, time.monotonic() + total_s
        self.rows: list[dict] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def part(self, part: Part, later_s: float = 0.0) -> str:
        """What became of it, in words. It may take what the parts before it left over.

        later_s  what the parts after it need
        """
        began = time.monotonic()
        ends = self.deadline - later_s
        self.say(f"\n== {part.name} (at most {max(0.0, ends - began):.0f} s)")
        of_loss = [c[1:] for c in part.commands if c[0] == "benchmarks.infonce"]
        states = [self.losses(of_loss, ends)] if of_loss else []
        states += [self.command(c, ends) for c in part.commands if c[0] != "benchmarks.infonce"]
        bad = [state for state in states if state != "done"]
        return f"{time.monotonic() - began:.0f} s, {'; '.join(bad) or 'done'}"

    def losses(self, commands: list[tuple[str, ...]], ends: float) -> str:
        """All commands of benchmarks.infonce of a part at once: starting a process takes longer
        than what it measures."""
        requests = [infonce.arguments(list(options)) for options in commands]
        limit_s = ends - time.monotonic()
        lines = self.out / CELLS
        rows = infonce.in_cells(
            requests, requests[0].device, limit_s=limit_s, say=self.say, lines=lines
        )
        self.say(infonce.table(rows))
        infonce.save(rows, self.out)
        self.rows += rows
        late = sum("no time left" in f"{r['note']} {r['ours_note']}" for r in rows)
        return f"{late} of {len(rows)} rows not measured: no time left" if late else "done"

    def command(self, command: tuple[str, ...], ends: float) -> str:
        """done | failed (code) | cut off | not run. Benchmarks that can hear how long they have and
        stop themselves; any other is interrupted, then killed."""
        left_s = ends - time.monotonic()
        if left_s < LEAST_S:
            return "not run: no time left"
        module, *options = command
        if module in LIMITED:
            options += ["--limit-s", f"{left_s - 8:.0f}", "--out", str(self.out)]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *options], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(
            target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True
        )
        reader.start()
        try:
            code = process.wait(timeout=left_s)
            state = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            state = "cut off"
            self.stop(process)
        reader.join(timeout=5)
        return state

    def stop(self, process: subprocess.Popen) -> None:
        """Interrupt it and its children: pytest then tells what it has; kill what stays."""
        for sign in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(timeout=5)


LIMITED = ("benchmarks.ceilings", "benchmarks.share")
CELLS = "cells.jsonl"


def rebuild(out: Path) -> list[dict]:
    """Append to infonce.csv of a folder what only its cells.jsonl has; all rows of the latter."""
    lines = []
    for number, text in enumerate((out / CELLS).read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError:  # the process was killed while it wrote
            print(f"{out / CELLS}:{number}: left out: not a whole line")
    rows = infonce.rows_of_lines(lines)
    old = []
    if (out / "infonce.csv").is_file():
        with (out / "infonce.csv").open(encoding="utf-8") as file:
            old = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    new = [row for row in rows if {k: str(v) for k, v in row.items() if v != ""} not in old]
    infonce.save(new, out)
    return rows


# ----------------------------------------------------------------------------------------------
# the goals


def goals(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(what, found, goal) at B = N = 65,536, D = 768, bf16, from rows of benchmarks/infonce.py;
    ours is the best of its paths. A side counts that has both gradients, and right; the others are
    named at the end."""
    left_out = {}

    def best(kind: str, dims: str, ours: bool) -> tuple[float, str, dict] | None:
        found = []
        for row in rows:
            if (row["kind"], row["precision"]) != (kind, "bf16") or row["cosine"] != 0.4:
                continue
            if not row["name"].endswith(f"65536x65536x768 dims {dims}"):
                continue
            for prefix, side in (("", row["ours"]), ("peer_", row["peer"])):
                ms = row[f"{prefix}ms"]
                if ms == "" or side.startswith("rook") != ours:
                    continue
                error = row[f"{prefix}gradient_error"]
                if row[f"{prefix}gradients"] != 2:
                    left_out[side, kind, dims] = f"{ms:g} ms, the gradient of one side alone"
                elif not error < MOST_ERROR:
                    left_out[side, kind, dims] = f"{ms:g} ms, its gradient is {error:g} off"
                else:
                    found.append((ms, side, {"MiB": row[f"{prefix}beyond_mib"]}))
        return min(found, key=lambda x: x[0], default=None)

    lines = []
    for kind, limit_ms in (("one-sided", 40), ("two-sided", 58)):
        ours, peer = best(kind, "768", True), best(kind, "768", False)
        lines.append((kind, _time(ours), f"<= {limit_ms} ms"))
        lines.append((f"{kind} against the best peer", _ratio(peer, ours), ">= 1.25"))
        lines.append((f"{kind} beyond inputs and gradients", _memory(ours), "<= 1024 MiB"))
    one, five = best("one-sided", "768", True), best("one-sided", FIVE, True)
    lines.append(("five dims", _time(five), ""))
    lines.append(("five dims over one", _ratio(five, one), "<= 1.6"))
    lines.append(
        ("five dims against the best peer", _ratio(best("one-sided", FIVE, False), five), ">= 2")
    )
    lines.append(("five dims beyond inputs and gradients", _memory(five), "<= 1024 MiB"))
    for (side, kind, dims), why in left_out.items():
        lines.append((f"not counted: {side}, {kind}, dims {dims}", why, ""))
    return lines


def _time(found: tuple | None) -> str:
    return "not measured" if found is None else f"{found[0]:g} ms ({found[1]})"


def _memory(found: tuple | None) -> str:
    return "not measured" if found is None else f"{found[2]['MiB']:.0f} MiB ({found[1]})"


def _ratio(a: tuple | None, b: tuple | None) -> str:
    if a is None or b is None:
        return "not measured"
    return f"{a[0] / b[0]:.2f} ({a[1]} / {b[1]})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = {p.name: p for p in full_parts()}
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--part", nargs="+", choices=chosen, metavar="PART", help=", ".join(chosen))
    parser.add_argument(
        "--out", default=str(DATA), metavar="FOLDER",
        help="of the CSV files, gpu.log and summary.txt; default: benchmarks/data",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    parser.add_argument(
        "--rebuild", action="store_true",
        help="complete infonce.csv and write summary.txt from cells.jsonl of --out, and stop",
    )  # fmt: skip
    args = parser.parse_args()
    to_run = full_parts() if args.full or args.part else parts()
    to_run = [p for p in to_run if not args.part or p.name in args.part]
    if args.plan:
        for part in to_run:
            print(f"{part.name}: {part.limit_s:g} s")
            print("\n".join("  python -m " + " ".join(command) for command in part.commands))
        return
    out = Path(args.out).resolve()
    if args.rebuild:
        if not (out / CELLS).is_file():
            raise SystemExit(f"benchmarks.gpu: no {CELLS} in {out}; --out is the folder of a run")
        write_summary(out, goal_lines(rebuild(out)))
        return
    import torch
    import triton

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here; --plan prints what would run")
    out.mkdir(parents=True, exist_ok=True)
    if args.part:
        total_s = sum(part.limit_s for part in to_run)
    else:
        total_s = FULL_S if args.full else TOTAL_S
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    device = torch.cuda.get_device_name()
    outcome: dict[str, str] = {}
    if (out / CELLS).is_file():  # of a run before this one, perhaps killed
        rebuild(out)
        (out / CELLS).unlink()
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        run = Run(out, log, total_s - (time.monotonic() - BEGAN))
        for i, part in enumerate(to_run):
            outcome[part.name] = run.part(part, sum(p.limit_s for p in to_run[i + 1 :]))
            lines = [
                f"{device}, torch {torch.__version__}, triton {triton.__version__},"
                f" Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')},"
                f" {time.monotonic() - BEGAN:.0f} s",
                f"missing packages: {', '.join(missing) or 'none'}",
                *(f"{p.name}: {outcome.get(p.name, 'not begun')}" for p in to_run),
                "",
                *goal_lines(run.rows),
            ]
            write_summary(out, lines)  # after each part: this process may be killed
    print("\n" + "\n".join(lines))
    if any("failed" in outcome.get(name, "") for name in ("tests", "registers")):
        raise SystemExit(1)


def goal_lines(rows: list[dict]) -> list[str]:
    return [
        "bf16, forward and backward, B = N = 65,536, D = 768:",
        *(f"  {what}: {found}{goal and f'; goal {goal}'}" for what, found, goal in goals(rows)),
    ]


def write_summary(out: Path, lines: list[str]) -> None:
    beside = out / "summary.txt.tmp"
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(beside, out / "summary.txt")


if __name__ == "__main__":
    main()
